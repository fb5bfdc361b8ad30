"""What a scheduler needs of what it plays, and of what it plays with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from coars_fast.game.episode import Reply
from coars_fast.rollout.pages import CachedSequence, PagePool
from coars_fast.rollout.sampling import PartialReply, Sampling


class Conversation(Protocol):
    """What a scheduler needs of an episode."""

    @property
    def waiting(self) -> int | None:
        """The agent who speaks next; None at the end."""
        ...

    @property
    def views(self) -> Sequence[Any]:
        """By agent: `tokens`, append-only; that of the waiting agent ends where its reply begins."""
        ...

    def is_valid(self, reply: Reply) -> bool:
        """Whether a reply of the waiting agent can be understood."""
        ...

    def receive(self, reply: Reply) -> None:
        """Take the waiting agent's reply and move on."""
        ...

    def longest_views(self, max_reply_tokens: int) -> Sequence[int]:
        """By agent: tokens that its view has at most when its last reply ends."""
        ...


class Engine(Protocol):
    """What a scheduler needs of `engine.Engine`."""

    @property
    def pool(self) -> PagePool: ...

    def extend(
        self, sequences: Sequence[CachedSequence], tokens: Sequence[Sequence[int]], agents: Sequence[int]
    ) -> Any: ...

    def decode(
        self, replies: Sequence[PartialReply], sampling: Sampling, *, until: int | None = None
    ) -> tuple[int, int]: ...

    def score(
        self,
        sequences: Sequence[CachedSequence],
        contexts: Sequence[Sequence[int]],
        tokens: Sequence[Sequence[int]],
        agents: Sequence[int],
        *,
        lengths: Sequence[int] | None = None,
    ) -> Sequence[Any]: ...
