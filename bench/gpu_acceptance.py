"""Everything that a GPU can tell, in one command: tests, benches, tuning, profile, and a page that says what holds.

    PYTHONPATH=kernels:. python -m bench.gpu_acceptance --minutes 9 --out DIR
    PYTHONPATH=kernels:. python -m bench.gpu_acceptance --list

It needs no installation and no network; what a missing package prevents is skipped with the reason. Parts come in the
order in which they matter. Each is a process with a time limit, so that a crash or a cut-off costs that part alone;
`DIR/verdict.md` is written anew after each. The same command again goes on where the last one ended. Without a GPU it
goes through the same at small sizes, which shows that it works and says nothing about a GPU.

Left out: judging. A line of the verdict that does not hold is no error; a test that fails is one (exit status 1).
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from bench.acceptance import verdict
from bench.acceptance.parts import PARTS, Part
from bench.acceptance.work import (
    CUT_OFF,
    FAILED,
    FINISHED,
    ROOT,
    SKIPPED,
    Finding,
    Identity,
    Record,
    python,
    read_json,
    stop,
    write_json,
)
from bench.presets import PRESETS, BenchError, choose_preset

STATE = "state.json"
ENVIRONMENT_SECONDS = 120.0
LEAST_SECONDS = 20.0
"""No part begins with less, and none is given less where there is more."""
SOFT = 0.85
"""A part is told to end after this share of its limit."""
PATIENCE = 5.0
"""Seconds for a part that is told to stop to stop its own commands."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as the other errors of the benches."""
        raise BenchError(message)


@dataclass
class Run:
    """One call of the command.

    Args:
        out: folder of all results.
        deadline: by `clock`.
        identity: what results belong to; filled once the environment is known.
        cuda: whether there is a GPU.
        clock: seconds from any origin.
        say: takes a line for the terminal.
        start: (part, seconds, preset) -> finding; another one in tests.
    """

    out: Path
    deadline: float
    identity: Identity = field(default_factory=dict)
    cuda: bool = False
    clock: Callable[[], float] = time.monotonic
    say: Callable[[str], None] = partial(print, flush=True)
    start: Callable[[Run, Part, float], Finding] | None = None

    def __post_init__(self) -> None:
        self.begun = self.clock()
        self.states: dict[str, dict[str, Any]] = read_json(self.out / STATE).get("parts", {})

    def left(self) -> float:
        """Seconds."""
        return self.deadline - self.clock()

    def finished(self, part: Part) -> bool:
        """Whether an earlier call brought it to its end, on the same commit, machine, preset and torch."""
        state = self.states.get(part.name, {})
        return state.get("status") in FINISHED and state.get("identity") == self.identity

    def note(self, part: Part, finding: Finding, seconds: float) -> None:
        """Write down how a part ended, and the verdict with it."""
        before = self.states.get(part.name, {})
        if before.get("identity") == self.identity:
            seconds += before.get("seconds", 0.0)
        state = asdict(finding) | {"seconds": round(seconds, 1), "identity": self.identity}
        self.states[part.name] = state
        write_json(self.out / STATE, {"parts": self.states})
        verdict.write(self.out, self.identity, self.cuda)

    def tell(self, part: Part, text: str) -> None:
        """A line with the time."""
        self.say(f"[{(self.clock() - self.begun) / 60:4.1f} min, {self.left() / 60:4.1f} left] {part.name:12s} {text}")

    def play(self, parts: Sequence[Part]) -> None:
        """All parts in order, then those that were cut off again, as long as there is time."""
        waiting = list(parts)
        while waiting:
            waiting = [part for place, part in enumerate(waiting) if self._one(part, waiting[place + 1 :])]
            if self.left() < LEAST_SECONDS:
                return

    def _one(self, part: Part, following: Sequence[Part]) -> bool:
        """Run a part within its share of the time; whether there is more of it to do."""
        reason = part.missing() or ("no GPU here" if part.needs_gpu and not self.cuda else "")
        if reason:
            self.tell(part, f"skipped: {reason}")
            self.note(part, Finding(SKIPPED, reason), 0.0)
            return False
        if self.left() < LEAST_SECONDS:
            self.tell(part, "not begun: no time is left")
            if part.name not in self.states:
                self.note(part, Finding(CUT_OFF, "not begun"), 0.0)
            return True
        limit = allowance(self.left(), part.share, [other.share for other in following])
        self.tell(part, f"{part.what}; at most {limit:.0f} s")
        begun = self.clock()
        finding = (self.start or run_process)(self, part, limit)
        seconds = self.clock() - begun
        self.tell(part, f"{finding.status} after {seconds:.0f} s: {finding.summary}")
        self.note(part, finding, seconds)
        return finding.status == CUT_OFF


def allowance(left: float, share: float, following: Sequence[float]) -> float:
    """Seconds for a part: its share of what is left, but enough to be worth beginning."""
    return min(left, max(LEAST_SECONDS, left * share / (share + sum(following))))


def run_process(run: Run, part: Part, limit: float) -> Finding:
    """A part in a process of its own, its output in `<part>.log`."""
    path = run.out / f"{part.name}.json"
    record = Record.open(path, run.identity)
    if record.finding is not None:  # an old one must not be taken for the answer
        record.finding = None
        record.write()
    arguments = python(
        "-m", "bench.acceptance", part.name, "--out", run.out, "--seconds", f"{SOFT * limit:.1f}",
        "--preset", run.identity["preset"],
    )  # fmt: skip
    code = run_logged(arguments, run.out / f"{part.name}.log", limit, run.clock)
    found = Record.open(path, run.identity).finding
    if found is not None:
        return found
    if code is None:
        return Finding(CUT_OFF, f"stopped at its limit; {part.name}.log")
    return Finding(FAILED, f"its process ended with status {code}; {part.name}.log")


def run_logged(
    arguments: Sequence[object], log: Path, limit: float, clock: Callable[[], float] = time.monotonic
) -> int | None:
    """A command with its output appended to a log; its exit status, or None where the limit stopped it."""
    paths = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    begun, texts = clock(), [str(argument) for argument in arguments]
    with log.open("ab") as file:
        # A group of its own but no session of its own: it can be stopped as a whole, and ends with the terminal.
        process = subprocess.Popen(
            texts, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            process_group=0,
        )  # fmt: skip
        try:
            while process.poll() is None and clock() - begun < limit:
                time.sleep(0.1)
            return process.poll()
        finally:
            stop(process, PATIENCE)


def ask_environment(run: Run, preset: str | None, commit: str | None) -> None:
    """Fill in what this machine is; ask a process for it, so that a GPU is not held by this one."""
    from bench.acceptance import environment

    file, log = run.out / environment.FILE, run.out / "environment.log"
    file.unlink(missing_ok=True)
    stated = ("--commit", commit) if commit else ()
    asked = python("-m", "bench.acceptance", "environment", "--out", run.out, *stated)
    code = run_logged(asked, log, ENVIRONMENT_SECONDS)
    facts = read_json(file)
    if code or not facts:
        lines = log.read_text(errors="replace").strip().splitlines() or [""]
        raise BenchError(f"this Python cannot run the benches: {lines[-1]} ({log})")
    run.cuda = bool(facts["cuda"])
    run.identity = environment.identity(facts, choose_preset(preset, run.cuda).name)
    about = (
        f"{facts['device']}, {facts['memory_gib']} GiB" if run.cuda else "no GPU: small sizes, no statement about one"
    )
    run.say(f"{about}; torch {facts['torch']}, commit {facts['commit']}, preset {run.identity['preset']}")


def choose_parts(text: str | None) -> tuple[Part, ...]:
    """Parts by name, in the list's order; all of them without names."""
    if text is None:
        return PARTS
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in {part.name for part in PARTS}]
    if unknown:
        raise BenchError(f"--parts: no part {unknown[0]!r}; choose {', '.join(part.name for part in PARTS)}")
    return tuple(part for part in PARTS if part.name in names)


def prepare(out: Path) -> None:
    """Make the folder, and see that a file can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / ".probe", {})
        (out / ".probe").unlink()
    except OSError as error:
        raise BenchError(f"--out: {out} cannot be written: {error.strerror}") from None


def listing(minutes: float) -> str:
    """The parts, with their shares of the time and what they need."""
    total = sum(part.share for part in PARTS)
    lines = [f"In {minutes:g} minutes; what a part leaves goes to the next:"]
    for part in PARTS:
        needs = ", ".join([*(("a GPU",) if part.needs_gpu else ()), *part.needs])
        lines.append(
            f"{part.name:12s} {minutes * part.share / total:4.1f} min  {part.what}"
            + (f" (needs {needs})" if needs else "")
        )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m bench.gpu_acceptance", description=str(__doc__).splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="when to be done (default: 9)")
    parser.add_argument("--out", type=Path, help="folder of results; one with earlier results is gone on with")
    parser.add_argument("--parts", help="only these, by name and comma; again, even if they are done")
    parser.add_argument("--preset", help=f"sizes: {', '.join(PRESETS)} (default: h100 with a GPU, else smoke)")
    parser.add_argument("--commit", help="what is written down as the commit (default: asked of git)")
    parser.add_argument("--list", action="store_true", help="show the parts and what each takes")
    arguments = parser.parse_args(argv)
    if not (arguments.minutes > 0 and math.isfinite(arguments.minutes)):
        raise BenchError(f"--minutes: {arguments.minutes:g} is not a time; give a number above 0")
    if arguments.preset is not None:
        choose_preset(arguments.preset, False)
    if arguments.out is None and not arguments.list:
        raise BenchError("--out: say where results go")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """0: all that was run went well; 1: a part failed; 2: it could not begin."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on from here"))
    try:
        arguments = parse(argv)
        chosen = choose_parts(arguments.parts)
        if arguments.list:
            print(listing(arguments.minutes))
            return 0
        out = arguments.out.resolve()
        prepare(out)
        run = Run(out, time.monotonic() + 60 * arguments.minutes)
        ask_environment(run, arguments.preset, arguments.commit)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    again = arguments.parts is not None
    for part in chosen:
        if run.finished(part) and not again:
            run.tell(part, f"{run.states[part.name]['status']} earlier: {run.states[part.name]['summary']}")
        elif run.finished(part):
            (out / f"{part.name}.json").unlink(missing_ok=True)
    try:
        run.play([part for part in chosen if again or not run.finished(part)])
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    states = [run.states[part.name]["status"] for part in chosen if part.name in run.states]
    if CUT_OFF in states:
        print("Not all is done; the same command goes on.")
    print(f"{out / verdict.FILE}")
    return int(FAILED in states)


if __name__ == "__main__":
    sys.exit(main())
