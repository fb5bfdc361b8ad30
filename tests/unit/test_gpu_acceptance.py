"""`bench.gpu_acceptance`: order, time, going on, crashes, what the verdict says. The whole command is marked slow."""

from __future__ import annotations

import importlib
import json
import stat
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_acceptance, test_head
from bench.acceptance import benches, kernel_tests, sanitizer, tuning, verdict
from bench.acceptance.parts import PARTS, Part
from bench.acceptance.work import CUT_OFF, DONE, FAILED, SKIPPED, Finding, Record, Work, python, read_json, write_json
from bench.gpu_acceptance import Run, allowance, run_logged
from bench.presets import NO_TIME
from bench.results import Row, to_csv

IDENTITY = {"preset": "h100", "commit": "abc", "machine": "nvidia-h200", "torch": "2.11.0"}
ROW = Row(
    op="head", case="frozen", shape="R=64 V=100", dtype="float32", preset="h100", variant="ours", kind="ours",
    version="coars_kernels 0.1.0", status="ok", machine="nvidia-h200", threads=2, torch="2.11.0", date="2026-01-31",
    commit="abc",
)  # fmt: skip
PARTS_HERE = (Part("a", "first", 6, "x:y"), Part("b", "second", 3, "x:y"), Part("c", "third", 1, "x:y"))


class Played:
    """A run whose parts are scripted: name -> findings in order, each taking some seconds of a clock of its own."""

    def __init__(self, out: Path, script: Mapping[str, Sequence[tuple[str, float]]], minutes: float = 10.0):
        self.now, self.script = 0.0, {name: list(steps) for name, steps in script.items()}
        self.calls: list[tuple[str, float]] = []
        self.lines: list[str] = []
        self.verdicts: list[str] = []
        self.run = Run(
            out, 60 * minutes, dict(IDENTITY), True, clock=lambda: self.now, say=self.lines.append, start=self.start
        )

    def start(self, run: Run, part: Part, limit: float) -> Finding:
        status, seconds = self.script[part.name].pop(0)
        self.calls.append((part.name, round(limit)))
        if (run.out / verdict.FILE).exists():
            self.verdicts.append((run.out / verdict.FILE).read_text())
        self.now += seconds
        return Finding(status, f"{part.name} says so")

    def play(self, parts: Sequence[Part] = PARTS_HERE) -> dict[str, str]:
        self.run.play([part for part in parts if not self.run.finished(part)])
        return {name: state["status"] for name, state in self.run.states.items()}


# ---------------------------------------------------------------------------------------------------------- the command


def test_time_is_shared_and_what_is_left_goes_on(tmp_path: Path) -> None:
    played = Played(tmp_path, {"a": [(DONE, 100.0)], "b": [(DONE, 20.0)], "c": [(DONE, 1.0)]})
    assert played.play() == {"a": DONE, "b": DONE, "c": DONE}
    # 6, 3, 1 of 600 s; then 3, 1 of the 500 that are left; then all of the 480.
    assert played.calls == [("a", 360), ("b", 375), ("c", 480)]


def test_no_part_gets_less_than_is_worth_beginning() -> None:
    assert allowance(100.0, 1, [99]) == gpu_acceptance.LEAST_SECONDS
    assert allowance(12.0, 1, [99]) == 12.0


def test_what_was_cut_off_goes_on_after_the_others_as_long_as_there_is_time(tmp_path: Path) -> None:
    script = {"a": [(CUT_OFF, 360.0), (CUT_OFF, 100.0), (DONE, 30.0)], "b": [(DONE, 20.0)], "c": [(DONE, 1.0)]}
    played = Played(tmp_path, script)
    assert played.play() == {"a": DONE, "b": DONE, "c": DONE}
    assert [name for name, _ in played.calls] == ["a", "b", "c", "a", "a"]
    played = Played(tmp_path / "b", {"a": [(CUT_OFF, 360.0), (CUT_OFF, 230.0)], "b": [(DONE, 5.0)], "c": [(DONE, 1.0)]})
    assert played.play() == {"a": CUT_OFF, "b": DONE, "c": DONE}


def test_a_second_call_does_what_is_left(tmp_path: Path) -> None:
    first = Played(tmp_path, {"a": [(DONE, 1.0)], "b": [(FAILED, 595.0)]})
    assert first.play() == {"a": DONE, "b": FAILED, "c": CUT_OFF}
    assert "not begun" in first.lines[-1]
    second = Played(tmp_path, {"c": [(DONE, 1.0)]})
    assert second.play() == {"a": DONE, "b": FAILED, "c": DONE}
    assert json.loads((tmp_path / "state.json").read_text())["parts"]["c"]["summary"] == "c says so"


@pytest.mark.parametrize("name", list(IDENTITY))
def test_another_commit_machine_preset_or_torch_begins_anew(tmp_path: Path, name: str) -> None:
    Played(tmp_path, {"a": [(DONE, 1.0)], "b": [(DONE, 1.0)], "c": [(DONE, 1.0)]}).play()
    again = Played(tmp_path, {"a": [(DONE, 1.0)], "b": [(DONE, 1.0)], "c": [(DONE, 1.0)]})
    again.run.identity[name] = "another"
    again.play()
    assert len(again.calls) == 3


def test_a_damaged_state_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"parts": {"a": ')
    assert Played(tmp_path, {"a": [(DONE, 1.0)]}).play(PARTS_HERE[:1]) == {"a": DONE}


def test_the_verdict_is_written_after_every_part(tmp_path: Path) -> None:
    played = Played(tmp_path, {"a": [(DONE, 1.0)], "b": [(FAILED, 1.0)], "c": [(DONE, 1.0)]})
    played.play()
    assert len(played.verdicts) == 2 and (tmp_path / verdict.FILE).exists()


def test_what_is_missing_is_skipped_with_the_reason(tmp_path: Path) -> None:
    parts = [replace(PARTS_HERE[0], needs=("a_module_that_nobody_has",)), replace(PARTS_HERE[1], needs_gpu=True)]
    played = Played(tmp_path, {})
    played.run.cuda = False
    assert played.play(parts) == {"a": SKIPPED, "b": SKIPPED}
    summaries = [played.run.states[name]["summary"] for name in "ab"]
    assert summaries == ["not installed: a_module_that_nobody_has", "no GPU here"]
    assert not played.run.finished(parts[0])  # it may be installed by the next call


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "0", "--out", "x"], "--minutes: 0 is not a time"),
        (["--minutes", "nan", "--out", "x"], "--minutes: nan is not a time"),
        (["--minutes", "soon", "--out", "x"], "invalid float value: 'soon'"),
        (["--parts", "tests,benches", "--out", "x"], "--parts: no part 'benches'; choose tests_short, bench_head"),
        (["--preset", "laptop", "--out", "x"], "--preset: no preset 'laptop'; choose smoke, cpu, h100"),
        ([], "--out: say where results go"),
        (["--out", f"{__file__}/inside"], "cannot be written: Not a directory"),
    ],
)
def test_bad_input_is_one_clear_line(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert gpu_acceptance.main(arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_the_list_names_every_part_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_acceptance.main(["--list", "--minutes", "9"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [part.name for part in PARTS]
    assert sum(float(line.split()[1]) for line in lines) == pytest.approx(9.0, abs=0.5)


def test_every_part_has_its_function() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
    for part in PARTS:
        module, _, function = part.run.partition(":")
        assert callable(getattr(importlib.import_module(f"bench.acceptance.{module}"), function)) and part.share > 0


# ------------------------------------------------------------------------------------------------------------ processes


def test_a_process_that_crashes_is_a_part_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = python("-c", "import os; print('about to', flush=True); os.abort()")
    monkeypatch.setattr(gpu_acceptance, "python", lambda *_: crash)
    run = Run(tmp_path, time.monotonic() + 60, dict(IDENTITY))
    stale = Record(tmp_path / "a.json", dict(IDENTITY), {"kept": 1})
    stale.end(Finding(DONE, "an old answer"))
    finding = gpu_acceptance.run_process(run, PARTS_HERE[0], 30.0)
    assert finding == Finding(FAILED, "its process ended with status -6; a.log")
    assert "about to" in (tmp_path / "a.log").read_text()
    assert Record.open(tmp_path / "a.json", dict(IDENTITY)).results == {"kept": 1}


def test_a_process_over_its_limit_is_stopped_with_its_commands(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    inner = f"import time; time.sleep(3); open({str(alive)!r}, 'w')"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    begun = time.monotonic()
    assert run_logged(python("-c", outer), tmp_path / "log", 0.5) is None
    assert time.monotonic() - begun < 3.0
    time.sleep(3.5 - (time.monotonic() - begun))
    assert not alive.exists()


def work_in(out: Path, *, cuda: bool = False, seconds: float = 60.0, name: str = "part") -> Work:
    record = Record(out / f"{name}.json", dict(IDENTITY))
    return Work(name, out, "smoke", cuda, record, time.monotonic() + seconds)


def test_a_command_ends_with_the_time_and_its_output_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output = work_in(tmp_path, seconds=0.0).command(
        python("-c", "import time; print('begun', flush=True); time.sleep(30)")
    )
    assert code is None
    assert output in ("begun\n", "") and output in capsys.readouterr().out
    assert work_in(tmp_path).command(python("-c", "print(3); exit(4)")) == (4, "3\n")


def test_results_are_kept_one_by_one(tmp_path: Path) -> None:
    calls: list[str] = []

    def compute() -> str:
        calls.append("x")
        return "y"

    assert work_in(tmp_path).once("key", compute) == "y"
    again = work_in(tmp_path)
    again.record = Record.open(again.record.path, dict(IDENTITY))
    assert again.once("key", compute) == "y" and calls == ["x"]
    assert Record.open(again.record.path, {**IDENTITY, "commit": "def"}).results == {}


# ---------------------------------------------------------------------------------------------------------------- parts


def test_pytest_is_counted_by_its_report(tmp_path: Path) -> None:
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n"
        "@pytest.mark.skip(reason='no time is left')\ndef test_c(): pass\n"
    )
    found = kernel_tests.run_pytest(work_in(tmp_path), "some", [tests])
    (failed,) = found.pop("failed")
    assert failed.endswith("test_some::test_b"), "after folders, where the checkout and the file have some in common"
    assert found == {"passed": 1, "skipped": {"no time is left": 1}}
    nothing = kernel_tests.run_pytest(work_in(tmp_path), "none", [tests, "-k", "nothing_of_this_name"])
    assert nothing == {"passed": 0, "skipped": {}, "failed": []}
    broken = kernel_tests.run_pytest(work_in(tmp_path), "broken", [tmp_path / "not_there.py"])
    assert broken["failed"] == ["pytest ended with status 4"]


def test_the_gpus_tests_come_first() -> None:
    names = [path.stem for path in kernel_tests.gpu_files(kernel_tests.ROOT / kernel_tests.TESTS)]
    assert {"test_head_gpu", "test_head_gpu_op", "test_credit_cuda"} <= set(names)
    assert names.index("test_head_gpu") < names.index("test_env_report")


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ({}, "done"),
        ({"failed": ["a test"]}, "failed"),
        ({"failed": ["a test"], "stopped": True}, "cut off"),
        ({"failed": ["a test"], "skipped": {NO_TIME: 2}}, "cut off"),
        ({"skipped": {"needs another GPU": 2}}, "done"),
    ],
)
def test_what_was_cut_off_is_gone_on_with_even_where_something_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], status: str
) -> None:
    monkeypatch.setattr(benches, "run_pytest", lambda *_: {"passed": 1, "failed": [], "skipped": {}} | found)
    work = Work("bench_rest", tmp_path, "smoke", False, Record(tmp_path / "bench_rest.json", IDENTITY), 1e12)
    finding = benches.run_bench(work, benches.HEAD)
    assert finding.status == status and ("a test" in finding.summary) == ("failed" in found)


def test_a_benches_failure_is_its_own_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the same folder that another part measured are that part's to tell of, also in a later call."""
    rows = {"test_head": ROW, "test_step": replace(ROW, op="step", status="refused", reason="wrong result")}
    monkeypatch.setattr(benches, "rows_of", lambda *_: list(measured))
    measured: list[Row] = []

    def run(work: Work, name: str, arguments: object) -> dict[str, Any]:
        measured.append(rows[name]) if rows[name] not in measured else None
        return {"passed": 1, "failed": [], "skipped": {}}

    monkeypatch.setattr(benches, "run_pytest", run)
    for _ in range(2):
        for part, file, status in (("head", "test_step", "failed"), ("rest", "test_head", "done")):
            record = Record.open(tmp_path / f"{part}.json", IDENTITY)
            finding = benches.run_bench(Work(part, tmp_path, "smoke", False, record, 1e12), Path(f"bench/{file}.py"))
            assert finding.status == status, (part, finding)


def test_the_worst_finding_is_told() -> None:
    done, failed, cut_off = (Finding(status, status) for status in ("done", "failed", "cut off"))
    assert benches.worst([done, failed, cut_off]) == cut_off and benches.worst([done, failed]) == failed
    assert benches.worst([done, done]) == done


def test_the_main_case_is_the_heads_main_size() -> None:
    for preset, expression in benches.MAIN_CASE.items():
        rows, hidden, vocab = test_head.SIZES[preset]
        assert expression.endswith(f"R{rows}-H{hidden}-V{vocab}")


def fake_tool(folder: Path, text: str) -> str:
    path = folder / "compute-sanitizer"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        ("echo called: x; echo '========= ERROR SUMMARY: 0 errors'", DONE, "memcheck: 0 errors in 1 calls"),
        ("echo '========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)'", DONE, "0 errors"),
        ("echo '========= ERROR SUMMARY: 3 errors'; exit 86", FAILED, "memcheck: 3 errors"),
        ("echo '========= Error: Device not supported'; exit 1", SKIPPED, "could not look: ========= Error: Device"),
    ],
)
def test_the_sanitizers_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, status: str, words: str
) -> None:
    monkeypatch.setattr(sanitizer, "find_tool", lambda: fake_tool(tmp_path, script))
    finding = sanitizer.run(work_in(tmp_path, cuda=True))
    assert finding.status == status and words in finding.summary


def tuned(fused: float, shipped: float, best: float) -> dict[str, Any]:
    """Results at one shape: times of both paths, and of the shipped and the best tiles."""
    times = {"128 256 64 16 8 4 1": shipped, "128 256 64 8 8 4 1": best}
    both = {
        "ms": {"library": 10.0, "fused": fused}, "config": "128 256 64 8 8 4 1", "shipped": "128 256 64 16 8 4 1",
        "table": [90, 2], "auto": "library", "capability": [9, 0],
    }  # fmt: skip
    return {"tiles, s": {"chunk": 1, "ms": times, "not_timed": {}}, "both, s": both}


def test_what_tuning_proposes() -> None:
    faster, configs = tuning.proposal(tuned(fused=8.0, shipped=2.0, best=1.5))
    assert faster == ["FUSED_IS_FASTER = frozenset({(90, 2)})"]
    assert configs == ["(90, 2): FusedConfig(128, 256, 64, 8, 8, 4, 1),"]
    faster, configs = tuning.proposal(tuned(fused=9.9, shipped=1.51, best=1.5))
    assert faster == ["FUSED_IS_FASTER = frozenset()"]
    assert configs == ["(90, 2): FusedConfig(128, 256, 64, 16, 8, 4, 1),"]
    assert tuning.proposal({}) == ([], [])


# -------------------------------------------------------------------------------------------------------------- verdict


HEAD = Row(
    op="fused_credit_loss", case="credit and clipped loss, frozen head", shape="R=16384 H=3584 V=152064",
    dtype="bfloat16", preset="h100", variant="fused_credit_loss", kind="ours", version="1", status="ok", median=0.080,
    p20=0.079, p80=0.081, ratio=1.08, peak_mib=1200.0, error=0.3, machine="nvidia-h200", threads=8, torch="2.11.0",
    date="2026-01-31", commit="abc",
)  # fmt: skip
EAGER = replace(HEAD, variant="eager log_softmax", kind="rival", median=0.2, ratio=2.7, peak_mib=40000.0, error=0.5)
FLOOR = replace(HEAD, variant="three bare mm", kind="floor", median=0.074, ratio=1.0, error=None, tflops=724.0)
DECODE = replace(
    HEAD, op="decode", case="Qwen2.5-7B shape, random weights", shape="B=256 T=2000 n=16", ratio=1.5,
    tokens_per_s=12000.0,
)  # fmt: skip


def judged(out: Path, *rows: Row, cuda: bool = True) -> dict[str, tuple[str, str]]:
    """What is asked -> measured, holds."""
    folder = out / benches.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.csv").write_text(to_csv(rows))
    text = verdict.write(out, dict(IDENTITY), cuda).read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: (row[2], row[3]) for row in cells if len(row) == 5}


def test_the_verdict_holds_figures_against_what_is_wanted(tmp_path: Path) -> None:
    found = judged(tmp_path, HEAD, EAGER, FLOOR, DECODE)
    assert found["head of a step, R=16384 H=3584 V=152064"] == ("1.08", "yes")
    assert found["head against the fastest rival with the same outputs"] == ("2.50 (eager log_softmax)", "yes")
    assert found["peak memory of the head"] == ("1200 MiB", "yes")
    assert found["peak memory against eager"] == ("0.030", "yes")
    assert found["decoding, Qwen2.5-7B shape, 256 rows of 2000 tokens"] == (
        "67%, 12,000 tokens/s (B=256 T=2000 n=16)",
        "yes",
    )
    assert found["step, large shape, against a row per turn"] == ("not measured", "not measured")
    slower = judged(tmp_path, replace(HEAD, median=0.1, ratio=1.35, peak_mib=9000.0), replace(EAGER, median=0.11))
    assert [slower[name][1] for name in slower if "head" in name and "linear" not in name][:3] == ["no", "no", "no"]


def test_a_smaller_size_does_not_count_for_a_line_about_a_size(tmp_path: Path) -> None:
    found = judged(tmp_path, replace(DECODE, shape="B=32 T=2000 n=16"))
    assert found["decoding, Qwen2.5-7B shape, 256 rows of 2000 tokens"][1] == "not measured"
    lost = replace(DECODE, status="failed", reason="OutOfMemoryError: x", median=None, ratio=None)
    assert judged(tmp_path, lost)["decoding, Qwen2.5-7B shape, 256 rows of 2000 tokens"] == (
        "failed: OutOfMemoryError: x",
        "not measured",
    )


def test_nothing_holds_on_a_cpu_and_other_commits_do_not_count(tmp_path: Path) -> None:
    found = judged(tmp_path, HEAD, EAGER, FLOOR, cuda=False)
    assert found["head of a step, R=16384 H=3584 V=152064"] == ("1.08", "not measured")
    assert {answer for _, answer in found.values()} <= {"not measured", "holds"}
    found = judged(tmp_path, replace(HEAD, commit="def"))
    assert found["head of a step, R=16384 H=3584 V=152064"] == ("not measured", "not measured")


def test_failed_tests_and_parts_that_did_not_run_show(tmp_path: Path) -> None:
    results = {"short": {"passed": 5, "skipped": {}, "failed": ["test_x::test_y"]}}
    Record(tmp_path / "tests_short.json", dict(IDENTITY), results).write()
    state = asdict(Finding(FAILED, "5 passed, 1 failed")) | {"seconds": 3.0, "identity": IDENTITY}
    write_json(tmp_path / "state.json", {"parts": {"tests_short": state}})
    found = judged(tmp_path, HEAD)
    assert found["kernel tests, one size each"] == ("5 passed, 1 failed", "no")
    text = (tmp_path / verdict.FILE).read_text()
    assert "| tests_short | failed | 3 | 5 passed, 1 failed |" in text and "| tuning | not run | | |" in text


# ------------------------------------------------------------------------------------------------------------ the whole


def command(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    texts = [sys.executable, "-m", "bench.gpu_acceptance", "--out", str(out), "--commit", "abc", *arguments]
    return subprocess.run(texts, cwd=kernel_tests.ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_whole_command_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = command(out, "--minutes", "6", "--preset", "smoke")
    assert found.returncode == 0, found.stdout + found.stderr
    states = read_json(out / "state.json")["parts"]
    assert {state["status"] for state in states.values()} <= {DONE, SKIPPED} and len(states) == len(PARTS)
    assert (out / "bench" / "table.md").exists() and (out / "tuning.md").exists() and (out / "profile.md").exists()
    assert "15 of 15 cases" in (out / verdict.FILE).read_text()
    again = command(out, "--minutes", "1", "--preset", "smoke")
    assert again.returncode == 0 and again.stdout.count("done earlier") >= 7


def test_a_part_by_its_name(tmp_path: Path) -> None:
    found = command(tmp_path, "--parts", "sanitizer", "--preset", "smoke", "--minutes", "2")
    assert found.returncode == 0, found.stdout + found.stderr
    assert list(read_json(tmp_path / "state.json")["parts"]) == ["sanitizer"]
