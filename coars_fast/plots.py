"""Figures of a run: its learning curves, and the evaluation before and after training, as PNG files.

Reads the records of `metrics.jsonl` and `evaluation.json` as plain dictionaries and draws what is there: a missing key
is left out, a panel without data is left out. No torch, no window system.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

Record = Mapping[str, Any]

# Okabe and Ito's palette, told apart with any colour vision; black and yellow are left out.
BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # labels are texts of files
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "legend.fontsize": 8.5,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "figure.dpi": 120,
}

LABELS = {
    "hit@1": "Hit@1",
    "hit@1_first_turn": "Hit@1, first turn",
    "mean_turns": "Mean turns",
    "repeat_rate": "Repeated items",
    "user_f1": "User F1",
    "user_precision": "User precision",
    "user_recall": "User recall",
    "user_f1_disc": "User F1-disc",
    "user_f1_disc_macro": "User F1-disc, macro",
    "user_precision_disc": "User precision, disc",
    "acceptance": "Acceptance",
    "acceptance_disc": "Acceptance, disc",
    "false_positive_rate": "False positives",
    "exclusion_rate": "Excluded turns",
    "parse_failure_rec": "Parse failures, recommender",
    "parse_failure_user": "Parse failures, user",
}
# What the bars show of the many metrics in evaluation.json; the report's table has all.
HEADLINES = (
    "hit@1",
    "hit@1_sampled",
    "hit@1_first_turn",
    "user_f1",
    "user_precision",
    "user_f1_disc@1:1",
    "user_f1_disc@1:3",
    "user_f1_disc@1:9",
    "acceptance",
    "false_positive_rate",
    "repeat_rate",
    "parse_failure_rec",
    "parse_failure_user",
    "mean_turns",
)


def label(name: str) -> str:
    """What a metric is called in figures and tables: `hit@1_sampled` -> "Hit@1, sampled"."""
    stem, ratio = (name, "") if name in LABELS else name.partition("@1:")[::2]
    sampled = stem.endswith("_sampled")
    stem = stem.removesuffix("_sampled")
    text = LABELS.get(stem) or stem.replace("_", " ")
    return text + (", sampled" if sampled else "") + (f", 1:{ratio}" if ratio else "")


def learning_curves(metrics: Sequence[Record], evaluations: Sequence[Record], out: Path) -> Path | None:
    """Draw `learning_curves.png` into the folder `out`; returns its path, or None if there is nothing to draw.

    `metrics` are training records (`kind` "train"), `evaluations` those of `kind` "evaluation": `step` and
    `metrics: {name: {value, low, high}}`.
    """
    train = sorted((record for record in metrics if "step" in record), key=lambda record: record["step"])
    evaluated = sorted((record for record in evaluations if "step" in record), key=lambda record: record["step"])
    panels = [panel for panel in PANELS if _has_data(panel, train, evaluated)]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            rows, columns, figsize=(4.6 * columns, 3.3 * rows), squeeze=False, layout="constrained"
        )
        for axes, (title, curves, points) in zip(grid.flat, panels, strict=False):
            axes.set_title(title)
            axes.set_xlabel("step")
            for name, text, color in curves:
                _draw_curve(axes, train, name, text, color)
            for name, text, color in points:
                _draw_intervals(axes, evaluated, name, text, color)
            _finish(axes)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        return _save(figure, Path(out) / "learning_curves.png")


def before_after(evaluation: Record, out: Path) -> Path | None:
    """Draw `before_after.png` into the folder `out` from the content of `evaluation.json`; None if it lacks either."""
    before, after = evaluation.get("before") or {}, evaluation.get("after") or {}
    both = [name for name in after if _value(before.get(name)) is not None and _value(after[name]) is not None]
    names = [name for name in HEADLINES if name in both] or both
    rates = [name for name in names if all(-1 <= (_value(side[name]) or 0) <= 1 for side in (before, after))]
    others = [name for name in names if name not in rates]
    groups = [(group, text) for group, text in ((rates, "rates and scores"), (others, "other units")) if group]
    if not groups:
        return None
    heights = [0.42 * len(group) + 0.8 for group, _ in groups]
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(groups),
            1,
            figsize=(8.2, sum(heights) + 0.3),
            squeeze=False,
            layout="constrained",
            height_ratios=heights,
        )
        for axes, (group, text) in zip(grid.flat, groups, strict=True):
            _draw_pairs(axes, group, before, after)
            axes.set_title(f"Before and after training: {text}")
        figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return _save(figure, Path(out) / "before_after.png")


# Panels: title, (training key, label, colour) curves, (evaluation name, label, colour) points with intervals.
Lines = tuple[tuple[str, str, str], ...]
PANELS: tuple[tuple[str, Lines, Lines], ...] = (
    (
        "Training episodes: hits and rewards",
        (
            ("hit@1", "Hit@1", GREEN),
            ("reward_rec", "reward, recommender", BLUE),
            ("reward_user", "reward, user", ORANGE),
        ),
        (),
    ),
    (
        "Evaluation: Hit@1 (95% interval)",
        (),
        (
            ("hit@1", "greedy", BLUE),
            ("hit@1_sampled", "sampled", ORANGE),
            ("hit@1_first_turn", "greedy, first turn", GREEN),
        ),
    ),
    (
        "User agent",
        (
            ("precision", "precision", BLUE),
            ("acceptance", "acceptance", ORANGE),
            ("false_positive_rate", "false positives", PINK),
        ),
        (("user_f1", "F1, evaluation", GREEN), ("user_f1_disc@1:1", "F1-disc 1:1, evaluation", RED)),
    ),
    (
        "Credit and clipping",
        (
            ("credit_mean_rec", "mean credit, recommender", BLUE),
            ("credit_mean_user", "mean credit, user", ORANGE),
            ("clip_fraction", "clipped tokens", PINK),
        ),
        (),
    ),
    (
        "Replies that do not count",
        (
            ("parse_failure_rec", "parse failures, recommender", BLUE),
            ("parse_failure_user", "parse failures, user", ORANGE),
            ("exclusion_rate", "excluded turns", PINK),
        ),
        (),
    ),
    (
        "Seconds per step",
        (("seconds_rollout", "rollout", BLUE), ("seconds_train", "update", ORANGE)),
        (),
    ),
)


def credit_histograms(credit: Mapping[tuple[str, str, str], Any], path: Path) -> Path:
    """Draw where the credit of tokens lies, a panel for each agent and kind of token.

    Args:
        credit: (agent, outcome, kind) -> credit of each such token.
        path: of the PNG file.
    """
    agents, kinds = (list(dict.fromkeys(key[i] for key in credit)) for i in (0, 2))
    most = max((float(abs(values).max()) for values in credit.values() if len(values)), default=1.0) or 1.0
    colors = {"right": GREEN, "wrong": RED, "unreadable": SKY}
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(agents), len(kinds), figsize=(4.6 * len(kinds), 3.0 * len(agents)), squeeze=False, layout="constrained"
        )
        for row, agent in zip(grid, agents, strict=True):
            for axes, kind in zip(row, kinds, strict=True):
                axes.set_title(f"{agent}: {kind}")
                axes.set_xlabel("credit, teacher minus student (nats)")
                axes.set_ylabel("share of tokens")
                for (who, outcome, what), values in credit.items():
                    if (who, what) == (agent, kind) and len(values):
                        weights = [1 / len(values)] * len(values)
                        axes.hist(
                            values, bins=41, range=(-most, most), weights=weights, histtype="step", linewidth=1.6,
                            color=colors.get(outcome, BLUE), label=f"{outcome} replies ({len(values):,} tokens)",
                        )  # fmt: skip
                axes.set_yscale("log")
                axes.set_ylim(top=60)  # the legend stands above the bar at 0
                if axes.get_legend_handles_labels()[0]:
                    axes.legend(loc="upper left")
        return _save(figure, path)


def _has_data(panel: tuple[str, Lines, Lines], train: Sequence[Record], evaluated: Sequence[Record]) -> bool:
    _, curves, points = panel
    return any(_series(train, name)[0] for name, _, _ in curves) or any(
        _value((record.get("metrics") or {}).get(name)) is not None for record in evaluated for name, _, _ in points
    )


def _series(records: Sequence[Record], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the records that have a number under `name`."""
    found = [(record["step"], record[name]) for record in records if isinstance(record.get(name), int | float)]
    return [step for step, _ in found], [value for _, value in found]


def _value(estimate: Any) -> float | None:
    return estimate.get("value") if isinstance(estimate, Mapping) else None


def _draw_curve(axes: Axes, records: Sequence[Record], name: str, text: str, color: str) -> None:
    """The values, and over long runs their running mean with the values pale behind it."""
    steps, values = _series(records, name)
    window = len(values) // 15
    if window < 2:
        if values:
            axes.plot(steps, values, color=color, label=text, marker="o" if len(values) < 3 else None)
        return
    smooth = [
        sum(values[max(0, i - window) : i + window + 1]) / len(values[max(0, i - window) : i + window + 1])
        for i in range(len(values))
    ]
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=1.0)
    axes.plot(steps, smooth, color=color, label=text)


def _whiskers(estimate: Record) -> tuple[float, float]:
    """Lengths below and above the value; 0 where there is no interval."""
    value, low, high = estimate["value"], estimate.get("low"), estimate.get("high")
    return max(0.0, value - low) if low is not None else 0.0, max(0.0, high - value) if high is not None else 0.0


def _draw_intervals(axes: Axes, records: Sequence[Record], name: str, text: str, color: str) -> None:
    found = [(record["step"], record["metrics"][name]) for record in records if name in (record.get("metrics") or {})]
    found = [(step, estimate) for step, estimate in found if _value(estimate) is not None]
    if not found:
        return
    lengths = [_whiskers(estimate) for _, estimate in found]
    axes.errorbar(
        [step for step, _ in found],
        [estimate["value"] for _, estimate in found],
        yerr=([below for below, _ in lengths], [above for _, above in lengths]),
        color=color,
        label=text,
        marker="o",
        markersize=4.5,
        capsize=3,
        elinewidth=1.1,
    )


def _draw_pairs(axes: Axes, names: Sequence[str], before: Record, after: Record) -> None:
    """Two horizontal bars a metric, the first metric on top, values written beside them."""
    reach = max([1e-9] + [side[name]["value"] + _whiskers(side[name])[1] for name in names for side in (before, after)])
    for side, text, color, shift in ((before, "before", SKY, -0.19), (after, "after", BLUE, 0.19)):
        values = [side[name]["value"] for name in names]
        lengths = [_whiskers(side[name]) for name in names]
        positions = [index + shift for index in range(len(names))]
        whiskers = ([below for below, _ in lengths], [above for _, above in lengths])
        axes.barh(positions, values, height=0.36, color=color, label=text)
        axes.errorbar(values, positions, xerr=whiskers, fmt="none", ecolor="#333333", elinewidth=1.1, capsize=2.5)
        for position, value, (_, above) in zip(positions, values, lengths, strict=True):
            axes.text(
                max(value + above, 0) + 0.015 * reach,
                position,
                f"{value:.3f}",
                va="center",
                fontsize=8,
                color="#333333",
            )
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlim(right=1.12 * reach)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def _finish(axes: Axes) -> None:
    lowest, highest = axes.dataLim.intervaly
    if lowest >= 0:
        axes.set_ylim(bottom=0, top=None if highest > 0 else 1)
    else:
        axes.axhline(0, color="#888888", linewidth=0.8, zorder=1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
    # Room above the curves, so that the legend covers none of them.
    count = len(axes.get_legend_handles_labels()[0])
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + (high - low) * 0.1 * count)
    axes.legend(loc="upper left", ncols=1)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    plt.close(figure)
    return path
