"""What the finished cells of an experiment say: estimates of every metric by variant, and differences between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from coars_fast.errors import RunFolderError
from coars_fast.experiments.grid import SASREC, Cell, Experiment
from coars_fast.experiments.runner import Grid, finished_evaluation
from coars_fast.experiments.statistics import Difference, Estimate, TwoLevel, holm
from coars_fast.game.metrics import Metric, Table, metrics_of

SASREC_METRICS = ("hit@1",)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A metric of a variant on a data set, over its finished seeds."""

    dataset: str
    variant: str
    metric: str
    estimate: Estimate
    seeds: tuple[int, ...]
    num_users: int
    """Users of all seeds together."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A metric of a variant minus that of another, over the seeds that both have."""

    dataset: str
    variant: str
    against: str
    metric: str
    difference: Difference
    p_holm: float
    """Adjusted for all variants compared with `against` on this data set by this metric."""
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Change:
    """A metric of a variant before training, after it, and what training changed, over its finished seeds."""

    metric: str
    before: Estimate
    after: Estimate
    difference: Difference


class Results:
    """Evaluations of the finished cells.

    Args:
        experiment: the file.
        grid: its cells, in their folder.
    """

    def __init__(self, experiment: Experiment, grid: Grid):
        self.experiment = experiment
        self.states = {cell: grid.state(cell) for cell in experiment.cells}
        self.records = {
            cell: finished_evaluation(grid.folder(cell))
            for cell, state in self.states.items()
            if state.kind == "finished"
        }
        self._draws = cache(TwoLevel)

    def variants(self, dataset: str) -> list[str]:
        """Variants with a finished cell, SASRec's row first, then in the file's order."""
        done = {cell.variant for cell in self.records if cell.dataset == dataset}
        return [*([SASREC] if done else []), *(name for name in self.experiment.variants if name in done)]

    def label(self, variant: str) -> str:
        """What tables call a variant."""
        return "SASRec top-1" if variant == SASREC else self.experiment.variants[variant].label

    def cells(self, dataset: str, variant: str) -> dict[int, Cell]:
        """seed -> finished cell; for SASRec's row any cell of the seed."""
        return {
            cell.seed: cell
            for cell in reversed(list(self.records))
            if cell.dataset == dataset and variant in (cell.variant, SASREC)
        }

    def rows(self) -> Iterator[Row]:
        """Every metric of every variant on every data set."""
        for dataset in self.experiment.datasets:
            for variant in self.variants(dataset):
                cells = self.cells(dataset, variant)
                seeds = tuple(sorted(cells))
                for metric, (part, function) in self._metrics(cells, variant).items():
                    tables = [self._table(cells[seed], variant, part) for seed in seeds]
                    estimate = self._draws(_sizes(tables)).estimate(tables, function)
                    yield Row(
                        dataset=dataset,
                        variant=variant,
                        metric=metric,
                        estimate=estimate,
                        seeds=seeds,
                        num_users=sum(_sizes(tables)),
                    )

    def changes(self, dataset: str, variant: str) -> Iterator[Change]:
        """Every metric of a variant before and after training."""
        cells = self.cells(dataset, variant)
        seeds = sorted(cells)
        for metric, (part, function) in self._metrics(cells, variant).items():
            before, after = (
                [self._table(cells[seed], variant, part, when) for seed in seeds] for when in ("before", "after")
            )
            draws = self._draws(_sizes(after))
            yield Change(
                metric=metric,
                before=draws.estimate(before, function),
                after=draws.estimate(after, function),
                difference=draws.difference(after, before, function),
            )

    def pairs(self) -> list[Pair]:
        """Every variant against those of `compare`."""
        return [
            pair
            for dataset in self.experiment.datasets
            for against in self.experiment.compare
            if against in self.variants(dataset)
            for pair in self._against(dataset, against)
        ]

    def _against(self, dataset: str, against: str) -> Iterator[Pair]:
        theirs = self.cells(dataset, against)
        found: dict[str, dict[str, tuple[Difference, tuple[int, ...]]]] = {}
        for variant in self.variants(dataset):
            ours = self.cells(dataset, variant)
            seeds = tuple(sorted(ours.keys() & theirs.keys()))
            if variant == against or not seeds:
                continue
            for seed in seeds:
                self._check_users(ours[seed], theirs[seed])
            for metric, (part, function) in self._metrics(ours, variant).items():
                if metric not in self._metrics(theirs, against):
                    continue
                first = [self._table(ours[seed], variant, part) for seed in seeds]
                second = [self._table(theirs[seed], against, part) for seed in seeds]
                if _sizes(first) == _sizes(second):
                    difference = self._draws(_sizes(first)).difference(first, second, function)
                    found.setdefault(metric, {})[variant] = (difference, seeds)
        for metric, by_variant in found.items():
            adjusted = holm({variant: difference.p for variant, (difference, _) in by_variant.items()})
            for variant, (difference, seeds) in by_variant.items():
                yield Pair(
                    dataset=dataset,
                    variant=variant,
                    against=against,
                    metric=metric,
                    difference=difference,
                    p_holm=adjusted[variant],
                    seeds=seeds,
                )

    def _metrics(self, cells: Mapping[int, Cell], variant: str) -> dict[str, tuple[str, Metric]]:
        """metric -> (part, function): what all cells have."""
        parts = [set(self._users(cell, variant)) for cell in cells.values()]
        found = {
            name: (part, function)
            for part in self._users(next(iter(cells.values())), variant)
            if all(part in each for each in parts)
            for name, function in metrics_of(part).items()
        }
        return {name: entry for name, entry in found.items() if variant != SASREC or name in SASREC_METRICS}

    def _users(self, cell: Cell, variant: str, when: str = "after") -> dict[str, Any]:
        return self.records[cell]["users"][SASREC if variant == SASREC else when]

    def _table(self, cell: Cell, variant: str, part: str, when: str = "after") -> Table:
        return {name: np.array(column) for name, column in self._users(cell, variant, when)[part].items()}

    def _check_users(self, ours: Cell, theirs: Cell) -> None:
        if self.records[ours]["users"]["ids"] != self.records[theirs]["users"]["ids"]:
            raise RunFolderError(
                f"{ours.name} and {theirs.name} were evaluated on different users, so they cannot be paired; let "
                "variants leave `data` and `world` alone, or make two data sets of them"
            )


def _sizes(tables: Sequence[Table]) -> tuple[int, ...]:
    return tuple(len(next(iter(table.values()))) for table in tables)
