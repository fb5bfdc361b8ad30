"""Figures of an experiment as SVG files, from the run folders of its finished cells.

DATASET-bars.svg      two metrics of every variant with intervals, beside the variant that they are compared with
DATASET-curves.svg    evaluations on the way, and the rates of excluded and wrongly accepted items in training
DATASET-credit.svg    mean credit over the turn and over the quarter of the reply that a token stands in
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from coars_fast.experiments.results import Results, Row
from coars_fast.experiments.runner import Grid
from coars_fast.plots import BLUE, GREEN, ORANGE, PINK, RED, SKY, STYLE, label
from coars_fast.state.files import read_jsonl

COLORS = (BLUE, ORANGE, GREEN, PINK, RED, SKY)
SVG_STYLE: dict[Any, Any] = {**STYLE, "svg.hashsalt": "coars_fast", "svg.fonttype": "none"}
"""The same figures from the same runs, byte for byte."""
BARS = ("hit@1", "user_f1_disc@1:1")
CURVES = (
    ("evaluation", "hit@1", "Evaluation: Hit@1, greedy"),
    ("evaluation", "user_f1", "Evaluation: user F1"),
    ("train", "exclusion_rate", "Training: excluded turns"),
    ("train", "false_positive_rate", "Training: false positives of the user agent"),
)
Series = dict[int, dict[int, float]]
"""seed -> step -> value."""


def write_figures(results: Results, grid: Grid, out: Path) -> list[Path]:
    """Draw what there is into `out`; returns the files, none for data sets without a finished cell."""
    rows = list(results.rows())
    written = []
    for dataset in results.experiment.datasets:
        trained = [
            v
            for v in results.variants(dataset)
            if any(c.config.train.num_steps for c in results.cells(dataset, v).values())
        ]
        trained = [v for v in trained if v in results.experiment.variants]
        chosen = [v for v in results.experiment.curves if v in trained] or trained
        records = {v: _records(results, grid, dataset, v) for v in chosen[: len(COLORS)]}
        for name, figure in (
            ("bars", _bars(results, [row for row in rows if row.dataset == dataset])),
            ("curves", _curves(results, records)),
            ("credit", _credit(results, records)),
        ):
            if figure is not None:
                written.append(out / f"{dataset}-{name}.svg")
                with plt.rc_context(SVG_STYLE):
                    figure.savefig(written[-1], metadata={"Date": None})
                plt.close(figure)
    return written


def _records(results: Results, grid: Grid, dataset: str, variant: str) -> dict[int, list[dict[str, Any]]]:
    """seed -> the records of metrics.jsonl."""
    cells = results.cells(dataset, variant)
    return {seed: read_jsonl(grid.folder(cell) / "metrics.jsonl") for seed, cell in sorted(cells.items())}


def _bars(results: Results, rows: Sequence[Row]) -> Figure | None:
    variants = list(dict.fromkeys(row.variant for row in rows))
    if not variants:
        return None
    with plt.rc_context(SVG_STYLE):
        figure, grid = plt.subplots(
            1, len(BARS), figsize=(10, 0.28 * len(variants) + 1.2), sharey=True, squeeze=False, layout="constrained"
        )
        for axes, metric in zip(grid.flat, BARS, strict=True):
            found = {row.variant: row.estimate for row in rows if row.metric == metric}
            for place, variant in enumerate(variants):
                if variant not in found:
                    continue
                value, low, high = found[variant].value, found[variant].low, found[variant].high
                compared = variant in results.experiment.compare
                axes.barh(place, value, height=0.7, color=BLUE if compared else SKY)
                whiskers = ([max(0.0, value - low)], [max(0.0, high - value)])
                axes.errorbar([value], [place], xerr=whiskers, fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
                if compared:
                    axes.axvline(value, color=BLUE, linewidth=0.8, linestyle=":")
            axes.set_title(f"{label(metric)} (95% interval)")
            axes.set_yticks(range(len(variants)), [results.label(v) for v in variants])
            axes.set_ylim(len(variants) - 0.4, -0.6)
            axes.grid(axis="y", visible=False)
    return figure


def _curves(results: Results, records: Mapping[str, Mapping[int, list[dict[str, Any]]]]) -> Figure | None:
    if not records:
        return None
    with plt.rc_context(SVG_STYLE):
        figure, grid = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
        for axes, (kind, name, title) in zip(grid.flat, CURVES, strict=True):
            for color, (variant, of_seeds) in zip(COLORS, records.items(), strict=False):
                series = {seed: _series(found, kind, name) for seed, found in of_seeds.items()}
                _band(axes, series, color, results.label(variant))
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, grid.flat[0], "line: mean of the seeds; band: from the lowest to the highest")
    return figure


def _series(records: Sequence[Mapping[str, Any]], kind: str, name: str) -> dict[int, float]:
    """step -> value of one run."""
    found = {}
    for record in records:
        if record.get("kind") == kind:
            value = record.get(name) if kind == "train" else record["metrics"].get(name, {}).get("value")
            if value is not None:
                found[record["step"]] = value
    return found


def _band(axes: Axes, series: Series, color: str, text: str) -> None:
    """The mean over seeds at the steps that all of them have, and the room between the lowest and the highest."""
    common = sorted(set.intersection(*(set(values) for values in series.values())))
    if not common:
        return
    at = [[values[step] for values in series.values()] for step in common]
    axes.plot(common, [sum(v) / len(v) for v in at], color=color, label=text, marker="o" if len(common) < 3 else None)
    axes.fill_between(common, [min(v) for v in at], [max(v) for v in at], color=color, alpha=0.15, linewidth=0)


def _credit(results: Results, records: Mapping[str, Mapping[int, list[dict[str, Any]]]]) -> Figure | None:
    """Means over all steps and seeds, before centring."""
    panels = [
        (agent, kind, f"{title}: {'turn' if kind == 'turn' else 'quarter of the reply'}")
        for agent, title in (("rec", "Recommender"), ("user", "User agent"))
        for kind in ("turn", "quarter")
    ]
    found = {
        (variant, agent, kind): _mean_by(of_seeds, f"credit_{kind}", agent)
        for variant, of_seeds in records.items()
        for agent, kind, _ in panels
    }
    shown = {variant for (variant, *_), means in found.items() if means}
    if not shown:
        return None
    with plt.rc_context(SVG_STYLE):
        figure, grid = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
        for axes, (agent, kind, title) in zip(grid.flat, panels, strict=True):
            for color, variant in zip(COLORS, records, strict=False):
                means = found[variant, agent, kind]
                if variant in shown:
                    axes.plot(list(means), list(means.values()), color=color, marker="o", label=results.label(variant))
            axes.axhline(0, color="#888888", linewidth=0.8)
            axes.set_title(title)
            axes.set_ylabel("mean credit, before centring")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, grid.flat[0], "mean over all training steps and seeds")
    return figure


def _mean_by(of_seeds: Mapping[int, Sequence[Mapping[str, Any]]], stem: str, agent: str) -> dict[int, float]:
    """number -> mean of `<stem><number>_<agent>` over all records that have it."""
    values: dict[int, list[float]] = {}
    for records in of_seeds.values():
        for record in records:
            for name, value in record.items():
                number = name.removeprefix(stem).removesuffix(f"_{agent}")
                if name.startswith(stem) and name.endswith(f"_{agent}") and number.isdecimal():
                    values.setdefault(int(number), []).append(value)
    return {number: sum(found) / len(found) for number, found in sorted(values.items())}


def _legend(figure: Figure, axes: Axes, note: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, title=note, title_fontsize=8.5)
