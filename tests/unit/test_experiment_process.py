"""Processes of cells: forked from one that has imported everything, and else as if they had been started afresh."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest

from coars_fast.experiments.process import IMPORTS, ONE_THREAD, start_training

# What would break in a fork: threads, and a GPU that was asked for (torch then refuses it in the children).
IMPORT_ALL = f"""
import importlib, os, torch

def refuse(*args, **kwargs):
    raise AssertionError("an import asked for a GPU")

for name in ("is_available", "device_count", "current_device", "get_device_capability", "_lazy_init", "init"):
    setattr(torch.cuda, name, refuse)
for name in {IMPORTS!r}:
    importlib.import_module(name)
print(len(os.listdir("/proc/self/task")), "thread")
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_what_is_imported_before_a_fork_starts_no_thread_and_asks_for_no_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        env=os.environ | ONE_THREAD,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1 thread"


def test_a_process_has_this_ones_folder_environment_and_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "train.log"
    log.write_text("said before\n")
    (tmp_path / "broken.toml").write_text("this is no TOML")
    for column in ("60", "160"):  # the server is as it was for the first of them
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", column)
        before = dict(os.environ)
        process = start_training(["--preset", "broken.toml"], log)
        process.join(120)
        assert process.exitcode == 2 and dict(os.environ) == before
    said = log.read_text()
    assert said.startswith("said before\n") and said.count("error: broken.toml: not a TOML file") == 2
    process = start_training(["--help"], log)
    process.join(120)
    assert process.exitcode == 0 and max(map(len, log.read_text().splitlines())) > 120, "COLUMNS is 160"


def test_cells_have_one_thread(tmp_path: Path) -> None:
    start_training(["--preset", "none"], tmp_path / "train.log").join(120)
    server = Path(f"/proc/{forkserver._forkserver._forkserver_pid}/environ")  # type: ignore[attr-defined]
    if not server.is_file():
        pytest.skip("reads the server's environment in /proc")
    environment = server.read_bytes().decode().split("\0")
    assert {f"{name}={value}" for name, value in ONE_THREAD.items()} <= set(environment)
