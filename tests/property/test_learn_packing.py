"""Any trajectories: what is packed is what they hold, and the teacher's inputs are what a plain construction gives."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coars_fast.data.records import TrainedTurn, Trajectory
from coars_fast.learn.packing import Work, _balanced, check_budget, pack, split, teacher_inputs

TOKEN = st.integers(0, 99)


@st.composite
def trajectory(draw: st.DrawFn) -> Trajectory:
    """A context, then turns: header, reply, something after it."""
    tokens = draw(st.lists(TOKEN, min_size=1, max_size=6))
    turns, logp = [], []
    for _ in range(draw(st.integers(1, 4))):
        fork = len(tokens)
        header = draw(st.lists(TOKEN, max_size=2))
        reply = draw(st.lists(TOKEN, min_size=1, max_size=5))
        tokens += header
        start = len(tokens)
        tokens += reply
        reference = draw(st.lists(TOKEN, min_size=1 if not header else 0, max_size=6)) + header
        turns.append(
            TrainedTurn(
                fork=fork,
                start=start,
                end=len(tokens),
                reward=draw(st.floats(-1, 1, width=32)),
                weight=draw(st.floats(0, 2, width=32)),
                reference=tuple(reference),
            )
        )
        logp += draw(st.lists(st.floats(-9, 0, width=32), min_size=len(reply), max_size=len(reply)))
        tokens += draw(st.lists(TOKEN, max_size=3))
    return Trajectory(
        episode=draw(st.integers(0, 5)),
        agent=draw(st.integers(0, 1)),
        tokens=tuple(tokens),
        behaviour_logp=tuple(logp),
        turns=tuple(turns),
    )


TRAJECTORIES = st.lists(trajectory(), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(TRAJECTORIES)
def test_rows_predict_the_replies(found: list[Trajectory]) -> None:
    batch = pack(found)
    turns = [(t, turn) for t in found for turn in t.turns]
    assert batch.target.tolist() == [y for t, turn in turns for y in t.tokens[turn.start : turn.end]]
    assert torch.equal(batch.token_ids[batch.rows + 1], batch.target)
    sequence = torch.bucketize(batch.rows, batch.cu_seqlens[1:], right=True)
    assert torch.equal(torch.bucketize(batch.rows + 1, batch.cu_seqlens[1:], right=True), sequence)
    turn_of_row = torch.arange(len(turns)).repeat_interleave(batch.turn_offsets.diff().long())
    assert torch.equal(sequence, batch.branch_parent[turn_of_row])
    assert torch.equal(batch.agent_ids[batch.rows], batch.turn_agent[turn_of_row])
    assert batch.turn_reward.tolist() == [turn.reward for _, turn in turns]
    assert batch.turn_weight.tolist() == [turn.weight for _, turn in turns]
    assert batch.behaviour_logp.tolist() == [p for t in found for p in t.behaviour_logp]
    assert len(batch.token_ids) == sum(len(t.tokens) for t in found)


@settings(max_examples=60, deadline=None)
@given(TRAJECTORIES)
def test_the_teachers_inputs_are_context_then_branch(found: list[Trajectory]) -> None:
    batch, expected, agents, rows = pack(found), [], [], []
    for t in found:
        for turn in t.turns:
            reply = t.tokens[turn.start : turn.end]
            sequence = [*t.tokens[: turn.fork], *turn.reference, *reply]
            rows += [sum(map(len, expected)) + len(sequence) - len(reply) - 1 + n for n in range(len(reply))]
            expected.append(sequence[:-1])
            agents += [t.agent] * (len(sequence) - 1)
    inputs = teacher_inputs(batch)
    assert inputs.token_ids.tolist() == list(itertools.chain(*expected))
    assert inputs.position_ids.tolist() == [p for sequence in expected for p in range(len(sequence))]
    assert inputs.cu_seqlens.tolist() == [0, *itertools.accumulate(map(len, expected))]
    assert inputs.agent_ids.tolist() == agents
    assert inputs.rows.tolist() == rows


@settings(max_examples=60, deadline=None)
@given(TRAJECTORIES)
def test_branches_continue_the_positions_of_their_parents(found: list[Trajectory]) -> None:
    batch = pack(found)
    for m, (a, b) in enumerate(itertools.pairwise(batch.cu_branch.tolist())):
        start = int(batch.branch_start[m])
        assert batch.branch_positions[a:b].tolist() == list(range(start, start + b - a))
        mine = batch.teacher_rows[batch.turn_offsets[m] : batch.turn_offsets[m + 1]]
        assert mine.min() >= a and mine.max() == b - 1


@settings(max_examples=100, deadline=None)
@given(st.lists(trajectory(), min_size=1, max_size=12), st.integers(0, 120), st.floats(0, 0.1))
def test_micro_batches_hold_every_trajectory_once_within_the_budget(
    found: list[Trajectory], slack: int, attention: float
) -> None:
    largest, total = max(t.num_tokens for t in found), sum(t.num_tokens for t in found)
    budget = largest + slack
    work = Work(attention=attention)
    groups = split(found, budget, work)
    order = {id(t): index for index, t in enumerate(found)}
    indices = [[order[id(t)] for t in group] for group in groups]
    assert sorted(index for group in indices for index in group) == sorted(order[id(t)] for t in found)
    assert all(group == sorted(group) and group for group in indices)  # the order is kept, nothing is empty
    assert all(sum(t.num_tokens for t in group) <= budget for group in groups)
    assert len(groups) <= 2 * -(-total // budget)
    assert (len(groups) == 1) == (total <= budget)
    with pytest.raises(ValueError, match="train.max_tokens"):
        split(found, largest - 1, work)


@settings(max_examples=100, deadline=None)
@given(st.lists(trajectory(), min_size=2, max_size=12), st.integers(2, 4), st.floats(0, 0.1))
def test_with_room_the_dearest_part_is_at_most_the_mean_and_one_trajectory(
    found: list[Trajectory], parts: int, attention: float
) -> None:
    costs = [Work(attention=attention).cost(t) for t in found]
    groups = _balanced(found, costs, parts, 10**9)
    assert groups is not None and sorted(index for group in groups for index in group) == list(range(len(found)))
    spent = [sum(costs[index] for index in group) for group in groups]
    assert max(spent) <= sum(costs) / parts + max(costs) + 1e-6


@settings(max_examples=40, deadline=None)
@given(TRAJECTORIES)
def test_the_budget_covers_exactly_the_tokens_that_are_computed(found: list[Trajectory]) -> None:
    batch = pack(found)
    assert sum(t.num_tokens for t in found) == len(batch.token_ids) + len(batch.branch_tokens)


@settings(max_examples=60, deadline=None)
@given(TRAJECTORIES, st.integers(10, 60))
def test_leaving_out_takes_whole_episodes_and_only_those_over_the_budget(
    found: list[Trajectory], max_tokens: int
) -> None:
    over = {t.episode for t in found if t.num_tokens > max_tokens}
    if over and over == {t.episode for t in found}:
        with pytest.raises(ValueError, match="all episodes"):
            check_budget(found, max_tokens, drop=True)
        return
    kept, dropped = check_budget(found, max_tokens, drop=True)
    assert kept == [t for t in found if t.episode not in over] and dropped == len(over)
