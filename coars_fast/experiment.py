"""Run a grid of (data set, seed, variant) and write its tables and figures.

    python -m coars_fast.experiment experiments/world.toml --jobs 2
    python -m coars_fast.experiment experiments/world.toml --dry-run          # what would run, and how far it is
    python -m coars_fast.experiment experiments/movielens.toml --data.path ml-latest-small

Every cell is an ordinary run folder, made by `python -m coars_fast.train` in a process of its own. The same command
given again runs what is not finished, and goes on with what was cut off. `experiments/grid.py` describes the file,
docs/results.md what comes out.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from coars_fast import cli
from coars_fast.errors import ConfigError
from coars_fast.progress import Screen

if TYPE_CHECKING:
    from coars_fast.experiments.grid import Experiment
    from coars_fast.experiments.runner import Grid


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Run a grid of data sets, seeds and variants, and write its tables and figures. Settings of
    `python -m coars_fast.train` may follow (`--data.path FOLDER`): they take the place of those of the file's
    `[base]`."""

    file: tyro.conf.Positional[str]
    """Experiment file, such as experiments/world.toml."""
    out: str | None = None
    """Folder of the runs, tables and figures. Default: runs/<name of the file>."""
    jobs: int = 1
    """Cells that run at the same time, one core each; 0: run nothing, write the tables of what is finished."""
    only: tuple[str, ...] = ()
    """Run these cells alone: data sets, seeds, variants or DATASET/SEED/VARIANT; * stands for anything."""
    dry_run: bool = False
    """List the cells, how far they are and their commands; do nothing."""
    rerun_changed: bool = False
    """Delete cells that were run with other settings than the file's now, and run them again; otherwise they stop the
    command."""
    publish: str | None = None
    """Page (docs/results.md) that gets the tables and figures as well."""


def experiment(options: ExperimentConfig, flags: Sequence[str] = ()) -> int:
    """Run an experiment file; returns how many cells failed.

    Args:
        options: the command line.
        flags: settings of all cells.
    """
    from coars_fast.experiments.grid import load_experiment
    from coars_fast.experiments.runner import Grid

    if options.jobs < 0:
        raise ConfigError(f"--jobs: {options.jobs} must not be negative")
    file, screen = Path(options.file), Screen()
    found = load_experiment(file, flags)
    cells = found.select(options.only)
    out = Path(options.out) if options.out else Path("runs") / found.name
    grid = Grid(out, found.cells)
    states = {cell: grid.state(cell) for cell in cells}
    if options.dry_run:
        for cell, state in states.items():
            screen.say(f"{cell.name}: {state.kind}{f' ({state.note})' if state.note else ''}")
            screen.say(f"    python -m coars_fast.train {shlex.join(grid.flags(cell))}")
        screen.say(f"{len(cells)} cells, {sum(s.kind == 'finished' for s in states.values())} finished")
        return 0
    failed = []
    if options.jobs:
        changed = [cell for cell, state in states.items() if state.kind == "changed"]
        if changed and not options.rerun_changed:
            raise ConfigError(
                f"{out}: {len(changed)} cells were run with other settings, the first {changed[0].name}: "
                f"{states[changed[0]].note}. Run them again with --rerun-changed, or choose another --out"
            )
        todo = [cell for cell, state in states.items() if state.kind != "finished"]
        screen.say(f"{file}: {len(cells)} cells, {len(cells) - len(todo)} finished, {len(todo)} to run, in {out}")
        failed = grid.run(todo, options.jobs, screen)
    write(options, found, grid, screen)
    for cell in failed:
        screen.say(f"failed: {cell.name}: {grid.state(cell).note}; its log is {grid.folder(cell) / 'train.log'}")
    return len(failed)


def write(options: ExperimentConfig, found: Experiment, grid: Grid, screen: Screen) -> None:
    """Tables and figures of what is finished."""
    from coars_fast.experiments.figures import write_figures
    from coars_fast.experiments.results import Results
    from coars_fast.experiments.tables import publish, write_tables

    grid.make()
    results = Results(found, grid)
    figures = write_figures(results, grid, grid.out)
    table = write_tables(results, grid.out, figures)
    screen.say(f"tables: {table}")
    if options.publish is not None:
        publish(table, figures, found, Path(options.publish))
        screen.say(f"published in {options.publish}")


@cli.main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """The command line; the exit status is 1 where a cell failed."""
    if experiment(*cli.parse_known(ExperimentConfig, argv, "python -m coars_fast.experiment")):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
