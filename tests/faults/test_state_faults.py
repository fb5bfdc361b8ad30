"""Kills, damage and second users of a run folder: what is on disk stays whole, and errors say what to do."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from coars_fast.errors import RunFolderError
from coars_fast.state import checkpoint, files
from coars_fast.state.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from coars_fast.state.run_folder import RunFolder

CONFIG = {"seed": 1, "train": {"num_steps": 5, "learning_rate": 0.1}}


class Killed(BaseException):
    """Stands for the end of the process."""


def raise_killed(*_args, **_kwargs):
    raise Killed


def save(folder: Path, step: int, **options) -> Path:
    return save_checkpoint(folder, step, {"x": {"v": torch.full((300,), float(step))}}, {"s": step}, **options)


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})


# Atomic writes


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failure_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "evaluation.json"
    files.atomic_write_text(path, "old")
    monkeypatch.setattr(files.os, call, raise_killed)
    with pytest.raises(Killed):
        files.atomic_write_text(path, "new, and longer")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# The lock


HOLD = """
    import sys, time
    from coars_fast.state.run_folder import RunFolder
    run = RunFolder.open(sys.argv[1], {"seed": 1}, resume=True)
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_by_another_process(tmp_path):
    with start(HOLD, tmp_path) as holder:
        try:
            assert holder.stdout and holder.stdout.readline() == "held\n"
            with pytest.raises(RunFolderError) as error:
                RunFolder.open(tmp_path, {"seed": 1}, resume=True)
            for part in (str(tmp_path), f"process {holder.pid} on ", "another --out"):
                assert part in str(error.value)
        finally:
            holder.send_signal(signal.SIGKILL)
    # A killed process holds nothing, though its run.lock is still there.
    RunFolder.open(tmp_path, {"seed": 1}, resume=True).close()


def test_the_lock_holds_within_a_process_and_ends_with_the_context(tmp_path):
    with RunFolder.open(tmp_path, CONFIG, resume=False):
        (tmp_path / "run.lock").write_text("")  # as if the holder had not written yet
        with pytest.raises(RunFolderError, match="in use by another process"):
            RunFolder.open(tmp_path, CONFIG, resume=True)
    RunFolder.open(tmp_path, CONFIG, resume=True).close()


def test_a_refused_folder_is_not_left_locked(tmp_path):
    RunFolder.open(tmp_path, CONFIG, resume=False).close()
    with pytest.raises(RunFolderError, match=r"holds a run already \(config.json\).*--resume auto.*another --out"):
        RunFolder.open(tmp_path, CONFIG, resume=False)
    RunFolder.open(tmp_path, CONFIG, resume=True).close()


def test_resume_with_other_settings(tmp_path):
    RunFolder.open(tmp_path, CONFIG, resume=False).close()
    other = {"seed": 2, "train": {"num_steps": 9, "learning_rate": 0.2}}
    with pytest.raises(RunFolderError) as error:
        RunFolder.open(tmp_path, other, resume=True)
    assert "seed was 1, now 2; train.learning_rate was 0.1, now 0.2." in str(error.value)
    assert "num_steps" not in str(error.value)
    assert files.read_json(tmp_path / "config.json") == CONFIG


def test_a_file_in_the_way_and_a_broken_config(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunFolderError, match="another --out"):
            RunFolder.open(path, CONFIG, resume=False)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunFolderError, match="config.json: not JSON"):
        RunFolder.open(tmp_path, CONFIG, resume=True)


# Records


def test_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [record["step"] for record in files.read_jsonl(path)] == [1, 2]
    with RunFolder.open(tmp_path, CONFIG, resume=True) as run:
        run.append_metrics({"step": 3})
        assert [record["step"] for record in files.read_jsonl(path)] == [1, 2, 3]
    path.write_bytes(b'{"step": 1}\n\x00\x00\x00\n')  # what a power cut can leave
    with RunFolder.open(tmp_path, CONFIG, resume=True) as run:
        run.truncate_after(5)
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("line", ["{oops", "[1]"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(RunFolderError, match="metrics.jsonl, line 2"):
        files.read_jsonl(path)


# Checkpoints


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in ("x.safetensors", "adapter/weights") for how in ("missing", "truncated", "flipped")]
    + [("meta.json", "missing"), ("meta.json", "truncated")],
)
def test_a_damaged_checkpoint_names_the_file_and_the_one_before(tmp_path, how, name):
    writers = {"adapter": lambda folder: (folder / "weights").write_bytes(bytes(100)) and None}
    first = save(tmp_path, 1, writers=writers)
    damaged = save(tmp_path, 2, writers=writers)
    damage(damaged / name, how)
    with pytest.raises(RunFolderError) as error:
        load_checkpoint(damaged)
    assert str(damaged / name) in str(error.value) and f"--resume {first}" in str(error.value)
    assert load_checkpoint(first)[0] == 1
    damage(first / name, how)
    with pytest.raises(RunFolderError, match="no checkpoint before it"):
        load_checkpoint(first)


def test_a_checkpoint_of_another_format(tmp_path):
    path = save(tmp_path, 1)
    content = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(RunFolderError, match="format 99; this version of coars_fast reads 1"):
        load_checkpoint(path)


@pytest.mark.parametrize("stage", ["save_file", "writer", "meta", "first rename", "second rename", "after"])
@pytest.mark.parametrize("step", [2, 1])
def test_a_save_that_is_killed_leaves_a_whole_checkpoint(tmp_path, monkeypatch, stage, step):
    """Step 2 beside an older checkpoint, and step 1 in its place, with no other one to go back to."""
    save(tmp_path, 1, keep=1)
    renames = []

    def rename(path, target, original=Path.rename):
        renames.append(path)
        if stage in ("first rename", "second rename") and len(renames) == (stage == "second rename") + 1:
            raise Killed
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    if stage == "save_file":
        monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", raise_killed)
    elif stage == "meta":
        monkeypatch.setattr(checkpoint, "atomic_write_text", raise_killed)
    elif stage == "after":
        monkeypatch.setattr(checkpoint, "_sweep", lambda home, keep=None: raise_killed() if keep else None)
    try:
        save(tmp_path, step, keep=1, writers={"w": raise_killed} if stage == "writer" else {})
    except Killed:
        pass
    monkeypatch.undo()
    found = find_checkpoint(tmp_path)
    assert found is not None
    number, tensors, _ = load_checkpoint(found)
    assert number in (1, step) and tensors["x"]["v"][0] == number
    assert load_checkpoint(save(tmp_path, 3, keep=1))[0] == 3
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


SAVE_FOREVER = """
    import itertools, sys
    import torch
    from coars_fast.state.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
    folder = sys.argv[1]
    found = find_checkpoint(folder)
    start = load_checkpoint(found)[0] if found else 0
    for step in itertools.count(start + 1):
        save_checkpoint(folder, step, {"x": {"v": torch.full((1000,), float(step))}}, {}, keep=1)
        print(step, flush=True)
"""


def test_sigkill_at_any_time_loses_no_finished_checkpoint(tmp_path):
    for delay in (0.001, 0.008):
        with start(SAVE_FOREVER, tmp_path) as writer:
            assert writer.stdout
            finished = int(writer.stdout.readline())
            time.sleep(delay)
            writer.kill()
            rest = writer.stdout.read().split()
        finished = int(rest[-1]) if rest else finished
        found = find_checkpoint(tmp_path)
        assert found is not None
        step, tensors, _ = load_checkpoint(found)
        assert step >= finished and bool((tensors["x"]["v"] == step).all())
