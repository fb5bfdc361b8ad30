"""Rewards of a turn, worked out by hand from Eq. 7 and 8."""

from __future__ import annotations

from typing import Any

import pytest

from coars_fast.config import Config, GameConfig, LossConfig
from coars_fast.config_checks import check
from coars_fast.errors import ConfigError
from coars_fast.game.prompts import Judgement
from coars_fast.game.rewards import (
    TurnReward,
    recommender_reward,
    reward_turn,
    stage_sensitivity,
    user_reward,
)
from tests.game_pieces import an_episode, judge, recommend, say


def turn(**changes: Any) -> TurnReward:
    """A rejected miss in turn 2 of 5, unless told otherwise."""
    given: dict[str, Any] = {
        "hit": False, "rec_valid": True, "judgement": judged("dislike", 0.2), "user_spoke": True, "turn": 2,
        "max_turns": 5, "stage": "asym", "peer_similarity": 0.0, "alpha": 0.1, "exclude": "recommender",
    }  # fmt: skip
    return reward_turn(**(given | changes))


def judged(action: str, score: float) -> Judgement:
    return Judgement(action=action, score=score, clamped=False)


@pytest.mark.parametrize(
    ("kind", "hit", "expected"),
    [
        # T = 5, so (t-1)/(T-1) is 0, .25, .5, .75, 1.
        ("asym", True, [1.0, 0.875, 0.75, 0.625, 0.5]),
        ("asym", False, [0.5, 0.625, 0.75, 0.875, 1.0]),
        ("linear", True, [1.0, 0.875, 0.75, 0.625, 0.5]),
        ("linear", False, [1.0, 0.875, 0.75, 0.625, 0.5]),
        # 1/log2(2), 1/log2(3), 1/log2(4), 1/log2(5), 1/log2(6)
        ("log", True, [1.0, 0.630930, 0.5, 0.430677, 0.386853]),
        ("log", False, [1.0, 0.630930, 0.5, 0.430677, 0.386853]),
        ("none", True, [1.0] * 5),
        ("none", False, [1.0] * 5),
    ],
)
def test_stage_sensitivity_over_five_turns(kind: Any, hit: bool, expected: list[float]) -> None:
    found = [stage_sensitivity(kind, hit=hit, turn=t, max_turns=5) for t in range(1, 6)]
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["asym", "linear", "log", "none"])
@pytest.mark.parametrize("hit", [True, False])
def test_stage_sensitivity_of_a_single_turn_is_one(kind: Any, hit: bool) -> None:
    assert stage_sensitivity(kind, hit=hit, turn=1, max_turns=1) == 1.0


@pytest.mark.parametrize(
    ("hit", "score", "stage", "expected"),
    [
        (True, 1.0, 1.0, 1.0),
        (True, 0.0, 1.0, 0.5),
        (True, 0.9, 0.5, 0.475),  # (.5 + .45) * .5
        (False, 0.0, 1.0, -0.5),
        (False, 1.0, 1.0, -1.0),
        (False, 0.2, 0.625, -0.375),  # -(.5 + .1) * .625
        (False, 0.6, 0.5, -0.4),  # -(.5 + .3) * .5
    ],
)
def test_recommender_reward_of_equation_7(hit: bool, score: float, stage: float, expected: float) -> None:
    assert recommender_reward(hit=hit, score=score, stage=stage) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("hit", "score", "q", "expected"),
    [
        # alpha = .1; 2s-1 = .8
        (True, 0.9, 0.0, 0.8),
        (True, 0.9, 1.0, 0.736),  # .8 * (1 - .08)
        (True, 0.9, 0.5, 0.768),  # .8 * (1 - .04)
        (True, 0.9, -1.0, 0.864),  # .8 * (1 + .08)
        (False, 0.9, 1.0, -0.736),
        (False, 0.9, -1.0, -0.864),
        # 2s-1 = -.6
        (True, 0.2, 0.0, -0.6),
        (True, 0.2, 1.0, -0.636),  # -.6 * (1 + .06)
        (True, 0.2, 0.5, -0.618),  # -.6 * (1 + .03)
        (True, 0.2, -1.0, -0.564),  # -.6 * (1 - .06)
        (False, 0.2, 0.5, 0.618),
        (False, 0.2, -1.0, 0.564),
        # undecided: nothing to gain
        (True, 0.5, 1.0, 0.0),
        (False, 0.5, -1.0, 0.0),
    ],
)
def test_user_reward_of_equation_8(hit: bool, score: float, q: float, expected: float) -> None:
    assert user_reward(hit=hit, score=score, peer_similarity=q, alpha=0.1) == pytest.approx(expected)


def test_alpha_of_zero_forgets_the_peers() -> None:
    assert user_reward(hit=True, score=0.9, peer_similarity=1.0, alpha=0.0) == pytest.approx(0.8)


def test_an_accepted_hit() -> None:
    # D = 1 - .5 * .25 = .875; .95 * .875 = .83125; .8 * (1 - .1 * .5 * .8) = .768
    found = turn(hit=True, judgement=judged("click", 0.9), peer_similarity=0.5)
    assert (found.rec, found.user, found.excluded) == (pytest.approx(0.83125), pytest.approx(0.768), False)


def test_a_rejected_hit_still_pays_the_recommender() -> None:
    # D = .875; (.5 + .1) * .875 = .525; -.6 * (1 + .1 * .5 * .6) = -.618
    found = turn(hit=True, judgement=judged("dislike", 0.2), peer_similarity=0.5)
    assert (found.rec, found.user, found.excluded) == (pytest.approx(0.525), pytest.approx(-0.618), False)


def test_a_rejected_miss() -> None:
    # D = .5 + .5 * .25 = .625; -(.5 + .1) * .625 = -.375; -1 * -.6 * (1 + .1 * .5 * .6) = .618
    found = turn(peer_similarity=0.5)
    assert (found.rec, found.user, found.excluded) == (pytest.approx(-0.375), pytest.approx(0.618), False)


@pytest.mark.parametrize("stage", ["asym", "linear", "log", "none"])
def test_the_stage_scales_the_recommender_alone(stage: Any) -> None:
    # s = .2 in turn 2 of 5: -.6 * D, D from the table above
    weight = {"asym": 0.625, "linear": 0.875, "log": 0.630930, "none": 1.0}[stage]
    found = turn(stage=stage)
    assert (found.rec, found.user) == (pytest.approx(-0.6 * weight, abs=1e-6), pytest.approx(0.6))


@pytest.mark.parametrize(
    ("exclude", "rec", "user"),
    # s = .6: D = .625, -(.5 + .3) * .625 = -.5; -1 * .2 * (1 - .1 * 1 * .2) = -.196
    [("recommender", None, -0.196), ("both", None, None), ("none", -0.5, -0.196)],
)
def test_an_accepted_miss_is_excluded_as_set_and_always_reported(
    exclude: Any, rec: float | None, user: float | None
) -> None:
    found = turn(judgement=judged("star", 0.6), peer_similarity=1.0, exclude=exclude)
    assert found.rec == (None if rec is None else pytest.approx(rec))
    assert found.user == (None if user is None else pytest.approx(user))
    assert found.excluded


@pytest.mark.parametrize(("score", "excluded"), [(0.5, True), (0.4999, False)])
def test_a_score_of_one_half_is_an_acceptance(score: float, excluded: bool) -> None:
    assert turn(judgement=judged("star", score), exclude="both").excluded is excluded


@pytest.mark.parametrize("exclude", ["recommender", "both", "none"])
def test_an_invalid_recommendation_costs_one_whatever_the_turn_and_is_never_excluded(exclude: Any) -> None:
    for number in (1, 2, 3):
        found = turn(rec_valid=False, judgement=None, user_spoke=False, exclude=exclude, turn=number)
        assert (found.rec, found.user, found.excluded) == (-1.0, None, False)  # the user does not speak


@pytest.mark.parametrize("exclude", ["recommender", "both", "none"])
@pytest.mark.parametrize(
    ("hit", "rec"),
    # hit: D = .875, .75 * .875 = .65625; miss: D = .625, -.75 * .625 = -.46875
    [(True, 0.65625), (False, -0.46875)],
)
def test_an_invalid_judgement_costs_the_user_one_and_leaves_the_recommender_half_a_score(
    hit: bool, rec: float, exclude: Any
) -> None:
    found = turn(hit=hit, judgement=None, peer_similarity=1.0, exclude=exclude)
    assert (found.rec, found.user, found.excluded) == (pytest.approx(rec), -1.0, False)


# ------------------------------------------------------------------------------------------------------------ controls


def rewards_of(kind: Any, *replies: str, **game: Any) -> list[TurnReward]:
    """Rewards of an episode's turns when these replies were given; the truth is Delta."""
    episode = an_episode(GameConfig(rewards=kind, **{"max_turns": 2} | game))
    for text in replies:
        episode.receive(say(episode, text))
    assert episode.waiting is None
    return [turn.reward for turn in episode.turns if turn.reward is not None]


MISS_THEN_HIT = (recommend("Gamma"), judge("star", "0.60"), recommend("Delta"), judge("skip", "0.30"))


def test_outcome_pays_the_last_recommendation_in_every_turn_and_the_label_in_its_own() -> None:
    # An accepted miss is excluded from the recommender's coupled reward; here it earns what the episode does.
    first, second = rewards_of("outcome", *MISS_THEN_HIT)
    assert (first.rec, first.user, first.excluded) == (1.0, -1.0, True)
    assert (second.rec, second.user, second.excluded) == (1.0, -1.0, False)
    first, second = rewards_of(
        "outcome", recommend("Omega"), judge("dislike", "0.10"), recommend("Gamma"), judge("click", "0.90")
    )
    assert [(r.rec, r.user) for r in (first, second)] == [(-1.0, 1.0), (-1.0, -1.0)]
    (only,) = rewards_of("outcome", recommend("Delta"), judge("click", "0.90"))
    assert (only.rec, only.user) == (1.0, 1.0)


def test_invalid_replies_lose_under_outcome_too() -> None:
    first, second = rewards_of("outcome", "no item", recommend("Delta"), "no action")
    assert (first.rec, first.user) == (-1.0, None)  # though the episode ends well
    assert (second.rec, second.user) == (1.0, -1.0)


def test_without_rewards_every_turn_earns_nothing_and_exclusion_stays() -> None:
    assert [(r.rec, r.user) for r in rewards_of("none", *MISS_THEN_HIT)] == [(None, 0.0), (0.0, 0.0)]
    kept = rewards_of("none", *MISS_THEN_HIT, exclude_accepted_misses="none")
    assert [(r.rec, r.user) for r in kept] == [(0.0, 0.0)] * 2
    assert [(r.rec, r.user) for r in rewards_of("none", "no item", "no item")] == [(0.0, None)] * 2


def test_rewards_for_the_form_are_those_of_invalid_replies_alone() -> None:
    assert [(r.rec, r.user) for r in rewards_of("form", *MISS_THEN_HIT)] == [(None, 0.0), (0.0, 0.0)]
    found = rewards_of("form", "no item", recommend("Delta"), "no action")
    assert [(r.rec, r.user) for r in found] == [(-1.0, None), (0.0, -1.0)]


def test_coupled_rewards_are_those_of_the_turns() -> None:
    first, second = rewards_of("coupled", *MISS_THEN_HIT, stage="none", alpha=0.0)
    assert (first.rec, first.user) == (None, pytest.approx(-0.2))
    assert (second.rec, second.user) == (pytest.approx(0.65), pytest.approx(-0.4))


def test_no_rewards_and_no_credit_are_refused() -> None:
    for kind in ("form", "none"):
        with pytest.raises(ConfigError, match=f"^game.rewards: {kind} .* loss.credit_weight is 0"):
            check(Config(game=GameConfig(rewards=kind), loss=LossConfig(credit_weight=0.0)))
