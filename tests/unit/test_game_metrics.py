"""Figures of conversations from hand-made counts, and the bootstrap behind their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from coars_fast.config import GameConfig
from coars_fast.game.episode import Episode
from coars_fast.game.metrics import CONVERSATION, COUNTS, DISCRIMINATION, Resampler, Table, episode_counts, f1, table
from tests.game_pieces import an_episode, judge, recommend, say


def played(*replies: str, max_turns: int = 3) -> Episode:
    episode = an_episode(GameConfig(max_turns=max_turns))
    for text in replies:
        episode.receive(say(episode, text))
    assert episode.waiting is None
    return episode


FOUND = played(
    recommend("Gamma"), judge("star", "0.60"),  # accepted miss
    recommend("Gamma"), judge("dislike", "0.10"),  # repeated, rightly rejected
    recommend("Delta"), judge("click", "0.90"),
)  # fmt: skip
FIRST = played(recommend("Delta"), judge("click", "0.90"))
LOST = played(
    "Reason: none.",
    recommend("Delta"), "Action: none",  # a hit, judged wrongly by being unreadable
    "Reason: none.",
)  # fmt: skip
MISSED = played(recommend("Gamma"), "?", recommend("Omega"), judge("skip", "0.30"), max_turns=2)


def test_counts_of_single_episodes() -> None:
    def counts(**given: float) -> dict[str, float]:
        return {name: given.pop(name, 0.0) for name in COUNTS} | given

    assert episode_counts(FOUND) == counts(
        episodes=1, hits=1, turns=3, repeats=1, later_turns=2, rec_replies=3, user_replies=3,
        true_positives=1, false_positives=1, true_negatives=1, excluded=1,
    )  # fmt: skip
    assert episode_counts(FIRST) == counts(
        episodes=1, hits=1, first_hits=1, turns=1, rec_replies=1, user_replies=1, true_positives=1
    )
    # Two invalid recommendations are no repetition; the invalid judgement of a hit is a false negative.
    assert episode_counts(LOST) == counts(
        episodes=1, turns=3, later_turns=2, rec_replies=3, rec_invalid=2, user_replies=1, user_invalid=1,
        false_negatives=1,
    )  # fmt: skip
    # The invalid judgement of a miss is a false positive, and not an exclusion.
    assert episode_counts(MISSED) == counts(
        episodes=1, turns=2, later_turns=1, rec_replies=2, user_replies=2, user_invalid=1,
        false_positives=1, true_negatives=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hit@1", 2 / 4),
        ("hit@1_first_turn", 1 / 4),
        ("mean_turns", 9 / 4),
        ("repeat_rate", 1 / 5),
        ("user_f1", 4 / 7),  # 2 tp / (2 tp + fp + fn): tp 2, fp 2, fn 1
        ("user_precision", 2 / 4),
        ("user_recall", 2 / 3),
        ("acceptance", 4 / 7),
        ("false_positive_rate", 2 / 4),
        ("exclusion_rate", 1 / 9),
        ("parse_failure_rec", 2 / 9),
        ("parse_failure_user", 2 / 7),
    ],
)
def test_metrics_of_four_users(name: str, value: float) -> None:
    counts = table([episode_counts(episode) for episode in (FOUND, FIRST, LOST, MISSED)])
    interval = Resampler(4, 50, 0).interval(counts, CONVERSATION[name])
    assert interval["value"] == pytest.approx(value)
    assert interval["low"] <= interval["value"] <= interval["high"]


def judged_items(tp: float, fp: float, fn: float, tn: float) -> dict[str, float]:
    names = ("true_positives", "false_positives", "false_negatives", "true_negatives")
    return dict(zip(names, (tp, fp, fn, tn), strict=True)) | {"episodes": 1, "user_replies": tp + fp + fn + tn}


@pytest.mark.parametrize(("positives", "expected"), [(10, 0.6667), (5, 0.4), (2, 0.1818)])
def test_accepting_everything_scores_the_known_f1(positives: int, expected: float) -> None:
    counts = table([judged_items(positives, 20 - positives, 0, 0)] * 3)
    resampler = Resampler(3, 20, 0)
    assert resampler.interval(counts, DISCRIMINATION["user_f1_disc"])["value"] == pytest.approx(expected, abs=1e-4)
    assert resampler.interval(counts, DISCRIMINATION["acceptance_disc"])["value"] == 1.0


@pytest.mark.parametrize("counts", [judged_items(0, 0, 0, 20), judged_items(0, 0, 0, 0), judged_items(0, 0, 10, 10)])
def test_f1_without_a_true_positive_is_zero_and_not_nan(counts: dict[str, float]) -> None:
    with np.errstate(all="raise"):
        assert f1(table([counts])).tolist() == [0.0]
        assert DISCRIMINATION["user_precision_disc"](table([counts])).tolist() == [0.0]


def test_macro_f1_is_the_mean_over_users_and_micro_f1_is_not() -> None:
    cells = [(10, 0, 0, 10), (0, 10, 10, 0), (1, 0, 0, 0)]
    rows = [judged_items(*cell) | {"f1": own} for cell, own in zip(cells, (1.0, 0.0, 1.0), strict=True)]
    resampler = Resampler(3, 20, 0)
    assert resampler.interval(table(rows), DISCRIMINATION["user_f1_disc_macro"])["value"] == pytest.approx(2 / 3)
    assert resampler.interval(table(rows), DISCRIMINATION["user_f1_disc"])["value"] == pytest.approx(22 / 42)


def many_users(num_users: int, num_hits: int) -> Table:
    hits = np.zeros(num_users)
    hits[:num_hits] = 1
    return {"hits": hits, "episodes": np.ones(num_users)}


def test_the_interval_of_a_large_table_holds_the_value_and_has_the_width_of_theory() -> None:
    interval = Resampler(500, 2000, 0).interval(many_users(500, 200), CONVERSATION["hit@1"])
    assert interval["value"] == pytest.approx(0.4)
    # 1.96 * sqrt(.4 * .6 / 500) = .0429 on either side
    assert interval["value"] - interval["low"] == pytest.approx(0.0429, rel=0.15)
    assert interval["high"] - interval["value"] == pytest.approx(0.0429, rel=0.15)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another_one() -> None:
    counts = many_users(60, 20)
    first, again, other = (Resampler(60, 300, seed).interval(counts, CONVERSATION["hit@1"]) for seed in (1, 1, 2))
    assert first == again
    assert first["value"] == other["value"] and first != other


def test_a_table_differs_from_itself_by_exactly_nothing() -> None:
    counts = many_users(60, 20)
    assert Resampler(60, 300, 0).difference(counts, counts, CONVERSATION["hit@1"]) == {
        "value": 0.0, "low": 0.0, "high": 0.0,
    }  # fmt: skip


def test_a_difference_is_after_minus_before_and_paired_by_user() -> None:
    before, after = many_users(500, 200), many_users(500, 225)
    gain = Resampler(500, 2000, 0).difference(before, after, CONVERSATION["hit@1"])
    assert gain["value"] == pytest.approx(0.05)
    # Paired: 1.96 * sqrt(.05 * .95 / 500) = .019; unpaired it would be .061 and reach below zero.
    assert gain["low"] == pytest.approx(0.031, abs=0.004) and gain["high"] == pytest.approx(0.069, abs=0.004)
