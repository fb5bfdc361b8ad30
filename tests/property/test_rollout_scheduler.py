"""The scheduler over random conversations and memories: every one ends as it would alone, and no page is lost.

The model is a fake that stores tokens where keys and values would be: at each pass it checks that what is cached is
what the agent has seen. 10,000 random runs: `pytest -m slow tests/property/test_rollout_scheduler.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coars_fast.errors import ConfigError, PagesError
from coars_fast.game.episode import Reply
from coars_fast.rollout.pages import CachedSequence, PagePool
from coars_fast.rollout.sampling import PartialReply, Sampling
from coars_fast.rollout.scheduler import Scheduler, check_conversations
from coars_fast.rollout.scoring import BATCH, Branch
from coars_fast.rollout.statistics import Statistics

CONTROL = frozenset({0, 1})
VOCABULARY = 12
MOST_STEPS = 5


def mixed(*numbers: int) -> int:
    """A number that looks random, from others."""
    word = 0x9E3779B9
    for number in numbers:
        word = ((word ^ (number & 0xFFFFFFFF)) * 0x85EBCA6B + 0xC2B2AE35) & 0xFFFFFFFF
        word ^= word >> 13
    return word


@dataclass
class View:
    tokens: list[int]


@dataclass
class Talk:
    """A conversation that goes on as its replies' tokens say: invalid ones, early ends, messages of any length."""

    prompts: tuple[list[int], list[int]]
    max_turns: int
    message: int
    """Most tokens of what is added to a view beside replies."""
    waiting: int | None = 0
    turn: int = 0
    views: tuple[View, View] = field(init=False)
    said: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.views = (View(list(self.prompts[0])), View(list(self.prompts[1])))

    def is_valid(self, reply: Reply) -> bool:
        return mixed(*reply.ids) % 3 > 0

    def receive(self, reply: Reply) -> None:
        agent = self.waiting
        assert agent is not None and reply.ids and CONTROL.isdisjoint(reply.ids[:-1])
        self.said.append((agent, reply.ids))
        self.views[agent].tokens.extend([*reply.ids, *self._words(1)])
        if agent == 0 and self.is_valid(reply):
            self.views[1].tokens.extend([*reply.ids, *self._words(2)])
            self.waiting = 1
            return
        self.turn += 1
        self.waiting = None if self.turn == self.max_turns or mixed(7, *reply.ids) % 5 == 0 else 0
        if self.waiting is not None:
            self.views[0].tokens.extend(self._words(3))

    def _words(self, seed: int) -> list[int]:
        """One to `message` tokens."""
        return [2 + mixed(seed, self.turn, i) % 10 for i in range(1 + mixed(seed, self.turn) % self.message)]

    def longest_views(self, max_reply_tokens: int) -> tuple[int, int]:
        own, heard = max_reply_tokens + self.message, max_reply_tokens + self.message
        rec, user = (len(view.tokens) for view in self.views)
        return rec + self.max_turns * (own + heard), user + self.max_turns * (own + heard)


def token_at(noise_id: int, position: int) -> int:
    """What the fake model draws: a function of the reply's noise and the place, as with counter-based noise."""
    return mixed(noise_id, position) % VOCABULARY


class FakeEngine:
    """Writes tokens into pages and reads them back before each use."""

    def __init__(self, num_pages: int, page_size: int):
        self.pool = PagePool(
            num_pages=num_pages, page_size=page_size, num_layers=1, num_kv_heads=1, head_dim=1,
            dtype=torch.float32, device=torch.device("cpu"),
        )  # fmt: skip
        self.memory = self.pool.kv[0, :, :, :, 0].numpy()
        self.passes = 0

    def _place(self, sequence: CachedSequence, position: int) -> tuple[int, int]:
        return sequence.pages[position // self.pool.page_size], position % self.pool.page_size

    def _write(self, sequence: CachedSequence, token: int, agent: int) -> None:
        page, slot = self._place(sequence, sequence.length)
        assert self.pool._owners[page] == 1, "a shared page is written"
        self.memory[page, :, slot] = token, agent
        sequence.length += 1

    def _check(self, sequence: CachedSequence, seen: Sequence[int], agent: int) -> None:
        self.pool.require(sequence)
        for position in range(sequence.length):
            page, slot = self._place(sequence, position)
            assert tuple(self.memory[page, :, slot]) == (seen[position], agent), "cached tokens were changed"

    def extend(self, sequences: Sequence[CachedSequence], tokens: Sequence[Sequence[int]], agents: Sequence[int]):
        assert sequences and len({id(s) for s in sequences}) == len(sequences)
        for sequence, part, agent in zip(sequences, tokens, agents, strict=True):
            assert part, "extended by nothing"
            self.pool.grow(sequence, sequence.length + len(part))
            for token in part:
                self._write(sequence, token, agent)

    def score(
        self,
        sequences: Sequence[CachedSequence],
        contexts: Sequence[Sequence[int]],
        tokens: Sequence[Sequence[int]],
        agents: Sequence[int],
        *,
        lengths: Sequence[int] | None = None,
    ) -> list[torch.Tensor]:
        """What the cached tokens before each branch add up to, in the place of log-probs."""
        assert lengths is not None and len(sequences) <= BATCH
        found, forks = [], []
        for sequence, context, part, agent, length in zip(sequences, contexts, tokens, agents, lengths, strict=True):
            fork = self.pool.fork(sequence, length)
            forks.append(fork)
            self.pool.grow(fork, length + len(context) + len(part) - 1)
            read = [self._place(fork, position) for position in range(length)]
            assert all(self.memory[page, 1, slot] == agent for page, slot in read)
            total = sum(self.memory[page, 0, slot] * (i + 1) for i, (page, slot) in enumerate(read))
            for token in (*context, *part[:-1]):
                self._write(fork, token, agent)
            found.append(torch.full((len(part),), float(total)))
        for fork in forks:
            self.pool.release(fork)
        return found

    def decode(
        self, replies: Sequence[PartialReply], sampling: Sampling, *, until: int | None = None
    ) -> tuple[int, int]:
        self.passes += 1
        assert self.passes < 10_000, "no end"
        assert len({id(reply.sequence) for reply in replies}) == len(replies)
        self.pool.check([reply.sequence for reply in replies])
        for reply in replies:
            assert not reply.over
            assert not self.pool.pages_to_grow(reply.sequence, reply.longest), "no pages for the whole turn"
            self._check(reply.sequence, [*reply.view, *reply.ids], reply.agent)
            if not reply.ids:
                assert reply.sequence.length < len(reply.view)
                for token in reply.view[reply.sequence.length :]:
                    self._write(reply.sequence, token, reply.agent)
                reply.take(token_at(reply.noise_id, len(reply.view)), -0.5, sampling.control)
        steps = worked = 0
        while steps < MOST_STEPS and sum(reply.over for reply in replies) < (until or len(replies)):
            steps += 1
            for reply in replies:
                if not reply.over:
                    worked += 1
                    self._write(reply.sequence, reply.ids[-1], reply.agent)
                    position = len(reply.view) + len(reply.ids)
                    reply.take(token_at(reply.noise_id, position), -0.5, sampling.control)
        return steps, worked


def noise_id(number: int, agent: int, attempt: int) -> int:
    return (number * 2 + agent) * 2 + attempt


def alone(talk: Talk, number: int, limit: int, resample: bool) -> list[tuple[int, tuple[int, ...]]]:
    """What a conversation says when nobody schedules it."""
    while talk.waiting is not None:
        agent = talk.waiting
        for attempt in (0, 1):
            ids: list[int] = []
            while not ids or (ids[-1] not in CONTROL and len(ids) < limit):
                start = len(talk.views[agent].tokens)
                ids.append(token_at(noise_id(number, agent, attempt), start + len(ids)))
            reply = Reply(tuple(ids), (-0.5,) * len(ids))
            if attempt or not resample or talk.is_valid(reply):
                break
        talk.receive(reply)
    return talk.said


@dataclass
class Case:
    prompts: list[tuple[list[int], list[int]]]
    max_turns: int
    message: int
    limit: int
    page_size: int
    spare: int
    """Pages beyond what the longest turn needs."""
    batch_size: int
    resample: bool
    branches: int = 0
    """Of each agent who spoke."""

    def talks(self) -> list[Talk]:
        return [Talk(prompts, self.max_turns, self.message) for prompts in self.prompts]

    def num_pages(self) -> int:
        longest = max(max(talk.longest_views(self.limit)) for talk in self.talks())
        if self.branches:  # the last branch shares the full pages of its view and no more
            longest += 2 * (self.page_size + self.limit + self.message)
        return -(-longest // self.page_size) + self.spare


prompt = st.lists(st.integers(2, 11), min_size=1, max_size=24)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Conversations in groups, whose prompts begin alike or are the same, and a memory from just enough to plenty."""
    opening = draw(st.lists(st.integers(2, 11), max_size=12))
    pairs: list[tuple[list[int], list[int]]] = []
    for _ in range(draw(st.integers(1, 4))):
        rec, user = draw(prompt), draw(st.lists(st.integers(2, 11), max_size=20))
        pairs += [([*opening, *rec], [*opening, *user])] * draw(st.integers(1, 3))
    return Case(
        prompts=pairs,
        max_turns=draw(st.integers(1, 4)),
        message=draw(st.integers(1, 6)),
        limit=draw(st.integers(1, 9)),
        page_size=draw(st.integers(1, 6)),
        spare=draw(st.one_of(st.just(0), st.integers(0, 60))),
        batch_size=draw(st.integers(1, 12)),
        resample=draw(st.booleans()),
        branches=draw(st.integers(0, 3)),
    )


def scheduler(case: Case, talks: list[Talk], engine: FakeEngine, **options: Any) -> Scheduler:
    return Scheduler(
        engine,
        talks,
        sampling=Sampling(seed=0, control=CONTROL),
        temperature=1.0,
        max_reply_tokens=case.limit,
        batch_size=case.batch_size,
        noise_id=noise_id,
        resample_invalid=case.resample,
        **options,
    )


def run(case: Case) -> tuple[list[Talk], FakeEngine, Statistics]:
    talks, engine = case.talks(), FakeEngine(case.num_pages(), case.page_size)
    check_conversations(talks, engine.pool, 10_000, case.limit)
    asked: list[tuple[Talk, Branch]] = []

    def branches(number: int, talk: Talk) -> list[Branch]:
        """Contexts after the first, the second, ... reply of each agent."""
        assert talks[number] is talk and talk.waiting is None
        found = []
        for agent, view in enumerate(talk.views):
            if any(speaker == agent for speaker, _ in talk.said):
                starts = range(len(talk.prompts[agent]), 0, -1)[: case.branches]
                context = [2] * (1 + number % case.message)
                found += [Branch(agent, fork, context, view.tokens[fork:][: case.limit]) for fork in starts]
        asked.extend((talk, branch) for branch in found)
        return found

    options: dict[str, Any] = {"branches": branches} if case.branches else {}
    found = scheduler(case, talks, engine, watch=lambda figures: engine.pool.check(), **options).run()
    for talk, branch in asked:
        seen = talk.views[branch.agent].tokens[: branch.fork]
        assert branch.logp == (float(sum(token * (i + 1) for i, token in enumerate(seen))),) * len(branch.tokens)
    assert found.scored_tokens == sum(branch.end - branch.fork for _, branch in asked)
    return talks, engine, found


def holds(case: Case) -> None:
    talks, engine, figures = run(case)
    engine.pool.check()
    assert engine.pool.num_used == 0, "a page is not given back"
    assert figures.done == len(talks) and all(talk.waiting is None for talk in talks)
    for number, (talk, other) in enumerate(zip(talks, case.talks(), strict=True)):
        assert talk.said == alone(other, number, case.limit, case.resample)
        for view, agent in zip(talk.views, (0, 1), strict=True):
            prompt = talk.prompts[agent]
            assert view.tokens[: len(prompt)] == prompt
    said = sum(len(ids) for talk in talks for _, ids in talk.said)
    assert figures.sampled_tokens >= said and (case.resample or figures.sampled_tokens == said)
    assert figures.most_pages_in_use <= figures.num_pages


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_every_conversation_ends_as_it_would_alone(case: Case) -> None:
    holds(case)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_every_conversation_ends_as_it_would_alone_10_000_times(case: Case) -> None:
    holds(case)


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(1, 5))
def test_what_can_never_fit_is_refused_before_any_work(case: Case, too_few: int) -> None:
    case = replace(case, branches=0)
    talks = case.talks()
    longest = max(max(talk.longest_views(case.limit)) for talk in talks)
    num_pages = case.num_pages() - case.spare - too_few
    if num_pages < 1:
        return
    pool = FakeEngine(num_pages, case.page_size).pool
    with pytest.raises(ConfigError, match=rf"up to \d+ tokens does not fit .* of {num_pages * case.page_size} tokens"):
        check_conversations(talks, pool, 10_000, case.limit)
    with pytest.raises(ConfigError, match=rf"up to {longest} tokens does not fit the model's {longest - 1} positions"):
        check_conversations(talks, FakeEngine(case.num_pages(), case.page_size).pool, longest - 1, case.limit)
    assert pool.num_used == 0


def plenty(**changes) -> Case:
    fields = dict(
        prompts=[([2, 3, 4] * 10, [5, 6] * 10)] * 6, max_turns=3, message=3, limit=6, page_size=4, spare=200,
        batch_size=6, resample=False,
    )  # fmt: skip
    return Case(**(fields | changes))


def test_a_common_prompt_is_computed_once() -> None:
    _, _, figures = run(plenty())
    alone = plenty(prompts=[([2, 3, 4] * 10, [5, 6] * 10)])
    _, _, single = run(alone)
    assert figures.shared_tokens >= 5 * 29
    assert figures.extended_tokens < 6 * single.extended_tokens - 5 * 29


def test_nothing_is_computed_twice_where_there_is_room_for_all() -> None:
    assert run(plenty())[2].repeated_tokens == 0
    assert run(plenty(spare=0))[2].repeated_tokens > 0


def test_an_empty_prompt_is_refused() -> None:
    pool = FakeEngine(50, 4).pool
    with pytest.raises(ConfigError, match="episode 1: its prompt is empty"):
        check_conversations([Talk(([2], []), 1, 1), Talk(([], []), 1, 1)], pool, 100, 4)


def test_a_branch_that_can_never_fit_is_an_error() -> None:
    case = plenty(prompts=[([2] * 10, [3] * 10)], page_size=1)
    talks = case.talks()
    longest = max(max(talk.longest_views(case.limit)) for talk in talks)
    engine = FakeEngine(longest, case.page_size)
    branches = lambda number, talk: [Branch(0, 10, [2] * longest, [3])]  # noqa: E731
    with pytest.raises(PagesError, match=rf"a branch of {longest + 10} tokens.* does not fit"):
        scheduler(case, talks, engine, branches=branches).run()
    assert engine.pool.num_used == 0


def test_pages_are_given_back_when_a_run_is_broken_off() -> None:
    case = plenty()
    talks, engine = case.talks(), FakeEngine(case.num_pages(), case.page_size)

    def stop(figures: Statistics) -> None:
        if figures.blocks == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scheduler(case, talks, engine, watch=stop).run()
    engine.pool.check()
    assert engine.pool.num_used == 0
