"""Which cells may start, and how long the rest is said to take."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coars_fast import cli
from coars_fast.config import Config, SFTConfig, TrainConfig
from coars_fast.errors import RunFolderError
from coars_fast.experiments.grid import Cell
from coars_fast.experiments.runner import Clock, Grid, _startable
from coars_fast.progress import Screen


def cell(variant: str, seed: int = 1, steps: int = 5, dataset: str = "world") -> Cell:
    config = Config(train=TrainConfig(num_steps=steps))
    return Cell(dataset=dataset, seed=seed, variant=variant, config=config)


def test_the_first_cell_of_a_seed_runs_alone() -> None:
    a, b, c, other = cell("a"), cell("b"), cell("c"), cell("a", seed=2)
    assert _startable([a, b, c, other], [], set(), 3) == [a, other]
    assert _startable([b, c], [a], set(), 3) == [], "they wait for what it leaves in the cache"
    assert _startable([b, c, other], [], {("world", 1)}, 3) == [b, c, other]
    assert _startable([b, c, other], [a], {("world", 1)}, 2) == [b]
    assert _startable([b], [a, c], {("world", 1)}, 2) == []


def test_time_left_comes_from_cells_of_the_same_kind() -> None:
    trained, start = cell("a"), cell("start", steps=0)
    clock = Clock({trained: 600.0})
    waiting = [cell("b"), cell("c", seed=2)]
    assert clock.left(waiting, [], 1) == "about 20 min left"
    assert clock.left(waiting, [], 2) == "about 10 min left"
    running: Any = [SimpleNamespace(cell=cell("d"), seconds=480.0)]
    assert clock.left(waiting, running, 1) == "about 22 min left"
    assert "known once" in clock.left([start], [], 1)
    clock.done[start] = 60.0
    assert clock.left([start, *waiting] * 10, [], 1) == "about 3 h 30 min left"
    # Another data set's own cells count more than this one's.
    clock.done[cell("a", dataset="films")] = 6000.0
    assert clock.left([cell("b", dataset="films")], [], 1) == "about 1 h 40 min left"


def test_cells_share_caches_where_they_can(tmp_path: Path) -> None:
    plain = cell("a")
    warm = replace(plain, variant="warm", config=replace(plain.config, warm_start=True))
    adapters = replace(warm, variant="adapters", config=replace(warm.config, sft=SFTConfig(trainable="adapters")))
    own = replace(warm, variant="own", config=replace(warm.config, sft=SFTConfig(cache="mine")))
    grid = Grid(tmp_path, (plain, warm, adapters, own))
    cache = str(tmp_path / "cache")
    assert [grid.config(c).sft.cache for c in grid.cells] == [None, cache, None, "mine"]
    assert {grid.config(c).eval.cache for c in grid.cells} == {grid.config(plain).sasrec.cache} == {cache}
    assert grid.config(plain).out == str(tmp_path / "runs" / "world" / "1" / "a")


def finished(tmp_path: Path, **config: Any) -> tuple[Grid, Cell, Path]:
    """A grid of one cell, and its folder, made with these settings."""
    only = cell("a")
    grid = Grid(tmp_path, (only,))
    folder = grid.folder(only)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(cli.config_to_dict(only.config) | config))
    (folder / "evaluation.json").write_text(json.dumps({"after": {}, "users": {"ids": [], "after": {}}}))
    return grid, only, folder


@pytest.mark.parametrize(
    ("file", "text", "note"),
    [
        ("evaluation.json", "", "not JSON"),
        ("evaluation.json", '{"after": {}}', "no counts by user"),
        ("cell.json", "", "not JSON"),
        ("config.json", '{"mystery": 1}', "mystery: no such setting"),
    ],
)
def test_a_cell_that_cannot_be_read_has_changed(tmp_path: Path, file: str, text: str, note: str) -> None:
    grid, only, folder = finished(tmp_path)
    assert grid.state(only).kind == "finished"
    (folder / file).write_text(text)
    state = grid.state(only)
    assert state.kind == "changed" and note in state.note and str(folder / file) in state.note


def test_nothing_is_deleted_while_another_process_works_there(tmp_path: Path) -> None:
    grid, only, folder = finished(tmp_path, seed=77)
    assert grid.state(only).note == "seed was 77, now 0"
    with Grid(tmp_path, ())._held(), pytest.raises(RunFolderError, match="another process runs an experiment here"):
        grid.run([only], 1, Screen())
    assert (folder / "config.json").is_file()


def test_a_file_is_no_folder_for_an_experiment(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(RunFolderError, match="--out .*out: cannot be a folder: File exists"):
        Grid(tmp_path / "out", ()).make()
