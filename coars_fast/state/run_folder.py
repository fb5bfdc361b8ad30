"""The folder of one run: who may write in it, which settings it belongs to, and its records.

    config.json        the settings            evaluation.json  before and after training, with intervals
    metrics.jsonl      one record a step       episodes.jsonl   transcripts
    checkpoints/       see checkpoint.py       run.lock         who is writing here
    base/              the base model, where the run changed it

One process writes at a time: it holds an exclusive lock on `run.lock`, which the system takes back when the process
ends, however it ends; the file itself stays. The lock needs POSIX, and a file system that supports `flock`.

A run that its own input stops (a data file, a model, a setting) before its first record leaves the folder as it found
it, so that the command can be put right and given again.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from coars_fast.errors import CoarsError, RunFolderError
from coars_fast.state.files import (
    atomic_write_bytes,
    atomic_write_text,
    delete_folder,
    json_line,
    json_text,
    plain,
    read_json,
    read_jsonl,
    write_jsonl,
)

RUN_FILES = ("config.json", "metrics.jsonl", "episodes.jsonl", "evaluation.json", "checkpoints", "base")
MAY_CHANGE = ("out", "resume", "preset", "train.num_steps", "eval.every", "sasrec.cache", "sft.cache", "eval.cache")
MAY_CHANGE_BELOW = ("checkpoint.",)
ABSENT = "(absent)"


class RunFolder:
    """A run folder that this process holds; make one with :meth:`open`, and use it as a context manager."""

    def __init__(self, path: Path, lock: IO[str]) -> None:
        self.path = path
        self._lock = lock
        self._files: dict[str, IO[str]] = {}
        self._held = [name for name in RUN_FILES if (path / name).exists()]
        self._settings_before = (path / "config.json").read_bytes() if "config.json" in self._held else None
        self._has_written = False

    @classmethod
    def open(cls, path: str | Path, config: Mapping[str, Any], resume: bool) -> RunFolder:
        """Create or re-enter `path`, lock it and write `config.json`.

        Raises :class:`RunFolderError` if a live process holds the folder, if it holds a run and `resume` is False, or
        if that run's settings differ in anything that a resumed run may not change.
        """
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"{folder}: cannot be a run folder: {error.strerror}; choose another --out") from error
        run = cls(folder, _acquire(folder))
        try:
            run._enter_settings(config, resume)
        except BaseException:
            run.close()
            raise
        return run

    def _enter_settings(self, config: Mapping[str, Any], resume: bool) -> None:
        if self._held and not resume:
            raise RunFolderError(
                f"{self.path}: holds a run already ({', '.join(self._held)}); go on with it by --resume auto, "
                "or choose another --out"
            )
        check_settings(self.path, config)
        atomic_write_text(self.path / "config.json", json_text(config))

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add a record to `metrics.jsonl`: a training step or an evaluation."""
        self._append("metrics.jsonl", [record])

    def append_episodes(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add transcripts to `episodes.jsonl`."""
        self._append("episodes.jsonl", records)

    def truncate_after(self, step: int) -> None:
        """Forget what came after `step`, for a run that goes on from there: records, checkpoints, the evaluation after.

        Without this, a second `--resume auto` could pick a checkpoint of the timeline that was left. Records without a
        step are kept; a last line torn by a kill is dropped.
        """
        self._has_written = True
        # Checkpoints first: killed in between, the next resume starts from an older one and comes here again.
        for checkpoint in (self.path / "checkpoints").glob("step-*"):
            number = checkpoint.name.removeprefix("step-").partition(".")[0]
            if number.isdigit() and int(number) > step:
                delete_folder(checkpoint)
        for name in ("metrics.jsonl", "episodes.jsonl"):
            self._close_file(name)
            path = self.path / name
            if path.exists():
                write_jsonl(path, [record for record in read_jsonl(path) if (record.get("step") or 0) <= step])
        evaluation = self.evaluation()
        if "after" in evaluation:
            users = {"before": evaluation.get("users", {}).get("before")}
            self.write_evaluation({"before": evaluation.get("before"), "users": users})

    def evaluation(self) -> dict[str, Any]:
        """What `evaluation.json` holds; nothing where there is none yet."""
        path = self.path / "evaluation.json"
        return read_json(path) if path.exists() else {}

    def write_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        """Replace `evaluation.json`, atomically."""
        self._has_written = True
        atomic_write_text(self.path / "evaluation.json", json_text(evaluation))

    def close(self) -> None:
        """Close the files and let others use the folder; closing twice is harmless."""
        for name in list(self._files):
            self._close_file(name)
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, CoarsError) and not self._has_written:
            self._take_back()
        self.close()

    def _take_back(self) -> None:
        """Put back the settings that were here, or none, and forget a base model made under the new ones."""
        settings, base = self.path / "config.json", self.path / "base"
        if self._settings_before is not None:
            atomic_write_bytes(settings, self._settings_before)
        else:
            settings.unlink(missing_ok=True)
        if "base" not in self._held and base.exists():
            delete_folder(base)

    def _append(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        self._has_written = True
        if name not in self._files:
            _drop_torn_line(self.path / name)
            self._files[name] = open(self.path / name, "a", encoding="utf-8", buffering=1)
        for record in records:
            self._files[name].write(json_line(record))
        self._files[name].flush()

    def _close_file(self, name: str) -> None:
        file = self._files.pop(name, None)
        if file is not None:
            file.close()


def check_settings(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise :class:`RunFolderError` if the run in `folder` has settings other than `config` that must not change."""
    path = folder / "config.json"
    changed = differences(read_json(path), plain(config)) if path.exists() else {}
    if changed:
        listing = "; ".join(f"{name} was {old}, now {new}" for name, (old, new) in changed.items())
        raise RunFolderError(
            f"{folder}: the run there has other settings: {listing}. "
            "Give the same settings to resume it, or choose another --out"
        )


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], may_change: tuple[str, ...] | None = None
) -> dict[str, tuple[str, str]]:
    """Settings, by dotted name, that differ: name -> (old, new) as JSON. Those of `may_change` are left out (None: all
    that a resumed run may change)."""
    free, free_below = (MAY_CHANGE, MAY_CHANGE_BELOW) if may_change is None else (may_change, ())
    before, after = _flatten(old), _flatten(new)
    changed = {}
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name, ABSENT), after.get(name, ABSENT)
        if was != now and name not in free and not name.startswith(free_below):
            changed[name] = (was, now)
    return changed


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = json.dumps(value)
    return flat


def _acquire(folder: Path) -> IO[str]:
    """The open, locked `run.lock` of `folder`, with this process's pid, host and start time inside."""
    path = folder / "run.lock"
    try:
        lock = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{path}: {error.strerror}; choose another --out") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        holder = _describe_holder(lock.read())
        lock.close()
        if not isinstance(error, BlockingIOError):
            raise RunFolderError(f"{path}: cannot be locked: {error.strerror}; choose --out on another disk") from error
        raise RunFolderError(f"{folder}: in use by {holder}; wait for it, end it, or choose another --out") from None
    lock.truncate(0)
    lock.write(
        json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")})
    )
    lock.flush()
    return lock


def _describe_holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']}, started {holder['started']}"
    except (ValueError, KeyError, TypeError):  # it has the lock, and has not written who it is yet
        return "another process"


def _drop_torn_line(path: Path) -> None:
    """Cut `path` after its last line break, so that the next record starts a line of its own."""
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)
