"""Baselines and weights over a whole update, by hand."""

from __future__ import annotations

import pytest

from coars_fast.data.records import TrainedTurn, Trajectory
from coars_fast.learn.objective import Baseline, normalise


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


TWO_TURNS = [
    trajectory(0, (1.0, 1.0), (-1.0, 1.0)),
    trajectory(1, (0.5, 2.0), (-0.5, 1.0)),
    trajectory(0, (0.2, 3.0), (-0.4, 1.0), episode=1),
    trajectory(1, (-0.25, 2.0), (0.1, 2.0), episode=1),
]


def test_the_turn_baseline_is_the_weighted_mean_of_an_agents_replies_of_the_same_number() -> None:
    # recommender: first (1 + 3 * .2) / 4 = .4, second (-1 - .4) / 2 = -.7
    # user: first (2 * .5 - 2 * .25) / 4 = .125, second (-.5 + 2 * .1) / 3 = -.1
    found = normalise(TWO_TURNS, baseline="turn", num_episodes=2)
    assert rewards(found) == pytest.approx([0.6, -0.3, 0.375, -0.4, -0.2, 0.3, -0.375, 0.2])
    assert weights(found) == pytest.approx([w / 2 for w in weights(TWO_TURNS)])
    # One mean for all, (1 - 1 + .6 - .4) / 6 = .2 / 6, pushes both second replies of the recommender down.
    together = normalise(TWO_TURNS, baseline="batch", num_episodes=2)
    assert rewards(together)[0:2] == pytest.approx([1 - 0.2 / 6, -1 - 0.2 / 6])
    assert rewards(together)[5] == pytest.approx(-0.4 - 0.2 / 6)


def test_the_group_baseline_compares_replies_about_one_task() -> None:
    # Episodes 0 and 1 are one task, 2 and 3 another. Of the second task's first replies one is excluded.
    episodes = [
        trajectory(0, (1.0, 1.0), (-1.0, 1.0)),
        trajectory(0, (0.0, 1.0), (0.0, 1.0), episode=1),
        trajectory(0, (0.5, 1.0), episode=2),
        trajectory(0, (7.0, 0.0), (0.25, 1.0), episode=3),
    ]
    found = normalise(episodes, baseline="group", num_episodes=4, group_size=2)
    assert rewards(found) == pytest.approx([0.5, -0.5, -0.5, 0.5, 0.0, 6.5, 0.0])


def test_the_turn_baseline_leaves_excluded_turns_out_and_shorter_conversations_have_their_first_replies_in() -> None:
    # recommender: (1 + .25) / 2 = .625, -.5 alone, and no counted third reply; user: (2 * .2 - .5 * .4) / 2.5, .8 alone
    found = normalise(BATCH, baseline="turn", num_episodes=2)
    assert rewards(found) == pytest.approx([0.375, 0.0, 9.0, 0.12, -0.375, -0.48, 0.0])


@pytest.mark.parametrize("baseline", ["batch", "turn"])
def test_an_agent_whose_turns_are_all_excluded_keeps_finite_rewards(baseline: Baseline) -> None:
    found = normalise([trajectory(1, (-1.0, 0.0))], baseline=baseline, num_episodes=1)
    assert rewards(found) == [-1.0] and weights(found) == [0.0]


@pytest.mark.parametrize("baseline", ["none", "batch", "turn"])
def test_everything_else_is_left_alone(baseline: Baseline) -> None:
    found = normalise(BATCH, baseline=baseline, num_episodes=3)
    assert [(t.episode, t.agent, t.tokens, t.behaviour_logp) for t in found] == [
        (t.episode, t.agent, t.tokens, t.behaviour_logp) for t in BATCH
    ]
