"""`python -m pytest bench/`: options, one test per case, and files of results.

    python -m pytest bench/ --preset cpu
    python -m pytest bench/test_head.py --preset smoke --bench-out somewhere
    python -m pytest bench/ --bench-out somewhere --bench-resume --bench-seconds 300

A bench file has `cases(preset)`, a list of `Case`, and a test that hands each to the fixture `measured`. After every
case the CSV is written, at the end the JSON, the table and the plots. The times are interleaved across variants, which
pytest-benchmark's own loops cannot do: they are put into its statistics from outside, one record per variant, and its
JSON is written by its own hook, without the host's name. Without pytest-benchmark there is no JSON, and a line says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.presets import MEASURED, NO_TIME, PRESETS, BenchError, choose_preset

RESULTS = Path(__file__).parent / "results"
JSON_NAME = "benchmark.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--preset", help=f"sizes: {', '.join(PRESETS)} (default: h100 with a GPU, else smoke)")
    group.addoption(
        "--bench-out", type=Path, help="folder of results (default: bench/results/<machine>/<date>; smoke: none)"
    )
    group.addoption(
        "--bench-resume", action="store_true", help="leave out what this commit measured on this machine before"
    )
    group.addoption("--bench-seconds", type=float, help="begin no case after so many seconds")
    group.addoption("--bench-commit", help="what is written down as the commit (default: asked of git)")


class Session:
    """Preset, output folder and rows of one run."""

    def __init__(self, config: pytest.Config):
        import torch

        from bench.results import machine_slug, state_commit, today

        stated: str | None = config.getoption("--bench-commit")
        if stated:
            state_commit(stated)
        self.preset = choose_preset(config.getoption("--preset"), torch.cuda.is_available())
        self.folder: Path | None = config.getoption("--bench-out")
        if self.folder is None and self.preset.name != "smoke":
            self.folder = RESULTS / machine_slug() / today()
        self.rows: list[Any] = []
        self.resume = bool(config.getoption("--bench-resume"))
        seconds: float | None = config.getoption("--bench-seconds")
        self.deadline = math.inf if seconds is None else time.monotonic() + seconds

    def left_out(self, case: Any) -> str:
        """Why a case is not run; empty if it is."""
        from bench.results import CSV_NAME, commit, machine_slug, read_csv

        if self.resume and self.folder is not None and (self.folder / CSV_NAME).exists():
            here = (commit(), machine_slug())
            rows = [row for row in read_csv(self.folder) if (row.commit, row.machine) == here]
            measured = {row.key for row in rows if row.kind != "ours" or row.status == "ok"}
            if all(case.key(self.preset, variant.name) in measured for variant in case.variants):
                return MEASURED
        return NO_TIME if time.monotonic() > self.deadline else ""

    def add(self, rows: list[Any]) -> None:
        """Keep rows, and write them where there is a folder."""
        from bench.results import CSV_NAME, merge, read_csv, to_csv, write_beside

        self.rows += rows
        if self.folder is not None:
            path = self.folder / CSV_NAME
            write_beside(path, to_csv(merge(read_csv(path) if path.exists() else [], rows)))


SESSION = pytest.StashKey[Session]()


def pytest_configure(config: pytest.Config) -> None:
    try:
        config.stash[SESSION] = Session(config)
    except BenchError as error:
        raise pytest.UsageError(str(error)) from None
    if hasattr(config.option, "benchmark_quiet"):
        config.option.benchmark_quiet = True  # its table would show times where only ratios mean something


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.cases(metafunc.config.stash[SESSION].preset)
        metafunc.parametrize("case", cases, ids=[case.id for case in cases])


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Iterator[Callable[[Any], Any]]:
    """Run a case; fails with what went wrong, after everything else of it was measured and written."""
    from bench.harness import run_case

    session = request.config.stash[SESSION]
    plugin = request.config.pluginmanager.hasplugin("benchmark")
    fixture = request.getfixturevalue("benchmark") if plugin else None

    def run(case: Any) -> Any:
        reason = session.left_out(case)
        if reason:
            pytest.skip(reason)
        outcome = run_case(case, session.preset)
        session.add(outcome.rows)
        if fixture is not None:
            _record(fixture, outcome)
        if outcome.problems:
            pytest.fail("\n".join(outcome.problems), pytrace=False)
        return outcome

    yield run


def _record(fixture: Any, outcome: Any) -> None:
    """Put times that were taken from outside into pytest-benchmark's statistics, one record per variant."""
    from dataclasses import asdict

    fixture._mode = "interleaved"  # otherwise it warns that it was not used
    rows = {row.variant: row for row in outcome.rows}
    for variant, seconds in outcome.seconds.items():
        stats = fixture._make_stats(iterations=1)
        stats.name, stats.fullname = (f"{name}[{variant}]" for name in (stats.name, stats.fullname))
        # Inputs are no JSON; what identifies the case is in the row.
        stats.group, stats.param, stats.params = rows[variant].op, None, None
        stats.extra_info = asdict(rows[variant])
        for value in seconds:
            stats.update(value)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """No host names, nor the kernel's, in files that are shown to others."""
    for name in ("node", "release"):
        machine_info.pop(name, None)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    from bench.report import table, write_report

    session = config.stash[SESSION]
    if not session.rows:
        return
    terminalreporter.write_line("")
    terminalreporter.write_line(table(session.rows))
    if session.folder is not None:
        if config.pluginmanager.hasplugin("benchmark"):
            _write_json(config, session.folder / JSON_NAME)
        else:
            terminalreporter.write_line("no JSON: pytest-benchmark is not installed (pip install -e '.[bench]')")
        write_report(session.folder)
        terminalreporter.write_line(f"results: {session.folder}")


def _write_json(config: pytest.Config, path: Path) -> None:
    """pytest-benchmark's JSON of this run, by its own hooks."""
    import json

    from bench.results import write_beside

    benchmarks: Any = config._benchmarksession  # type: ignore[attr-defined]
    commit_info = config.hook.pytest_benchmark_generate_commit_info(config=config)
    output = config.hook.pytest_benchmark_generate_json(
        config=config,
        benchmarks=[record for record in benchmarks.benchmarks if record],
        include_data=True,
        machine_info=benchmarks.get_machine_info(),
        commit_info={key: commit_info.get(key) for key in ("id", "time", "dirty")},
    )
    if path.exists():  # a run that goes on in a folder keeps what it does not measure again
        measured = {record["fullname"] for record in output["benchmarks"]}
        earlier = json.loads(path.read_text())["benchmarks"]
        output["benchmarks"] = [r for r in earlier if r["fullname"] not in measured] + output["benchmarks"]
    write_beside(path, json.dumps(output, indent=1, default=str) + "\n")
