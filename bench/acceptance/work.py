"""What a part's function works with: its folder, its time, commands whose output goes to its log, and its results.

Results are kept one by one in `<part>.json`, which is written beside and renamed, so that a part that was cut off goes
on from them. They hold for one commit, machine, preset and torch: those of another are dropped.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.results import write_beside

ROOT = Path(__file__).resolve().parents[2]
Identity = dict[str, str]
"""What results belong to: commit, machine, preset, torch."""
DONE, FAILED, CUT_OFF, SKIPPED = "done", "failed", "cut off", "skipped"
FINISHED = (DONE, FAILED)
"""What another call need not do again."""


@dataclass(frozen=True)
class Finding:
    """How a part ended, and a line about what it found."""

    status: str
    summary: str


@dataclass
class Record:
    """`<part>.json`: a finding once there is one, and the results so far."""

    path: Path
    identity: Identity
    results: dict[str, Any] = field(default_factory=dict)
    finding: Finding | None = None

    @classmethod
    def open(cls, path: Path, identity: Identity) -> Record:
        """What is there, or an empty one where nothing is or where it belongs to another identity."""
        found = read_json(path)
        if not found or found.get("identity") != identity:
            return cls(path, identity)
        finding = found.get("finding")
        return cls(path, identity, found.get("results", {}), Finding(**finding) if finding else None)

    def keep(self, key: str, value: Any) -> Any:
        """Write a result; returns it."""
        self.results[key] = value
        self.write()
        return value

    def end(self, finding: Finding) -> None:
        """Write how the part ended."""
        self.finding = finding
        self.write()

    def write(self) -> None:
        write_json(self.path, asdict(self) | {"path": self.path.name})


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file; empty where there is none or it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_beside(path, json.dumps(content, indent=1) + "\n")


@dataclass
class Work:
    """One part's.

    Args:
        name: of the part.
        out: folder of all results.
        preset: sizes.
        cuda: whether there is a GPU.
        record: its results.
        deadline: by `time.monotonic`, when it should come to an end; it is stopped a little later.
    """

    name: str
    out: Path
    preset: str
    cuda: bool
    record: Record
    deadline: float

    def left(self) -> float:
        """Seconds."""
        return max(0.0, self.deadline - time.monotonic())

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """The result called `key`: as kept, or computed and kept."""
        return self.record.results[key] if key in self.record.results else self.record.keep(key, compute())

    def write(self, suffix: str, text: str) -> Path:
        """A file of the part beside its results, printed too."""
        path = self.out / f"{self.name}{suffix}"
        write_beside(path, text)
        print(text, flush=True)
        return path

    def command(
        self, arguments: Sequence[object], *, environment: Mapping[str, str] | None = None
    ) -> tuple[int | None, str]:
        """Run a command in the repository's root until it ends or the time does; then its output is printed.

        Returns:
            Exit status (None: stopped, since the time was over) and output.
        """
        texts = [str(argument) for argument in arguments]
        print("$", " ".join(texts), flush=True)
        settings = {**os.environ, **(environment or {})}
        with tempfile.TemporaryFile() as log:
            # A group of its own, so that a command that is stopped leaves no process behind.
            process = subprocess.Popen(
                texts, cwd=ROOT, env=settings, stdout=log, stderr=subprocess.STDOUT, process_group=0
            )
            try:
                code: int | None = process.wait(timeout=max(1.0, self.left()))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                stop(process)
                log.seek(0)
                output = log.read().decode(errors="replace")
                print(output, flush=True)
        return code, output


def stop(process: subprocess.Popen[Any], patience: float = 0.0) -> None:
    """End a process and its group, after `patience` seconds in which it may end by itself once told to."""
    if patience and process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with suppress(ProcessLookupError):  # the group may outlive its first process
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def python(*arguments: object) -> list[object]:
    """A command of this Python."""
    return [sys.executable, *arguments]
