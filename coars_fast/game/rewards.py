"""Interaction rewards of both agents (CoARS Eq. 7 and 8), stage sensitivity D_t and the exclusion rule; and what stands
in their place in controls.

What the public material leaves open is chosen here and marked so: D_t's shape, the value of an invalid reply, and that
the exclusion applies to the recommender's reward only (DESIGN section 1 says why).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from coars_fast.config import Excluded, Rewards, StageSensitivity
from coars_fast.game.prompts import Judgement

NEUTRAL_SCORE = 0.5
INVALID_REWARD = -1.0
"""Of a reply that cannot be parsed, either agent's: the worst that a turn can earn."""


def stage_sensitivity(kind: StageSensitivity, *, hit: bool, turn: int, max_turns: int) -> float:
    """D_t of Eq. 7 for turn `turn` (from 1) of at most `max_turns`. Our choice of shapes.

    `asym`: a hit counts 1 at the first turn and .5 at the last, a miss .5 and 1. `linear`: 1 down to .5 for both.
    `log`: 1 / log2(t + 1). `none`: 1. With a single turn D is 1.
    """
    if max_turns == 1 or kind == "none":
        return 1.0
    progress = (turn - 1) / (max_turns - 1)
    if kind == "asym":
        return 1.0 - 0.5 * progress if hit else 0.5 + 0.5 * progress
    if kind == "linear":
        return 1.0 - 0.5 * progress
    return 1.0 / math.log2(turn + 1)


def recommender_reward(*, hit: bool, score: float, stage: float) -> float:
    """Eq. 7: (2 hit - 1)(.5 + .5 s) D_t, in [-1, 1]."""
    return (2 * hit - 1) * (0.5 + 0.5 * score) * stage


def user_reward(*, hit: bool, score: float, peer_similarity: float, alpha: float) -> float:
    """Eq. 8: (2 hit - 1)(2 s - 1)(1 - alpha q (2 s - 1))."""
    agreement = 2 * score - 1
    return (2 * hit - 1) * agreement * (1 - alpha * peer_similarity * agreement)


@dataclass(frozen=True)
class TurnReward:
    """Rewards of one turn; None: that agent has nothing to learn from it (excluded, or it did not speak)."""

    rec: float | None
    user: float | None
    excluded: bool
    """A wrong item was accepted (hit = 0, s >= .5): whatever the setting, this is reported."""


def reward_turn(
    *,
    hit: bool,
    rec_valid: bool,
    judgement: Judgement | None,
    user_spoke: bool,
    turn: int,
    max_turns: int,
    stage: StageSensitivity,
    peer_similarity: float,
    alpha: float,
    exclude: Excluded,
) -> TurnReward:
    """Both rewards of a turn.

    An invalid reply earns its agent -1: a recommender's is a miss, and the user does not speak; a user's leaves the
    recommender s = .5. Neither is an accepted miss, so neither is excluded.
    """
    score = judgement.score if judgement else NEUTRAL_SCORE
    weight = stage_sensitivity(stage, hit=hit, turn=turn, max_turns=max_turns)
    rec = recommender_reward(hit=hit, score=score, stage=weight) if rec_valid else INVALID_REWARD
    user = None
    if user_spoke:
        user = (
            INVALID_REWARD
            if judgement is None
            else user_reward(hit=hit, score=score, peer_similarity=peer_similarity, alpha=alpha)
        )
    excluded = rec_valid and not hit and judgement is not None and judgement.positive
    return TurnReward(
        rec=None if excluded and exclude in ("recommender", "both") else rec,
        user=None if excluded and exclude == "both" else user,
        excluded=excluded,
    )


def final_reward(
    coupled: TurnReward,
    kind: Rewards,
    *,
    hit: bool,
    solved: bool,
    rec_valid: bool,
    judgement: Judgement | None,
    user_spoke: bool,
) -> TurnReward:
    """What a turn has earned once its episode is over, by `game.rewards`. The controls are our choice.

    `coupled`: what it is. `outcome`: in each turn the recommender earns 1 if the episode's last recommendation was
    right (`solved`), else -1; the user agent 1 if it accepted the truth or turned down anything else, else -1. An
    invalid reply earns -1 here too; nothing is excluded. `form`: -1 of an invalid reply, 0 of others; `none`: 0 of all.
    What the exclusion rule leaves out stays left out under both, so that only the rewards are missing.
    """
    if kind == "coupled":
        return coupled
    if kind in ("form", "none"):
        invalid = INVALID_REWARD if kind == "form" else 0.0
        return replace(
            coupled,
            rec=None if coupled.rec is None else 0.0 if rec_valid else invalid,
            user=None if coupled.user is None else 0.0 if judgement is not None else invalid,
        )
    right = judgement is not None and judgement.positive == hit
    return replace(
        coupled,
        rec=1.0 if rec_valid and solved else -1.0,
        user=(1.0 if right else -1.0) if user_spoke else None,
    )
