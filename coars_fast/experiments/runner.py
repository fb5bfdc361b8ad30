"""Runs the cells of an experiment, each as `python -m coars_fast.train` would, in a process of its own.

    DIR/runs/DATASET/SEED/VARIANT/   an ordinary run folder, and in it
        train.log                    what the run said
        cell.json                    seconds and exit status of its attempts
    DIR/cache/                       SASRec, warm-started bases and evaluations that cells share

A finished cell is not run again; one that was cut off goes on from its newest checkpoint. Of a data set and seed, the
first cell in the file's order runs alone: the others use what it leaves in the cache. No torch in this process.
"""

from __future__ import annotations

import fcntl
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import FrameType
from typing import Literal

from coars_fast import cli
from coars_fast.config import Config
from coars_fast.errors import CoarsError, RunFolderError
from coars_fast.experiments.grid import Cell
from coars_fast.experiments.process import start_training
from coars_fast.progress import Screen
from coars_fast.state.files import atomic_write_text, json_text, read_json
from coars_fast.state.run_folder import differences

Kind = Literal["finished", "to run", "cut off", "failed", "changed"]
POLL_SECONDS = 0.25
NOT_THE_CELLS = ("out", "resume", "preset", "sasrec.cache", "sft.cache", "eval.cache")
"""Settings that say where things are kept, not what is done."""


@dataclass(frozen=True)
class State:
    """How far a cell is."""

    kind: Kind
    note: str = ""
    """What failed or what has changed."""


class Grid:
    """The cells of an experiment in their folder.

    Args:
        out: the experiment's folder.
        cells: in the order in which they are to run.
    """

    def __init__(self, out: Path, cells: Sequence[Cell]):
        self.out, self.cells = out, tuple(cells)

    def folder(self, cell: Cell) -> Path:
        """The cell's run folder."""
        return self.out / "runs" / cell.name

    def config(self, cell: Cell) -> Config:
        """The cell's settings with its folder and the caches that cells share."""
        config, cache = cell.config, str(self.out / "cache")
        teaches = config.warm_start and config.sft.trainable == "all"
        return replace(
            config,
            out=str(self.folder(cell)),
            resume="auto",
            sasrec=replace(config.sasrec, cache=config.sasrec.cache or cache),
            sft=replace(config.sft, cache=config.sft.cache or (cache if teaches else None)),
            eval=replace(config.eval, cache=config.eval.cache or cache),
        )

    def flags(self, cell: Cell) -> list[str]:
        """Arguments of `python -m coars_fast.train` that run the cell, or go on with it."""
        config = self.config(cell)
        start = replace(cli.load_preset(config.preset), preset=config.preset)
        return ["--preset", config.preset, *cli.flags(config, start)]

    def state(self, cell: Cell) -> State:
        """How far the cell is, by what its folder holds."""
        folder = self.folder(cell)
        try:
            attempts = _attempts(folder)
            if (folder / "config.json").is_file():
                there = cli.read_run_config(folder)
                changed = differences(cli.config_to_dict(there), cli.config_to_dict(cell.config), NOT_THE_CELLS)
                if changed:
                    listing = "; ".join(f"{name} was {old}, now {new}" for name, (old, new) in changed.items())
                    return State("changed", listing)
                if "after" in finished_evaluation(folder):
                    return State("finished")
        except CoarsError as error:
            return State("changed", str(error))
        if attempts["exit_status"] not in (None, 0):
            return State("failed", attempts["error"])
        return State("cut off" if (folder / "metrics.jsonl").is_file() else "to run")

    def seconds(self, cell: Cell) -> float:
        """How long the cell's attempts took in all."""
        return _attempts(self.folder(cell))["seconds"]

    # ---------------------------------------------------------------------------------------------------------- runs

    def run(self, todo: Sequence[Cell], jobs: int, screen: Screen) -> list[Cell]:
        """Run cells, at most `jobs` at a time; what fails is said at once and the others go on. Folders of cells that
        have changed are deleted first.

        Returns:
            The cells that failed.

        Raises:
            RunFolderError: another process works in this folder.
        """
        waiting, running, failed = list(todo), [], []
        finished = [cell for cell in self.cells if self.state(cell).kind == "finished"]
        opened = {_group(cell) for cell in finished}
        clock = Clock({cell: self.seconds(cell) for cell in finished})
        done = 0
        with self._held(), _stoppable(), screen.bar("cells", len(todo)) as advance:
            for cell in todo:
                if self.state(cell).kind == "changed":
                    shutil.rmtree(self.folder(cell))
            try:
                while waiting or running:
                    for cell in _startable(waiting, [job.cell for job in running], opened, jobs):
                        waiting.remove(cell)
                        running.append(Job.start(cell, self.folder(cell), self.flags(cell)))
                    time.sleep(POLL_SECONDS)
                    for job in [job for job in running if job.process.exitcode is not None]:
                        running.remove(job)
                        error = job.finish()
                        state = self.state(job.cell)
                        if error or state.kind != "finished":
                            failed.append(job.cell)
                            screen.say(f"failed: {job.cell.name}: {error or state.note or state.kind}")
                        else:
                            clock.done[job.cell] = job.seconds
                        opened.add(_group(job.cell))
                        done += 1
                    left = clock.left(waiting, running, jobs)
                    doing = "; ".join(f"{job.cell.name} {job.last_line()}" for job in running)
                    advance(done, f"{left}  {doing}"[:300])
            finally:
                for job in running:
                    job.stop()
        return failed

    def make(self) -> None:
        """The experiment's folder, where it is not there yet."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"--out {self.out}: cannot be a folder: {error.strerror}; choose another") from error

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The lock of the experiment's folder; the system takes it back however the process ends."""
        self.make()
        with open(self.out / "experiment.lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunFolderError(
                    f"{self.out}: another process runs an experiment here; wait for it, or choose another --out"
                ) from None
            yield


@dataclass
class Job:
    """A cell that is running."""

    cell: Cell
    folder: Path
    process: ForkServerProcess
    begun: float

    @classmethod
    def start(cls, cell: Cell, folder: Path, flags: Sequence[str]) -> Job:
        """Ctrl-C reaches this process alone, which then stops the cells one by one."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.log").touch()
        return cls(cell, folder, start_training(flags, folder / "train.log"), time.monotonic())

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def last_line(self) -> str:
        """The last that the run said, or the steps of training that it has done."""
        lines = _tail(self.folder / "train.log")
        return lines[-1][:90] if lines else ""

    def finish(self) -> str:
        """Note how the attempt ended; returns what went wrong, or nothing."""
        status, before = self.process.exitcode, _attempts(self.folder)
        lines = _tail(self.folder / "train.log")
        error = "" if status == 0 else (lines[-1] if lines else f"exit status {status}")
        record = {"seconds": before["seconds"] + self.seconds, "exit_status": status, "error": error}
        atomic_write_text(self.folder / "cell.json", json_text(record))
        return error

    def stop(self) -> None:
        """End the run; the cell counts as cut off."""
        self.process.terminate()
        self.process.join(timeout=20)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()


class Clock:
    """Says how long the rest will take, from cells that are done.

    Args:
        done: seconds of finished cells.
    """

    def __init__(self, done: dict[Cell, float]):
        self.done = done

    def expected(self, cell: Cell) -> float | None:
        """Mean seconds of finished cells of the same data set that were trained, or not, as this one; None: none is
        finished."""
        trained = cell.config.train.num_steps > 0
        alike = [c for c in self.done if (c.config.train.num_steps > 0) == trained]
        alike = [c for c in alike if c.dataset == cell.dataset] or alike
        return sum(self.done[c] for c in alike) / len(alike) if alike else None

    def left(self, waiting: Sequence[Cell], running: Sequence[Job], jobs: int) -> str:
        """Time to the end, in words."""
        whole = [self.expected(cell) for cell in waiting]
        parts = [
            None if (all_of_it := self.expected(j.cell)) is None else max(0.0, all_of_it - j.seconds) for j in running
        ]
        if None in whole or None in parts:
            return "time left: known once cells of each kind are done"
        seconds = sum(s for s in (*whole, *parts) if s is not None) / jobs
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"about {hours} h {minutes:02} min left" if hours else f"about {minutes} min left"


def _startable(waiting: Sequence[Cell], running: Sequence[Cell], opened: set, jobs: int) -> list[Cell]:
    """Cells to start now, in order: none whose data set and seed wait for their first cell."""
    chosen: list[Cell] = []
    busy = {_group(cell) for cell in running}
    for cell in waiting:
        if len(running) + len(chosen) == jobs:
            break
        if _group(cell) in opened or _group(cell) not in busy:
            chosen.append(cell)
            busy.add(_group(cell))
    return chosen


def _group(cell: Cell) -> tuple[str, int]:
    return cell.dataset, cell.seed


def finished_evaluation(folder: Path) -> dict:
    """A run's `evaluation.json`, with the users' counts that tables are made from.

    Raises:
        RunFolderError: it cannot be read, or has no such counts.
    """
    path = folder / "evaluation.json"
    record = read_json(path) if path.is_file() else {}
    if "after" in record and not {"ids", "after"} <= record.get("users", {}).keys():
        raise RunFolderError(f"{path}: no counts by user; the run was made by another version of coars_fast")
    return record


def _attempts(folder: Path) -> dict:
    """`cell.json`, or what stands for none."""
    path = folder / "cell.json"
    return read_json(path) if path.is_file() else {"seconds": 0.0, "exit_status": None, "error": ""}


def _tail(path: Path) -> list[str]:
    """The last lines of a log that are not empty."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4000))
        return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM ends the experiment as Ctrl-C does: its cells are stopped, not left behind."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
