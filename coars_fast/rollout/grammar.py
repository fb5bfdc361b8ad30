"""Replies that always parse: a small automaton over tokens says what may come next.

    recommender:  Reason: <free text> \\n Item: <one of the candidates>
    user:         Reason: <free text> \\n Action: <action> \\n Score: <two decimals in the action's interval>

Free text is any tokens without a line break; it is ended in time for the rest to fit the longest reply. Log-probs of
constrained replies are those under the mask. Training on them would be wrong: the update differentiates the policy
without the mask, which pushes the probability of forced tokens up and down for rewards that they did not earn. So this
is for evaluations, and for showing what a model that never saw the format would recommend.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from coars_fast.errors import ConfigError
from coars_fast.game.episode import RECOMMENDER, Episode
from coars_fast.game.prompts import ACTIONS, name_item
from coars_fast.game.template import TextCodec, TokenTemplate

_free_tokens: WeakKeyDictionary[TextCodec, Tensor] = WeakKeyDictionary()

Trie = dict[int, "Trie"]


class Grammar:
    """`Constraint`: an opening, free tokens, and one of several endings.

    Args:
        opening: tokens that come first.
        free: [n] tokens of which any number up to `room` may follow.
        room: of free tokens.
        endings: token sequences; none is the beginning of another, and none begins with a free token.
    """

    def __init__(self, opening: Sequence[int], free: Tensor, room: int, endings: Iterable[Sequence[int]]):
        self._opening, self._free, self._room = list(opening), free, room
        self._node: Trie = {}
        for ending in endings:
            node = self._node
            for token in ending:
                node = node.setdefault(token, {})
        self._either = torch.cat([free, torch.tensor(list(self._node))])

    def allowed(self) -> Tensor:
        """See `Constraint`."""
        if self._opening:
            return torch.tensor(self._opening[:1])
        return self._either if self._room else torch.tensor(list(self._node))

    def take(self, token: int) -> None:
        """See `Constraint`."""
        if self._opening:
            assert token == self._opening.pop(0)
        elif token in self._node:
            self._node, self._room = self._node[token], 0
        else:
            assert self._room > 0
            self._room -= 1


def free_tokens(codec: TextCodec, template: TokenTemplate) -> Tensor:
    """[n] tokens that text of one line may hold."""
    if codec not in _free_tokens:
        ids = sorted(set(codec.vocab.values()) - template.control)
        _free_tokens[codec] = torch.tensor([i for i in ids if "\n" not in codec.decode([i])])
    return _free_tokens[codec]


def judgement_endings() -> list[str]:
    """How a user agent's reply may end."""
    found = []
    for action, (low, high) in ACTIONS.items():
        last = round(100 * high) + (high == 1.0)
        found += [f"\nAction: {action}\nScore: {score / 100:.2f}" for score in range(round(100 * low), last)]
    return found


def episode_endings(episode: Episode) -> list[str]:
    """How a reply of the waiting agent may end."""
    if episode.waiting == RECOMMENDER:
        named = enumerate(episode.candidate_titles, start=1)
        return [f"\nItem: {name_item(episode.prompts, number, title)}" for number, title in named]
    return judgement_endings()


def reply_grammar(codec: TextCodec, template: TokenTemplate, endings: Sequence[str], max_reply_tokens: int) -> Grammar:
    """A reason in free text and one of the endings.

    Raises:
        ConfigError: the longest reply has no room for the format.
    """
    opening = codec.encode("Reason:")
    closing = [[*codec.encode(text), template.end_of_turn] for text in endings]
    room = max_reply_tokens - len(opening) - max(map(len, closing))
    if room < 0:
        raise ConfigError(
            f"rollout.max_reply_tokens: {max_reply_tokens} leave no room for a constrained reply, which needs "
            f"{max_reply_tokens - room}"
        )
    return Grammar(opening, free_tokens(codec, template), room, closing)
