"""Table and plots of a folder of results, drawn from its CSV alone.

    python -m bench.report bench/results/cpu-2core-x86_64/2026-01-31

Writes `table.md`, `ratio.png` (ratio to the floor, one panel per case) and `sweep_*.png` (against rows and vocabulary,
where a case was measured at several). Results of a CPU are shown as ratios, not as times: two CPUs, or two days on one,
do not compare. The times stand in the CSV.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.presets import BenchError
from bench.results import Row, csv_path, read_csv, write_beside

TABLE_NAME = "table.md"
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#8a8a8a"
# Okabe and Ito's palette without black and yellow; ours is always blue.
RIVALS = ("#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7a7a7a", "#8c564b", "#5b4a8a", "#a0a000")


def groups(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows by case: op, kind of call, shape, data type, preset."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(row.key[:-1], []).append(row)
    return found


def table(rows: Sequence[Row]) -> str:
    """Markdown, one table per case."""
    parts = []
    for (op, case, shape, dtype, preset), group in groups(rows).items():
        about = group[0]
        floor = next((row for row in group if row.kind == "floor"), None)
        head = (
            f"### {op}: {case}\n\n{shape}, {dtype}, preset {preset}; torch {about.torch}, {about.machine}, "
            f"{about.threads} threads, {about.date}, commit {about.commit}\n"
        )
        if floor is not None:
            head += f"Floor: {floor.variant}.\n"
        parts.append(head + "\n" + _case_table(group))
    return "\n\n".join(parts) + "\n"


def _case_table(group: Sequence[Row]) -> str:
    times, tokens = not group[0].on_cpu, any(row.tokens_per_s for row in group)
    columns = ["variant", "version", "times the floor (p20 to p80)", "peak MiB"]
    columns += (["ms", "TFLOP/s", "GB/s"] if times else []) + (["tokens/s, relative"] if tokens else [])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    best = max((row.tokens_per_s or 0.0 for row in group), default=0.0)
    for row in group:
        if row.kind == "floor":
            continue
        name = f"**{row.variant}**" if row.kind == "ours" else row.variant
        if row.status != "ok" or row.median is None or row.ratio is None:
            cells = [name, row.version, f"{row.status}: {row.reason}".replace("|", "/")]
            lines.append("| " + " | ".join(cells + [""] * (len(columns) - 3)) + " |")
            continue
        scale = row.ratio / row.median
        spread = f"{row.ratio:.2f} ({(row.p20 or 0) * scale:.2f} to {(row.p80 or 0) * scale:.2f})"
        cells = [name, row.version, spread, "" if row.peak_mib is None else f"{row.peak_mib:.0f}"]
        if times:
            cells += [f"{1e3 * row.median:.3f}", _number(row.tflops), _number(row.gb_per_s)]
        if tokens:
            cells.append(f"{row.tokens_per_s / best:.2f}" if row.tokens_per_s else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


# --------------------------------------------------------------------------------------------------------------- plots


def ratio_figure(rows: Sequence[Row]):
    """Bars: how many times the floor each variant takes, one panel per case at its largest size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [group for group in largest(rows) if any(row.status == "ok" and row.kind != "floor" for row in group)]
    if not panels:
        return None
    columns = 2 if len(panels) > 1 else 1
    heights = [
        max(sum(row.kind != "floor" for row in group) for group in panels[i : i + columns])
        for i in range(0, len(panels), columns)
    ]
    figure, axes = plt.subplots(
        len(heights), columns, squeeze=False, figsize=(7.4 * columns, sum(0.3 * n + 1.0 for n in heights)),
        height_ratios=[0.3 * n + 0.35 for n in heights], layout="constrained",
    )  # fmt: skip
    for ax, group in zip(axes.flat, panels, strict=False):
        _bars(ax, group)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    return figure


def _bars(ax, group: Sequence[Row]) -> None:
    shown = [row for row in group if row.kind != "floor"]
    longest = max((row.ratio or 0.0) for row in shown)
    for place, row in enumerate(shown):
        if row.ratio is None or row.median is None:
            text = f"{row.status}: {_short(row.reason)}"
            ax.text(1.0 + 0.02 * longest, place, text, va="center", color=GREY, fontsize=7)
            continue
        ax.barh(place, row.ratio, color=BLUE if row.kind == "ours" else ORANGE, height=0.7)
        ax.text(row.ratio + 0.01 * longest, place, f"{row.ratio:.2f}", va="center", fontsize=8)
    ax.axvline(1.0, color="black", linewidth=1.0, linestyle="--")
    ax.set_yticks(range(len(shown)), [row.variant for row in shown], fontsize=8)
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.set_xlim(0, max(1.15 * longest, 1.2))
    ax.set_title(f"{shown[0].op}: {shown[0].case}\n{shown[0].shape} {shown[0].dtype}", fontsize=9, loc="left")
    floor = next((row.variant for row in group if row.kind == "floor"), "floor")
    ax.set_xlabel(f"times the floor ({floor})", fontsize=8)
    ax.tick_params(axis="x", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def _short(text: str) -> str:
    return text if len(text) < 60 else text[:57] + "..."


def _kind(group: Sequence[Row]) -> tuple[str, ...]:
    return (group[0].op, group[0].case, group[0].dtype, group[0].preset)


def largest(rows: Sequence[Row]) -> list[list[Row]]:
    """Of each kind of call the group with the largest product of sizes."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for group in groups(rows).values():
        kind = _kind(group)
        if kind not in found or math.prod(group[0].sizes().values()) > math.prod(found[kind][0].sizes().values()):
            found[kind] = group
    return list(found.values())


def sweeps(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[list[Row]]]:
    """Groups of one kind of call that differ in one size alone, three or more: (op, case, letter) -> groups."""
    lines: dict[tuple[tuple[str, ...], str, str], list[list[Row]]] = {}
    for group in groups(rows).values():
        for letter in group[0].sizes():
            fixed = " ".join(part for part in group[0].shape.split() if not part.startswith(f"{letter}="))
            lines.setdefault((_kind(group), letter, fixed), []).append(group)
    found: dict[tuple[str, str, str], list[list[Row]]] = {}
    for ((op, case, *_), letter, _), line in lines.items():
        if len(line) >= max(3, len(found.get((op, case, letter), ()))):
            found[op, case, letter] = sorted(line, key=lambda group: group[0].sizes()[letter])
    return found


def sweep_figure(line: Sequence[Sequence[Row]], letter: str):
    """Time (on a CPU as a ratio to the floor of the largest size) and peak memory against one size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cpu = line[-1][0].on_cpu
    floor = next(row.median for row in line[-1] if row.kind == "floor")
    assert floor is not None
    figure, (time_ax, memory_ax) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = [row.variant for row in line[-1] if row.status == "ok"]
    rivals = iter(RIVALS * 3)
    for name in names:
        points = [(g[0].sizes()[letter], row) for g in line for row in g if row.variant == name and row.median]
        kind = points[-1][1].kind
        style = {"ours": {"color": BLUE, "linewidth": 2.6}, "floor": {"color": "black", "linestyle": "--"}}.get(kind)
        style = style or {"color": next(rivals), "linewidth": 1.5}
        label = f"{name} (floor)" if kind == "floor" else name
        x = [size for size, _ in points]
        scale = 1 / floor if cpu else 1e3
        time_ax.plot(x, [(row.median or 0.0) * scale for _, row in points], marker="o", ms=3.5, label=label, **style)
        if kind != "floor" and all(row.peak_mib is not None for _, row in points):
            memory_ax.plot(x, [row.peak_mib for _, row in points], marker="o", ms=3.5, **style)
    word = {"R": "rows", "V": "vocabulary"}.get(letter, letter)
    time_ax.set_ylabel("time, as a part of the floor's at the largest size" if cpu else "milliseconds", fontsize=8.5)
    memory_ax.set_ylabel("peak memory, MiB", fontsize=8.5)
    for ax in (time_ax, memory_ax):
        ax.set_xlabel(word)
        ax.set_ylim(bottom=0)
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    row = line[-1][0]
    fixed = " ".join(part for part in row.shape.split() if not part.startswith(letter + "="))
    figure.suptitle(f"{row.op}: {row.case}; {fixed} {row.dtype}", fontsize=10.5, x=0.01, ha="left")
    time_ax.legend(fontsize=7.5, frameon=False)
    return figure


def write_report(folder: Path) -> list[Path]:
    """Table and plots of the CSV in `folder`, written there; returns the files. Without matplotlib: the table alone."""
    rows = read_csv(folder)
    if not rows:
        raise BenchError(f"{csv_path(folder)}: has no rows; nothing to draw")
    written = [folder / TABLE_NAME]
    write_beside(written[0], table(rows))
    if importlib.util.find_spec("matplotlib") is None:
        return written
    import matplotlib.pyplot as plt

    figures = {"ratio.png": ratio_figure(rows)}
    for (op, _, letter), line in sweeps(rows).items():
        figures[f"sweep_{op}_{letter}.png"] = sweep_figure(line, letter)
    for name, figure in figures.items():
        if figure is None:
            continue
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=120)
        plt.close(figure)
        write_beside(folder / name, data.getvalue())
        written.append(folder / name)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with a results.csv")
    folder = parser.parse_args(argv).folder
    try:
        if not folder.is_dir():
            raise BenchError(f"{folder}: no such folder")
        for path in write_report(folder):
            print(path)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
