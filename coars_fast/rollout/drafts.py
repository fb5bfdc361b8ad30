"""Guesses of how a reply goes on, which one forward pass then checks token by token.

A sampled token is a function of its logits and of noise that depends on (seed, reply, position) alone. So feeding
guesses behind the last token gives, for each that turns out to be what is drawn before it, the next draw as well:
several tokens for one pass, and the same tokens as one by one. Replies that follow a format make it pay: most of their
tokens are certain. Guessing is by what followed the last tokens in earlier replies of the same agent, else by what
follows the last one in the reply's own view, where a title stands as it will be named; a wrong guess costs time and
nothing else. Guesses change the shapes of matrix products, and so the last bits of log-probs: a run begins with what
its conversations say of the replies' form and nothing else, so that it is the same whatever was played before.
"""

from __future__ import annotations

from collections.abc import Sequence

CONTEXT = 3
"""Tokens that a guess looks at; fewer where those were not seen together."""
LONGEST = 8
"""Tokens guessed at once."""
CERTAIN = 2
"""How often more than others a token has to have come to be guessed."""
MOST_ENTRIES = 200_000


class Drafter:
    """What followed what, by agent."""

    def __init__(self):
        self._next: dict[tuple[int, ...], list[int]] = {}
        """(agent, *context) -> [token, how often it came more than others]."""

    def clear(self) -> None:
        """Forget everything."""
        self._next.clear()

    def learn(self, agent: int, tokens: Sequence[int], start: int, *, times: int = 1) -> None:
        """See what tokens[start:] followed; `times` says how much an unseen one counts."""
        if len(self._next) > MOST_ENTRIES:
            self._next.clear()
        known = self._next
        for i in range(start, len(tokens)):
            token = tokens[i]
            for first in range(max(0, i - CONTEXT), i):
                key = (agent, *tokens[first:i])
                entry = known.get(key)
                if entry is None:
                    known[key] = [token, times]
                elif entry[0] == token:
                    entry[1] = min(entry[1] + 1, 16)
                elif entry[1] > 1:
                    entry[1] -= 1
                else:
                    entry[0] = token

    def guess(self, agent: int, context: Sequence[int], view: Sequence[int], most: int) -> list[int]:
        """What may follow.

        Args:
            agent: whose reply it is.
            context: its last tokens, at least `CONTEXT`.
            view: what it read.
            most: tokens that may still come.

        Returns:
            Up to `most` tokens; nothing where nothing is likely.
        """
        found, known = list(context[-CONTEXT:]), self._next
        for _ in range(min(most, LONGEST)):
            for length in range(CONTEXT, 0, -1):
                entry = known.get((agent, *found[-length:]))
                if entry is not None and entry[1] >= CERTAIN:
                    found.append(entry[0])
                    break
            else:
                if view.count(found[-1]) == 1 and found[-1] != view[-1]:
                    found.append(view[view.index(found[-1]) + 1])
                break
        return found[CONTEXT:]
