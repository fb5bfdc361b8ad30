"""Which prompts begin alike: what several conversations share is computed once and forked.

Two levels: what nearly equal prompts share (the episodes of a group, questions about one user), and what all prompts of
an agent share (its instructions). Prompts are compared as tokens; nothing is hashed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coars_fast.rollout.pages import CachedSequence

SHORTEST = 8
"""Shared tokens under which a fork is not worth its bookkeeping."""


@dataclass(eq=False)
class Prefix:
    """Tokens that several prompts of an agent begin with."""

    agent: int
    tokens: Sequence[int]
    parent: Prefix | None
    """Shorter, and shared by more."""
    members: int = 0
    """Prompts, and prefixes that lie on this one, that have not used it yet."""
    sequence: CachedSequence | None = None

    @property
    def nearest(self) -> CachedSequence | None:
        """The longest part of it that is cached."""
        return self.sequence or (self.parent.nearest if self.parent else None)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens are equal."""
    most = min(len(a), len(b))
    if a[:most] == b[:most]:
        return most
    return next(i for i in range(most) if a[i] != b[i])


def find_prefixes(agent: int, prompts: Sequence[Sequence[int]]) -> list[Prefix | None]:
    """The longest prefix that each prompt shares with others, None where it is too short to matter.

    Args:
        agent: whose prompts they are.
        prompts: tokens, without the last one where logits after it are needed.
    """
    found: list[Prefix | None] = [None] * len(prompts)
    if len(prompts) < 2:
        return found
    order = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
    alike = [common_length(prompts[a], prompts[b]) for a, b in zip(order, order[1:], strict=False)]
    root = None
    if min(alike) >= SHORTEST:
        root = Prefix(agent, prompts[order[0]][: min(alike)], None)
    start = 0
    for end in range(1, len(order) + 1):
        # Neighbours belong together where most of the shorter one is common.
        if end < len(order) and 2 * alike[end - 1] > min(len(prompts[order[end - 1]]), len(prompts[order[end]])):
            continue
        shared = min(alike[start : end - 1], default=0)
        group = root
        if end - start > 1 and shared >= SHORTEST and (root is None or shared > len(root.tokens)):
            group = Prefix(agent, prompts[order[start]][:shared], root)
            if root is not None:
                root.members += 1
        for i in order[start:end]:
            found[i] = group
            if group is not None:
                group.members += 1
        start = end
    return found
