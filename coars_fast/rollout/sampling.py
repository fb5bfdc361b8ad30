"""Replies in progress, and how their tokens are drawn.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from coars_fast.rollout.pages import CachedSequence
from coars_kernels import sample_with_logprob


class Constraint(Protocol):
    """Which tokens may follow what a reply holds so far (see `grammar.py`)."""

    def allowed(self) -> Tensor:
        """[n] int64 on the CPU, at least one token."""
        ...

    def take(self, token: int) -> None:
        """Move on by a token that was drawn."""
        ...


@dataclass(eq=False, slots=True)
class PartialReply:
    """A reply that is being sampled."""

    sequence: CachedSequence
    """Its view, as far as it is cached."""
    view: Sequence[int]
    """All tokens before the reply; at least one is not cached when the reply is started."""
    agent: int
    """Its adapter; -1 for none."""
    noise_id: int
    """Key of its sampling noise."""
    limit: int
    """Most tokens."""
    temperature: float = 1.0
    constraint: Constraint | None = None
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    over: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the view and the longest reply."""
        return len(self.view) + self.limit

    def take(self, token: int, logp: float, control: frozenset[int]) -> None:
        """Append a sampled token."""
        self.ids.append(token)
        self.logp.append(logp)
        self.over = token in control or len(self.ids) == self.limit
        if self.constraint is not None and not self.over:
            self.constraint.take(token)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How replies are drawn and what ends them."""

    seed: int
    """Of the noise, which depends on (seed, noise id of the reply, position) and nothing else."""
    control: frozenset[int]
    """Tokens that end a reply."""


class Temperatures:
    """The temperatures of rows: nearly always one, rarely two (a greedy evaluation draws some replies again).

    Args:
        values: of each row.
        device: where masks live.
    """

    def __init__(self, values: Sequence[float], device: torch.device):
        self.first, *others = sorted(set(values))
        self.others = [(t, torch.tensor([value == t for value in values], device=device)) for t in others]


def draw(
    logits: Tensor, seed: int | Tensor, temperatures: Temperatures, noise_id: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Next tokens [B] and their log-probs [B] from logits [B, V]; `position` is where the tokens will stand."""
    place: dict[str, Any] = {"seed": seed, "sequence_id": noise_id, "position": position}
    token, logp = sample_with_logprob(logits, temperature=temperatures.first, **place)
    for temperature, rows in temperatures.others:
        other_token, other_logp = sample_with_logprob(logits, temperature=temperature, **place)
        token, logp = torch.where(rows, other_token, token), torch.where(rows, other_logp, logp)
    return token, logp


def constrain(logits: Tensor, replies: Sequence[PartialReply]) -> Tensor:
    """logits [B, V] with what a reply's constraint does not allow at -inf."""
    if all(reply.constraint is None for reply in replies):
        return logits
    masked = logits.clone()
    for row, reply in enumerate(replies):
        if reply.constraint is not None:
            allowed = reply.constraint.allowed().to(logits.device)
            masked[row] = float("-inf")
            masked[row, allowed] = logits[row, allowed]
    return masked
