"""Branches of finished conversations: tokens whose log-probs are asked after a context that leaves a view early.

This is how a teacher's log-probs come out of a rollout: the reference takes its place between what the student saw and
what it said, and the view's keys and values, still in their pages, are read once more. Views wait in their pages until
there is a batch; where somebody who plays needs the pages, they are computed again later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coars_fast.errors import PagesError
from coars_fast.rollout.pages import CachedSequence
from coars_fast.rollout.protocols import Conversation, Engine
from coars_fast.rollout.statistics import Statistics

BATCH = 32
"""Branches that are scored at once."""


@dataclass(eq=False)
class Branch:
    """What is asked of one agent's view."""

    agent: int
    fork: int
    """Position at which the context takes the view's place."""
    context: Sequence[int]
    """At least one token."""
    tokens: Sequence[int]
    """What is scored, at least one."""
    logp: tuple[float, ...] = ()
    """Of `tokens`, once they are scored."""

    @property
    def end(self) -> int:
        """Tokens that are cached while it is scored: all but the last."""
        return self.fork + len(self.context) + len(self.tokens) - 1


@dataclass(eq=False)
class _Views:
    """A conversation that is over."""

    conversation: Conversation
    cached: list[CachedSequence | None]
    """By agent."""
    left: deque[Branch]

    def needed(self, agent: int) -> int:
        """Tokens of a view that its branches start from."""
        return max(branch.fork for branch in self.left if branch.agent == agent)


class Scoring:
    """Conversations that wait for their branches to be scored.

    Args:
        engine: scores, and owns the pages.
        statistics: of the run; counts what is computed here.
    """

    def __init__(self, engine: Engine, statistics: Statistics):
        self.engine, self.pool, self.statistics = engine, engine.pool, statistics
        self.waiting: deque[_Views] = deque()

    def add(
        self, conversation: Conversation, cached: Sequence[CachedSequence | None], branches: Sequence[Branch]
    ) -> None:
        """Take over a conversation's views, as far as they are cached."""
        self.waiting.append(_Views(conversation, list(cached), deque(branches)))

    def work(self, *, others_run: bool) -> None:
        """Score whatever makes whole batches; everything, where nobody else uses the pages.

        Raises:
            PagesError: a single branch does not fit the whole memory.
        """
        while self.waiting and (not others_run or sum(len(views.left) for views in self.waiting) >= BATCH):
            chosen = self._fitting()
            if not chosen:
                if others_run:
                    return
                chosen = self._first_alone()
            self._score(chosen)

    def make_room(self, pages: int) -> bool:
        """Release waiting views, the last first, until so many pages are free; whether they are."""
        for views in reversed(self.waiting):
            if pages <= self.pool.num_free:
                break
            self._release(views)
        return pages <= self.pool.num_free

    def drop(self) -> None:
        """Give everything up."""
        for views in self.waiting:
            self._release(views)
        self.waiting.clear()

    def _release(self, views: _Views) -> None:
        for agent, sequence in enumerate(views.cached):
            if sequence is not None:
                self.pool.release(sequence)
                views.cached[agent] = None

    def _pages(self, views: _Views, branch: Branch, computed: set[tuple[int, int]]) -> int:
        """Free pages that a branch needs, beside those of the views that will be computed for others anyway."""
        pages = self.pool.pages_for(branch.end) - branch.fork // self.pool.page_size
        key = (id(views), branch.agent)
        if views.cached[branch.agent] is None and key not in computed:
            computed.add(key)
            pages += self.pool.pages_for(views.needed(branch.agent))
        return pages

    def _fitting(self) -> list[tuple[_Views, Branch]]:
        """The first branches for which there are pages."""
        chosen: list[tuple[_Views, Branch]] = []
        computed: set[tuple[int, int]] = set()
        free = self.pool.num_free
        for views in self.waiting:
            for branch in views.left:
                free -= self._pages(views, branch, computed)
                if free < 0 or len(chosen) == BATCH:
                    return chosen
                chosen.append((views, branch))
        return chosen

    def _first_alone(self) -> list[tuple[_Views, Branch]]:
        """The first branch, for which everything else is released."""
        first, branch = self.waiting[0], self.waiting[0].left[0]
        own = first.cached[branch.agent]
        first.cached[branch.agent] = None
        for views in self.waiting:
            self._release(views)
        first.cached[branch.agent] = own
        pages = self._pages(first, branch, set())
        if pages > self.pool.num_free:
            raise PagesError(
                f"a branch of {branch.end} tokens, read by the teacher, does not fit the K/V memory of "
                f"{self.pool.num_pages} pages of {self.pool.page_size}: raise rollout.kv_gib, or use "
                "--loss.teacher-placement trainer"
            )
        return [(first, branch)]

    def _score(self, chosen: Sequence[tuple[_Views, Branch]]) -> None:
        """Score branches for which there is room."""
        missing = {(views, b.agent): None for views, b in chosen if views.cached[b.agent] is None}
        if missing:
            made = [self.pool.new() for _ in missing]
            for (views, agent), sequence in zip(missing, made, strict=True):
                views.cached[agent] = sequence
            parts = [views.conversation.views[agent].tokens[: views.needed(agent)] for views, agent in missing]
            self.engine.extend(made, parts, [agent for _, agent in missing])
            self.statistics.repeated_tokens += sum(map(len, parts))
        branches = [branch for _, branch in chosen]
        sequences: list[Any] = [views.cached[branch.agent] for views, branch in chosen]
        found = self.engine.score(
            sequences,
            [branch.context for branch in branches],
            [branch.tokens for branch in branches],
            [branch.agent for branch in branches],
            lengths=[branch.fork for branch in branches],
        )
        for (views, branch), logp in zip(chosen, found, strict=True):
            branch.logp = tuple(logp.tolist())
            self.statistics.scored_tokens += branch.end - branch.fork
            assert views.left.popleft() is branch
        while self.waiting and not self.waiting[0].left:
            self._release(self.waiting.popleft())
