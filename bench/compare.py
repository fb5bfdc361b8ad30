"""What changed between two results: every variant of ours, by its ratio to the floor (CPU) or its time (GPU).

    python -m bench.compare bench/results/cpu-2core-x86_64/2026-01-31 bench/results/cpu-2core-x86_64/2026-02-28

Two folders or two CSV files, the older first. Exit status: 0, 1 if one variant became more than 5% slower or lost its
time, 2 if the files cannot be compared. Left out: rivals; theirs change when they do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.presets import BenchError
from bench.results import Row, csv_path, read_csv

THRESHOLD = 0.05


def compare(before: Sequence[Row], after: Sequence[Row]) -> tuple[list[str], bool]:
    """Lines to print, and whether something became slower. Only rows in both are compared; the others are counted."""
    old = {row.key: row for row in before if row.kind == "ours"}
    new = {row.key: row for row in after if row.kind == "ours"}
    lines, slower = [], False
    for key, row in new.items():
        if key not in old:
            continue
        text, worse = _change(old[key], row)
        slower |= worse
        lines.append(f"{text:26s} {row.variant}: {row.op}, {row.case}, {row.shape} {row.dtype} {row.preset}")
    for name, keys in (("first", old.keys() - new.keys()), ("second", new.keys() - old.keys())):
        if keys:
            lines.append(f"{len(keys)} of ours only in the {name}: {', '.join(sorted({key[0] for key in keys}))}")
    return lines, slower


def _change(old: Row, new: Row) -> tuple[str, bool]:
    """What is shown of one variant, and whether it became slower."""
    figures = [(row.ratio if new.on_cpu else row.median) if row.status == "ok" else None for row in (old, new)]
    before, after = figures
    if after is None:
        return f"{new.status.upper()}", before is not None
    if before is None:
        return "has a time now", False
    change = after / before - 1.0
    shown = f"{before:.2f}x -> {after:.2f}x" if new.on_cpu else f"{1e3 * before:.3f} -> {1e3 * after:.3f} ms"
    worse = change > THRESHOLD
    return f"{change:+6.1%} {'SLOWER ' if worse else ''}{shown}", worse


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="older folder or CSV")
    parser.add_argument("after", type=Path, help="newer folder or CSV")
    paths = parser.parse_args(argv)
    try:
        before, after = read_csv(paths.before), read_csv(paths.after)
        machines = [sorted({row.machine for row in rows}) for rows in (before, after)]
        if not any(row.kind == "ours" for row in after):
            raise BenchError(f"{csv_path(paths.after)}: has no variant of ours")
        if not {row.key for row in before if row.kind == "ours"} & {row.key for row in after}:
            raise BenchError(f"{csv_path(paths.before)}: has no measurement in common with {csv_path(paths.after)}")
        if machines[0] != machines[1]:
            raise BenchError(
                f"{csv_path(paths.after)}: was measured on {', '.join(machines[1])}, "
                f"{csv_path(paths.before)} on {', '.join(machines[0])}; only one machine's results compare"
            )
        lines, slower = compare(before, after)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())
