"""Baselines and weights over a whole update, by hand."""

from __future__ import annotations

import pytest

from coars_fast.data.records import TrainedTurn, Trajectory
from coars_fast.learn.objective import normalise


def trajectory(agent: int, *turns: tuple[float, float], episode: int = 0) -> Trajectory:
    """Turns as (reward, weight)."""
    return Trajectory(
        episode=episode,
        agent=agent,
        tokens=tuple(range(10)),
        behaviour_logp=tuple(-1.0 for _ in turns),
        turns=tuple(
            TrainedTurn(fork=n + 1, start=n + 1, end=n + 2, reward=r, weight=w, reference=(0,))
            for n, (r, w) in enumerate(turns)
        ),
    )


BATCH = [
    trajectory(0, (1.0, 1.0), (-0.5, 1.0), (9.0, 0.0)),
    trajectory(1, (0.2, 2.0)),
    trajectory(0, (0.25, 1.0), episode=1),
    trajectory(1, (-0.4, 0.5), (0.8, 0.5), episode=1),
]


def rewards(found: list[Trajectory]) -> list[float]:
    return [turn.reward for t in found for turn in t.turns]


def weights(found: list[Trajectory]) -> list[float]:
    return [turn.weight for t in found for turn in t.turns]


def test_without_a_baseline_rewards_are_as_equation_11_has_them() -> None:
    found = normalise(BATCH, baseline="none", num_episodes=2)
    assert rewards(found) == rewards(BATCH)
    assert weights(found) == pytest.approx([w / 2 for w in weights(BATCH)])


def test_the_batch_baseline_is_each_agents_weighted_mean_without_excluded_turns() -> None:
    # recommender: (1 - .5 + .25) / 3 = .25; user: (2 * .2 + .5 * -.4 + .5 * .8) / 3 = .2
    found = normalise(BATCH, baseline="batch", num_episodes=2)
    assert rewards(found) == pytest.approx([0.75, -0.75, 8.75, 0.0, 0.0, -0.6, 0.6])
    for agent in (0, 1):
        turns = [turn for t in found if t.agent == agent for turn in t.turns]
        assert sum(turn.weight * turn.reward for turn in turns) == pytest.approx(0.0)


def test_an_agent_whose_turns_are_all_excluded_keeps_finite_rewards() -> None:
    found = normalise([trajectory(1, (-1.0, 0.0))], baseline="batch", num_episodes=1)
    assert rewards(found) == [-1.0] and weights(found) == [0.0]


def test_everything_else_is_left_alone() -> None:
    found = normalise(BATCH, baseline="batch", num_episodes=3)
    assert [(t.episode, t.agent, t.tokens, t.behaviour_logp) for t in found] == [
        (t.episode, t.agent, t.tokens, t.behaviour_logp) for t in BATCH
    ]
