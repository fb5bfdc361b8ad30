"""Kernel tests in processes of their own: a few first, then all that know of a GPU, one file after the other.

On a CPU, where the GPU's tests skip themselves, the few are those of one operation. Left out: the interpreter's tests
and the compiler's, which need no GPU.
"""

from __future__ import annotations

import importlib.util
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.acceptance.work import CUT_OFF, DONE, FAILED, ROOT, Finding, Work, python

TESTS = Path("tests/kernels")
SHORT = {
    True: (
        "tests/kernels/test_head_gpu.py", "tests/kernels/test_head_gpu_op.py", "tests/kernels/test_credit_cuda.py",
        "-k", "300-32000-256 or (several_chunks and 4096) or (equals_float64 and absent0)",
    ),
    False: ("tests/kernels/test_paired_linear_logprob.py",),
}  # fmt: skip
"""Arguments of pytest, with a GPU and without."""
REPLAYS = Path("tests/parity/test_rollout_cuda.py")
"""What CUDA graphs of the rollout replay; begins the long part."""
NOTHING_COLLECTED = 5
WORKERS = 8


def short(work: Work) -> Finding:
    """One size of each operation."""
    work.once("short", lambda: run_pytest(work, "short", SHORT[work.cuda], workers=True))
    return _finding(work)


def everything(work: Work) -> Finding:
    """Every file, those that are for a GPU first; on a CPU together, since most of it skips itself."""
    files = [REPLAYS, *gpu_files(ROOT / TESTS)]
    for group in [[file] for file in files] if work.cuda else [files]:
        name = group[0].stem if work.cuda else "all files"
        if name not in work.record.results and work.left() < 5.0:
            return Finding(CUT_OFF, f"{len(work.record.results)} of {len(files)} files")
        work.once(name, lambda name=name, group=group: run_pytest(work, name, group, workers=True))
    return _finding(work)


def gpu_files(folder: Path) -> list[Path]:
    """Test files that speak of CUDA, by name or inside, those of the head first; relative to the repository."""
    files = sorted(path for path in folder.glob("test_*.py") if "cuda" in path.read_text().lower())
    return [path.relative_to(ROOT) for path in sorted(files, key=_rank)]


def _rank(path: Path) -> tuple[bool, bool]:
    return not ("gpu" in path.stem or "cuda" in path.stem), "head" not in path.stem


def run_pytest(work: Work, name: str, arguments: Sequence[object], *, workers: bool = False) -> dict[str, Any]:
    """Counts of a run, and the first tests that failed; by several processes on a GPU, where that is wanted."""
    report = work.out / f"{work.name}-{name.replace(' ', '-')}.xml"
    report.unlink(missing_ok=True)
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", "--durations=5"]
    if work.cuda and workers and importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(WORKERS)]  # most of the time goes to compiling kernels
    code, _ = work.command(python("-m", "pytest", *arguments, *options))
    found = counts(report)
    if code is None:
        found["stopped"] = True
    elif code not in (0, 1, NOTHING_COLLECTED) or (code and not found["failed"] and code != NOTHING_COLLECTED):
        found["failed"].append(f"pytest ended with status {code}")
    return found


def counts(report: Path) -> dict[str, Any]:
    """Passed, skipped with reasons, and failed tests of a JUnit file; a missing file has none."""
    found: dict[str, Any] = {"passed": 0, "skipped": {}, "failed": []}
    if not report.exists():
        return found
    for case in ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            found["failed"].append(f"{case.get('classname')}::{case.get('name')}")
        elif skipped is not None:
            reason = skipped.get("message") or ""
            found["skipped"][reason] = found["skipped"].get(reason, 0) + 1
        else:
            found["passed"] += 1
    return found


def _finding(work: Work) -> Finding:
    results = work.record.results
    failed = [name for found in results.values() for name in found["failed"]]
    skipped = sum(sum(found["skipped"].values()) for found in results.values())
    summary = f"{sum(found['passed'] for found in results.values())} passed, {len(failed)} failed, {skipped} skipped"
    if failed:
        return Finding(FAILED, f"{summary}: {', '.join(failed[:3])}")
    stopped = [name for name, found in results.items() if found.get("stopped")]
    for name in stopped:  # so that they are run again
        del results[name]
    return Finding(CUT_OFF, f"{summary}; stopped in {', '.join(stopped)}") if stopped else Finding(DONE, summary)
