"""What a person sees while a run works: bars for what is long, one line for what is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[int, str], None]
QUIET_SECONDS = 20.0
"""Without a terminal (a log file, a notebook), a bar becomes a line this often."""


class Screen:
    """A terminal with bars, or plain lines where there is none."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)

    def say(self, text: str) -> None:
        """Print a line; its text is never read as markup."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Advance]:
        """Show progress of one long piece of work; call what it yields with (done, note)."""
        if not self.console.is_terminal:
            yield self._lines(name, total)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(name, total=total, note="")
            yield lambda done, note: progress.update(task, completed=done, note=note)

    def _lines(self, name: str, total: int) -> Advance:
        last = time.monotonic()

        def advance(done: int, note: str) -> None:
            nonlocal last
            if done >= total or time.monotonic() - last > QUIET_SECONDS:
                last = time.monotonic()
                self.say(f"{name} {done}/{total} {note}".rstrip())

        return advance
