"""Guesses of how a reply goes on, which one forward pass then checks token by token.

A sampled token is a function of its logits and of noise that depends on (seed, reply, position) alone. So feeding
guesses behind the last token gives, for each that turns out to be what is drawn before it, the next draw as well:
several tokens for one pass, and the same tokens as one by one. Replies that follow a format make it pay: most of their
tokens are certain. Guessing is by what followed the last tokens in earlier replies of the same agent; a wrong guess
costs time and nothing else. Guesses change the shapes of matrix products, and so the last bits of log-probs: a run
begins without any, so that it is the same whatever was played before.
"""

from __future__ import annotations

from collections.abc import Sequence

CONTEXT = 3
"""Tokens that a guess looks at."""
LONGEST = 8
"""Tokens guessed at once."""
MOST_ENTRIES = 200_000


class Drafter:
    """What followed what, by agent."""

    def __init__(self):
        self._next: dict[tuple[int, ...], list[int]] = {}
        """(agent, context) -> [token, how often it came more than others]."""

    def clear(self) -> None:
        """Forget everything."""
        self._next.clear()

    def learn(self, agent: int, tokens: Sequence[int], start: int) -> None:
        """See what tokens[start:] followed."""
        if len(self._next) > MOST_ENTRIES:
            self._next.clear()
        for i in range(max(start, CONTEXT), len(tokens)):
            key, token = (agent, *tokens[i - CONTEXT : i]), tokens[i]
            entry = self._next.get(key)
            if entry is None:
                self._next[key] = [token, 1]
            elif entry[0] == token:
                entry[1] = min(entry[1] + 1, 16)
            elif entry[1] > 1:
                entry[1] -= 1
            else:
                entry[0] = token

    def guess(self, agent: int, context: Sequence[int], most: int) -> list[int]:
        """What may follow a context of at least `CONTEXT` tokens; nothing where nothing is likely."""
        found, known = list(context[-CONTEXT:]), self._next
        for _ in range(min(most, LONGEST)):
            entry = known.get((agent, *found[-CONTEXT:]))
            if entry is None or entry[1] < 2:
                break
            found.append(entry[0])
        return found[CONTEXT:]
