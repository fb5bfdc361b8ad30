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
LOOPS = ("test_step", "test_iteration", "test_rollout")
"""Files that build whole worlds and models before they measure; they come last."""
BEGIN_UNTIL = 0.7
"""Of a part's time; the last case that begins takes the rest."""


def head(work: Work) -> Finding:
    """The whole head of a step first, then the other kinds of call and the sweeps."""
    first = Finding(DONE, "")
    if work.preset != "smoke":  # where one start more is a large part of the time
        first = run_bench(work, HEAD, "-k", MAIN_CASE[work.preset])
        if first.status == CUT_OFF or work.left() < 5.0:
            return Finding(CUT_OFF, first.summary)
    return worst([run_bench(work, HEAD), first])


def large(work: Work) -> Finding:
    """The shape of a large model."""
    return run_bench(work, LARGE)


def rest(work: Work) -> Finding:
    """Every other file in a process of its own: an error that a GPU does not recover from costs that file alone."""
    findings = []
    files = [file for file in bench_files() if file not in (HEAD, LARGE)]
    for file in sorted(files, key=lambda file: file.stem in LOOPS):
        if work.left() < 5.0:
            findings.append(Finding(CUT_OFF, f"{file.name} not begun"))
            break
        findings.append(run_bench(work, file))
    return worst(findings)


def worst(findings: Sequence[Finding]) -> Finding:
    """What is to be gone on with first, then what failed."""
    for status in (CUT_OFF, FAILED):
        for finding in findings:
            if finding.status == status:
                return finding
    return findings[0]


def bench_files() -> list[Path]:
    """Relative to the repository."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / "bench").glob("test_*.py"))


def run_bench(work: Work, file: Path, *options: str) -> Finding:
    """Cases of a file. What was cut off is gone on with even where something failed before."""
    folder, name = work.out / FOLDER, "-".join((file.stem, *options))
    before = {row.key for row in rows_of(folder, work.record.identity)}
    arguments = [
        file, *options, "--preset", work.preset, "--bench-out", folder, "--bench-commit",
        work.record.identity["commit"], "--bench-seconds", f"{BEGIN_UNTIL * work.left():.0f}",
    ]  # fmt: skip
    if work.record.results:  # a part that is begun anew measures anew
        arguments.append("--bench-resume")
    work.record.keep("begun", True)
    earlier = {tuple(key) for key in work.record.results.get(f"rows of {file.stem}", ())}
    found = work.record.keep(name, run_pytest(work, file.stem, arguments))
    rows = rows_of(folder, work.record.identity)
    own = earlier | {row.key for row in rows} - before
    work.record.keep(f"rows of {file.stem}", sorted(own))
    ours = [row for row in rows if row.kind == "ours" and row.key in own]
    wrong = [f"{row.variant} ({row.op}, {row.case}): {row.reason}" for row in ours if row.status != "ok"]
    wrong = wrong or found["failed"]
    also = f"; wrong so far: {wrong[0]}" if wrong else ""
    cases = len({row.key[:-1] for row in rows})
    left = sum(count for reason, count in found["skipped"].items() if NO_TIME in reason)
    if found.get("stopped") or left:
        return Finding(CUT_OFF, f"{cases} cases measured so far" + (f", {left} not begun" if left else "") + also)
    if wrong:
        return Finding(FAILED, wrong[0])
    return Finding(DONE, f"{cases} cases measured so far")


def rows_of(folder: Path, identity: dict[str, str]) -> list[Row]:
    """Rows of this commit, machine and preset."""
    if not (folder / CSV_NAME).exists():
        return []
    names = ("commit", "machine", "preset")
    wanted = tuple(identity[name] for name in names)
    return [row for row in read_csv(folder) if tuple(getattr(row, name) for name in names) == wanted]
