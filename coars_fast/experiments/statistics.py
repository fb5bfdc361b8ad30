"""Two-level bootstrap: what a variant does over seeds and users, and how two variants differ.

A resample draws seeds with replacement, then users within each drawn seed, so that an interval holds both kinds of
chance. All variants of a data set see the same draws: users of a seed are the same people with the same candidates
whatever the variant, and a difference is paired by user. With few seeds the first level is coarse, and intervals are
rather too narrow than too wide; with one seed they hold the chance of users alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from coars_fast.game.metrics import Metric, Table

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% percentile interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Estimate):
    """One variant minus another."""

    p: float
    """Two-sided: twice the share of resamples on the other side of 0, at least 2 / (resamples + 1)."""


class TwoLevel:
    """Draws of seeds and users.

    Args:
        sizes: users of each seed.
        num_resamples: draws.
        seed: of the draws; the same sizes and seed give the same draws.
    """

    def __init__(self, sizes: Sequence[int], num_resamples: int = NUM_RESAMPLES, seed: int = 0):
        rng = np.random.default_rng([seed, *sizes])
        self.num_resamples, self.num_seeds = num_resamples, len(sizes)
        drawn = rng.integers(len(sizes), size=(num_resamples, len(sizes)))
        self._draws: list[tuple[np.ndarray, np.ndarray]] = []
        """For each seed: the resamples [n] in which it was drawn (twice where it was drawn twice), and how often each
        user was drawn then [n, U]."""
        for which, size in enumerate(sizes):
            rows = np.nonzero(drawn == which)[0]
            self._draws.append((rows, rng.multinomial(size, np.full(size, 1 / size), size=len(rows)).astype(float)))

    def values(self, tables: Sequence[Table], metric: Metric) -> tuple[float, np.ndarray]:
        """The mean over seeds of a metric: on all users, and in each resample [B].

        Args:
            tables: counts per user, one table a seed.
            metric: a function of sums over users.
        """
        exact, resampled = 0.0, np.zeros(self.num_resamples)
        for table, (rows, draws) in zip(tables, self._draws, strict=True):
            exact += float(metric({name: column.sum(keepdims=True) for name, column in table.items()})[0])
            np.add.at(resampled, rows, metric({name: draws @ column for name, column in table.items()}))
        return exact / self.num_seeds, resampled / self.num_seeds

    def estimate(self, tables: Sequence[Table], metric: Metric) -> Estimate:
        """The metric with its interval."""
        value, resampled = self.values(tables, metric)
        return Estimate(value, *_interval(resampled))

    def difference(self, ours: Sequence[Table], theirs: Sequence[Table], metric: Metric) -> Difference:
        """`ours` minus `theirs`, paired by seed and user."""
        first, first_resampled = self.values(ours, metric)
        second, second_resampled = self.values(theirs, metric)
        found = first_resampled - second_resampled
        other_side = min(float(np.mean(found <= 0)), float(np.mean(found >= 0)))
        p = min(1.0, max(2 * other_side, 2 / (self.num_resamples + 1)))
        return Difference(first - second, *_interval(found), p)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjustment for having asked so many questions at once."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def _interval(resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)
