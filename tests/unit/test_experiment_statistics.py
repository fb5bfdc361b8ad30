"""The two-level bootstrap: against a loop that does what it says, and on cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from coars_fast.experiments.statistics import TwoLevel, holm
from coars_fast.game.metrics import CONVERSATION, Table

HIT = CONVERSATION["hit@1"]


def table(hits: list[float]) -> Table:
    return {"hits": np.array(hits, dtype=float), "episodes": np.ones(len(hits))}


def test_it_draws_seeds_then_users_within_each() -> None:
    rng = np.random.default_rng(5)
    tables = [table((rng.random(n) < p).tolist()) for n, p in ((40, 0.2), (60, 0.5), (50, 0.9))]
    exact, resampled = TwoLevel((40, 60, 50), 4000).values(tables, HIT)
    assert exact == pytest.approx(np.mean([t["hits"].mean() for t in tables]))
    looped = []
    for _ in range(4000):
        drawn = [tables[i]["hits"] for i in rng.integers(3, size=3)]
        looped.append(np.mean([rng.choice(hits, len(hits)).mean() for hits in drawn]))
    # The spread is that of three seeds (.16), not that of 150 users (.03).
    assert resampled.mean() == pytest.approx(np.mean(looped), abs=0.02)
    assert np.percentile(resampled, [2.5, 97.5]) == pytest.approx(np.percentile(looped, [2.5, 97.5]), abs=0.03)


def test_pairs_share_users_and_seeds() -> None:
    rng = np.random.default_rng(6)
    theirs = [table((rng.random(80) < p).tolist()) for p in (0.1, 0.8)]
    ours = [table(np.maximum(t["hits"], np.arange(80) < 8).tolist()) for t in theirs]
    draws = TwoLevel((80, 80))
    found, alone = draws.difference(ours, theirs, HIT), draws.estimate(ours, HIT)
    assert 0 < found.low <= found.value <= found.high < 0.15 < alone.high - alone.low, "what they share falls out"
    assert found.p == pytest.approx(2 / 2001), "the smallest that so many resamples can show"
    same = draws.difference(ours, ours, HIT)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    back = draws.difference(theirs, ours, HIT)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))


def test_one_seed_leaves_the_chance_of_users() -> None:
    hits = [1.0] * 30 + [0.0] * 70
    found = TwoLevel((100,)).estimate([table(hits)], HIT)
    assert found.value == pytest.approx(0.3)
    assert (found.low, found.high) == pytest.approx((0.3 - 1.96 * 0.0458, 0.3 + 1.96 * 0.0458), abs=0.02)


def test_no_effect_is_rarely_found() -> None:
    rng = np.random.default_rng(7)
    found = 0
    for trial in range(60):
        ours, theirs = ([table((rng.random(50) < 0.5).tolist()) for _ in range(5)] for _ in range(2))
        difference = TwoLevel((50,) * 5, 400, trial).difference(ours, theirs, HIT)
        found += difference.low > 0 or difference.high < 0
        assert (difference.p < 0.05) == (difference.low > 0 or difference.high < 0) or 0.03 < difference.p < 0.07
    assert found <= 9


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == pytest.approx({"a": 1.0, "b": 1.0})
