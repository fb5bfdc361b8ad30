"""What a turn's reward weighs in the loss: baselines, balance and normalization, per agent over the whole batch.

Kept apart from the loss itself (`coars_kernels.credit_policy_loss`), which only adds weighted turns: so micro-batches
add up to the same gradient however many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from coars_fast.data.records import TrainedTurn, Trajectory

Baseline = Literal["none", "batch", "turn", "group"]


def normalise(
    trajectories: Sequence[Trajectory], *, baseline: Baseline, num_episodes: int, group_size: int = 1
) -> list[Trajectory]:
    """Divide turn weights by the number of episodes (the expectation of Eq. 11) and subtract each agent's baseline.

    Args:
        trajectories: of the whole update, both agents.
        baseline: the weighted mean reward of the agent's turns (`batch`), of its n-th replies only (`turn`), of its
            n-th replies about the same task (`group`), or 0 (`none`), which leaves Eq. 11 as it is. Later turns are
            mostly misses: against one mean for all they only ever push down what was said, correct formats included.
        num_episodes: episodes of the update.
        group_size: so many episodes with consecutive numbers are about one task.
    """
    totals: dict[tuple[int, int, int], list[float]] = {}

    def key(trajectory: Trajectory, index: int) -> tuple[int, int, int]:
        """What a reply is compared with."""
        number = index if baseline in ("turn", "group") else 0
        return trajectory.agent, number, trajectory.episode // group_size if baseline == "group" else 0

    for trajectory in trajectories:
        for index, turn in enumerate(trajectory.turns):
            sums = totals.setdefault(key(trajectory, index), [0.0, 0.0])
            sums[0] += turn.weight
            sums[1] += turn.weight * turn.reward
    means = {k: reward / weight if weight and baseline != "none" else 0.0 for k, (weight, reward) in totals.items()}

    def scaled(turn: TrainedTurn, mean: float) -> TrainedTurn:
        return replace(turn, weight=turn.weight / num_episodes, reward=turn.reward - mean)

    return [
        replace(t, turns=tuple(scaled(turn, means[key(t, index)]) for index, turn in enumerate(t.turns)))
        for t in trajectories
    ]
