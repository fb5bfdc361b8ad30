"""The benches, by pytest, into one folder `bench/`: its table, plots, CSV and JSON can be committed as they are.

What this commit measured before is left out, and no case begins when most of the time is gone, so that pytest comes to
its end and writes its files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.acceptance.kernel_tests import run_pytest
from bench.acceptance.work import CUT_OFF, DONE, FAILED, ROOT, Finding, Work
from bench.presets import NO_TIME
from bench.results import CSV_NAME, Row, read_csv

FOLDER = "bench"
HEAD, LARGE = Path("bench/test_head.py"), Path("bench/test_large_model.py")
MAIN_CASE = {
    "cpu": "fused_credit_loss-credit and R2048-H512-V32000",
    "h100": "fused_credit_loss-credit and R16384-H3584-V152064",
}
"""The whole head of a step at its main size, as pytest's `-k` takes it."""
BEGIN_UNTIL = 0.7
"""Of a part's time; the last case that begins takes the rest."""


def head(work: Work) -> Finding:
    """The whole head of a step first, then the other kinds of call and the sweeps."""
    if work.preset != "smoke":  # where one start more is a large part of the time
        first = run_bench(work, [HEAD], "-k", MAIN_CASE[work.preset])
        if first.status != DONE or work.left() < 5.0:
            return first if first.status != DONE else Finding(CUT_OFF, first.summary)
    return run_bench(work, [HEAD])


def large(work: Work) -> Finding:
    """The shape of a large model."""
    return run_bench(work, [LARGE])


def rest(work: Work) -> Finding:
    """Every other file."""
    return run_bench(work, [file for file in bench_files() if file not in (HEAD, LARGE)])


def bench_files() -> list[Path]:
    """Relative to the repository."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / "bench").glob("test_*.py"))


def run_bench(work: Work, files: Sequence[Path], *options: str) -> Finding:
    """Cases of some files; the finding tells of all rows that are there, those of earlier calls too."""
    folder = work.out / FOLDER
    arguments = [
        *files, *options, "--preset", work.preset, "--bench-out", folder, "--bench-commit",
        work.record.identity["commit"], "--bench-seconds", f"{BEGIN_UNTIL * work.left():.0f}",
    ]  # fmt: skip
    if work.record.results:  # a part that is begun anew measures anew
        arguments.append("--bench-resume")
    work.record.keep("begun", True)
    found = work.record.keep("pytest", run_pytest(work, "pytest", arguments))
    rows = rows_of(folder, work.record.identity)
    ours = [row for row in rows if row.kind == "ours"]
    wrong = [f"{row.variant} ({row.op}, {row.case}): {row.reason}" for row in ours if row.status != "ok"]
    cases = len({row.key[:-1] for row in rows})
    if wrong or found["failed"]:
        return Finding(FAILED, (wrong or found["failed"])[0])
    left = sum(count for reason, count in found["skipped"].items() if NO_TIME in reason)
    if found.get("stopped") or left:
        return Finding(CUT_OFF, f"{cases} cases measured so far" + (f", {left} not begun" if left else ""))
    return Finding(DONE, f"{cases} cases measured so far")


def rows_of(folder: Path, identity: dict[str, str]) -> list[Row]:
    """Rows of this commit, machine and preset."""
    if not (folder / CSV_NAME).exists():
        return []
    names = ("commit", "machine", "preset")
    wanted = tuple(identity[name] for name in names)
    return [row for row in read_csv(folder) if tuple(getattr(row, name) for name in names) == wanted]
