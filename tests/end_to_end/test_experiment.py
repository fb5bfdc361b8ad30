"""A small grid from the command line: it is finished once, goes on where it was cut off, and fails cell by cell."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coars_fast import experiment
from coars_fast.experiments import runner
from tests import tiny

ROOT = Path(__file__).parents[2]
FILE = """
seeds = [3]
compare = "full"
[base]
{base}
[per_seed]
seed = "{{seed}}"
[datasets.small]
[variants.start]
train.num_steps = 0
[variants.full]
train.num_steps = {steps}
[variants.bare]
train.num_steps = 1
loss.credit_weight = 0
"""


def write(folder: Path, *, steps: int = 2, more: str = "") -> Path:
    base = [
        f"{name.replace('-', '_')} = {value if value[0].isdigit() else repr(value)}"
        for name, value in tiny.TINY_FLAGS.items()
    ]
    (folder / "grid.toml").write_text(FILE.format(base="\n".join(base), steps=steps) + more)
    return folder / "grid.toml"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells' processes import what this one does."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'kernels'}{os.pathsep}{ROOT}")


def values(path: Path) -> dict[tuple[str, str, str], str]:
    with open(path, newline="") as file:
        return {(row["variant"], row["when"], row["metric"]): row["value"] for row in csv.DictReader(file)}


def test_a_grid_is_run_once_and_its_cells_share_what_they_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write(tmp_path), tmp_path / "out"
    arguments = [str(file), "--out", str(out)]
    experiment.main([*arguments, "--dry-run"])
    printed = capsys.readouterr().out
    assert "small/3/start: to run" in printed and "--loss.credit-weight 0.0" in printed and not out.exists()
    experiment.main([*arguments, "--jobs", "2"])
    printed = capsys.readouterr().out
    assert "3 cells, 0 finished, 3 to run" in printed and "3 of 3 cells are finished" in (out / "table.md").read_text()
    logs = {name: (out / "runs" / "small" / "3" / name / "train.log").read_text() for name in ("start", "full", "bare")}
    assert "evaluation before 100/100" in logs["start"]
    for name in ("full", "bare"):
        assert "SASRec from" in logs[name] and "evaluation before from" in logs[name]
        assert "evaluation after 100/100" in logs[name]
    found = values(out / "cells.csv")
    for (variant, when, metric), value in found.items():
        if when == "before" or variant == "start":
            assert value == found["start", "after", metric], "all begin as `start` is"
    begun = {path: path.stat().st_mtime_ns for path in out.glob("runs/**/evaluation.json")}
    experiment.main(arguments)
    assert "3 cells, 3 finished, 0 to run" in capsys.readouterr().out
    assert begun == {path: path.stat().st_mtime_ns for path in out.glob("runs/**/evaluation.json")}
    # Other settings: refused, or run again.
    write(tmp_path, steps=3)
    with pytest.raises(SystemExit):
        experiment.main(arguments)
    refused = capsys.readouterr().err
    assert "small/3/full: train.num_steps was 2, now 3" in refused and "--rerun-changed" in refused
    experiment.main([*arguments, "--rerun-changed"])
    config = json.loads((out / "runs" / "small" / "3" / "full" / "config.json").read_text())
    assert config["train"]["num_steps"] == 3


def test_a_cell_that_fails_is_named_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write(tmp_path, more='[variants.broken]\nmodel.path = "no/such/model"\n'), tmp_path / "out"
    with pytest.raises(SystemExit) as exit_status:
        experiment.main([str(file), "--out", str(out), "--only", "broken", "start"])
    assert exit_status.value.code == 1
    assert "failed: small/3/broken: error: no/such/model" in capsys.readouterr().out
    page = (out / "table.md").read_text()
    assert "broken (small, seeds 3): failed: error: no/such/model" in page and "| start |" in page


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_cell_that_was_cut_off_goes_on(tmp_path: Path, number: int) -> None:
    file, out = write(tmp_path, steps=12), tmp_path / "out"
    command = [sys.executable, "-m", "coars_fast.experiment", str(file), "--out", str(out), "--only", "full"]
    checkpoints = out / "runs" / "small" / "3" / "full" / "checkpoints"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _wait_for(lambda: (checkpoints / "step-000002").is_dir())
        if number == signal.SIGKILL:  # the cell dies; the experiment reports it
            os.kill(json.loads((checkpoints.parent / "run.lock").read_text())["pid"], signal.SIGKILL)
        else:
            process.send_signal(number)
        assert process.wait(timeout=60) == (1 if number == signal.SIGKILL else 130)
    assert not (checkpoints / "step-000012").exists()
    experiment.main([str(file), "--out", str(out), "--only", "full"])
    log = (checkpoints.parent / "train.log").read_text()
    assert log.count("evaluation before 100/100 disc 1:9") == 1, "the second attempt went on"
    steps = [json.loads(line) for line in (checkpoints.parent / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps if record["kind"] == "train"] == list(range(1, 13))


def test_two_experiments_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write(tmp_path), tmp_path / "out"
    with runner.Grid(out, ())._held(), pytest.raises(SystemExit):
        experiment.main([str(file), "--out", str(out)])
    assert "another process runs an experiment here" in capsys.readouterr().err


def _wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
