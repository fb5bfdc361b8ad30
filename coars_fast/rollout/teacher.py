"""The teacher's log-probs from the rollout engine: scored as conversations end, under the weights that spoke.

    scores = TeacherScores(config.game)
    play(decoder, episodes, ..., branches=scores)
    turns = scores.add_to(trajectories(episodes, config.game))

At the weights of the rollout they are those of the two-stream step (`loss.teacher_placement trainer`), which computes
its teacher at each update's own weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coars_fast.config import GameConfig
from coars_fast.data.records import Trajectory
from coars_fast.game.episode import Episode
from coars_fast.game.trajectory import trajectories
from coars_fast.rollout.scoring import Branch


class TeacherScores:
    """Branches of the episodes of one rollout.

    Args:
        game: its references must depend on their own episode alone.
    """

    def __init__(self, game: GameConfig):
        self.game = game
        self._found: dict[tuple[int, int], list[Branch]] = {}
        """By episode and agent."""

    def __call__(self, number: int, episode: Episode) -> list[Branch]:
        """The branches of an episode that is over."""
        for found in trajectories([episode], self.game):
            self._found[number, found.agent] = [
                Branch(found.agent, turn.fork, turn.reference, found.tokens[turn.start : turn.end])
                for turn in found.turns
            ]
        return [branch for agent in (0, 1) for branch in self._found.get((number, agent), ())]

    def add_to(self, found: Sequence[Trajectory]) -> list[Trajectory]:
        """The trajectories of the same episodes with the teacher's log-probs."""
        return [
            replace(t, teacher_logp=tuple(p for branch in self._found[t.episode, t.agent] for p in branch.logp))
            for t in found
        ]
