"""What a turn's reward weighs in the loss: baselines, balance and normalization, per agent over the whole batch.

Kept apart from the loss itself (`coars_kernels.credit_policy_loss`), which only adds weighted turns: so micro-batches
add up to the same gradient however many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from coars_fast.data.records import TrainedTurn, Trajectory

Baseline = Literal["none", "batch"]


def normalise(trajectories: Sequence[Trajectory], *, baseline: Baseline, num_episodes: int) -> list[Trajectory]:
    """Divide turn weights by the number of episodes (the expectation of Eq. 11) and subtract each agent's baseline.

    Args:
        trajectories: of the whole update, both agents.
        baseline: `batch` subtracts the weighted mean reward of the agent's turns; `none` leaves Eq. 11 as it is.
        num_episodes: episodes of the update.
    """
    means: dict[int, float] = {}
    for agent in {trajectory.agent for trajectory in trajectories}:
        turns = [turn for t in trajectories if t.agent == agent for turn in t.turns]
        total = sum(turn.weight for turn in turns)
        mean = sum(turn.weight * turn.reward for turn in turns) / total if total else 0.0
        means[agent] = mean if baseline == "batch" else 0.0

    def scaled(turn: TrainedTurn, agent: int) -> TrainedTurn:
        return replace(turn, weight=turn.weight / num_episodes, reward=turn.reward - means[agent])

    return [replace(t, turns=tuple(scaled(turn, t.agent) for turn in t.turns)) for t in trajectories]
