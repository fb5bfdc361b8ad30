"""Tables and figures from run folders: what is in them, what is missing from them and said to be."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coars_fast import cli, experiment
from coars_fast.errors import ConfigError, RunFolderError
from coars_fast.experiments.figures import write_figures
from coars_fast.experiments.grid import Experiment, load_experiment
from coars_fast.experiments.results import Results
from coars_fast.experiments.runner import Grid
from coars_fast.experiments.tables import write_tables
from coars_fast.game.metrics import COUNTS
from coars_fast.state.files import atomic_write_text, json_text, write_jsonl

FILE = """
seeds = [3, 4]
compare = "full"
[per_seed]
seed = "{seed}"
[datasets.small]
label = "few users"
[variants.full]
label = "all of it"
[variants.bare]
label = "no <b>credit</b> | none"
loss.credit_weight = 0
[variants.start]
train.num_steps = 0
"""


def counts(hits: list[int]) -> dict[str, list[float]]:
    """Users with one turn each; a hit was accepted, a miss turned down."""
    found = {name: [0.0] * len(hits) for name in COUNTS}
    found |= {name: [1.0] * len(hits) for name in ("episodes", "turns", "rec_replies", "user_replies")}
    return found | {"hits": [float(h) for h in hits], "true_positives": [float(h) for h in hits]}


def write_cell(grid: Grid, name: str, hits: list[int], ids: list[int] | None = None) -> None:
    cell = next(cell for cell in grid.cells if cell.name == name)
    folder = grid.folder(cell)
    folder.mkdir(parents=True)
    atomic_write_text(folder / "config.json", json_text(cli.config_to_dict(grid.config(cell))))
    interval = {"value": float(np.mean(hits)), "low": 0.0, "high": 1.0}
    users: dict[str, Any] = {"ids": ids or list(range(len(hits))), "before": {"greedy": counts([0] * len(hits))}}
    users["after"] = {"greedy": counts(hits)}
    users["sasrec_top1"] = {"greedy": {"episodes": [1.0] * len(hits), "hits": [1.0] * len(hits)}}
    record = {"before": {"hit@1": interval}, "after": {"hit@1": interval}, "users": users}
    atomic_write_text(folder / "evaluation.json", json_text(record))
    steps = [
        {"kind": "train", "step": step, "exclusion_rate": 0.5 / step, "credit_turn1_rec": -0.2, "credit_turn2_rec": 0.1}
        for step in (1, 2)
    ]
    write_jsonl(folder / "metrics.jsonl", [{"kind": "evaluation", "step": 0, "metrics": {"hit@1": interval}}, *steps])


@pytest.fixture
def found(tmp_path: Path) -> tuple[Experiment, Grid]:
    (tmp_path / "grid.toml").write_text(FILE)
    described = load_experiment(tmp_path / "grid.toml")
    return described, Grid(tmp_path / "out", described.cells)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_tables_hold_what_is_finished_and_name_what_is_not(found: tuple[Experiment, Grid]) -> None:
    described, grid = found
    write_cell(grid, "small/3/full", [1, 1, 0, 0])
    write_cell(grid, "small/4/full", [1, 1, 1, 1])
    write_cell(grid, "small/3/bare", [1, 0, 0, 0])
    results = Results(described, grid)
    page = write_tables(results, grid.out).read_text()
    table = {(r["variant"], r["metric"]): r for r in rows(grid.out / "table.csv")}
    assert float(table["full", "hit@1"]["value"]) == 0.75 and table["full", "hit@1"]["seeds"] == "3 4"
    assert float(table["bare", "hit@1"]["value"]) == 0.25 and table["bare", "hit@1"]["num_users"] == "4"
    assert float(table["sasrec_top1", "hit@1"]["value"]) == 1.0
    assert not any(variant == "sasrec_top1" and metric != "hit@1" for variant, metric in table)
    pairs = {(r["variant"], r["metric"]): r for r in rows(grid.out / "paired.csv")}
    # Seed 4 has no `bare`, so seed 3 alone is compared.
    assert float(pairs["bare", "hit@1"]["difference"]) == -0.25 and pairs["bare", "hit@1"]["num_seeds"] == "1"
    assert float(pairs["sasrec_top1", "hit@1"]["difference"]) == 0.25
    assert len(rows(grid.out / "cells.csv")) == 3 * 2
    assert "| all of it | .750 (" in page
    # `full` before and after: 0 for all, then .5 and 1 in its seeds.
    assert "| Hit@1 | .000 (.000, .000) | .750 (.250, 1.00) | +.750 (+.250, +1.00) |" in page
    assert "3 of 6 cells are finished." in page
    assert "(small, seeds 4): not run" in page and "start (small, seeds 3, 4): not run" in page
    assert "<b>" not in page.replace("\\<b\\>", "") and "\\| none" in page


def test_cells_of_other_settings_and_failed_ones_stay_out(found: tuple[Experiment, Grid]) -> None:
    described, grid = found
    for name in ("small/3/full", "small/4/full", "small/3/bare"):
        write_cell(grid, name, [1, 0])
    cell = described.cells[0]
    other = cli.config_to_dict(replace(grid.config(cell), train=replace(cell.config.train, num_steps=7)))
    atomic_write_text(grid.folder(cell) / "config.json", json_text(other))
    failed = grid.folder(described.cells[2])
    failed.mkdir(parents=True)
    record = {"seconds": 3.0, "exit_status": 2, "error": "error: data.path: nothing there"}
    atomic_write_text(failed / "cell.json", json_text(record))
    results = Results(described, grid)
    assert cell not in results.records and len(results.records) == 2
    page = write_tables(results, grid.out).read_text()
    assert "changed: train.num\\_steps was 7, now 40" in page
    assert "start (small, seeds 3): failed: error: data.path: nothing there" in page


def test_variants_on_other_users_are_not_paired(found: tuple[Experiment, Grid]) -> None:
    described, grid = found
    write_cell(grid, "small/3/full", [1, 0])
    write_cell(grid, "small/3/bare", [1, 0], ids=[5, 6])
    with pytest.raises(RunFolderError, match="small/3/bare and small/3/full were evaluated on different users"):
        Results(described, grid).pairs()


def test_figures_show_what_there_is_and_are_the_same_again(found: tuple[Experiment, Grid]) -> None:
    described, grid = found
    assert write_figures(Results(described, grid), grid, grid.out) == []
    for seed in (3, 4):
        write_cell(grid, f"small/{seed}/full", [1, 0, 1])
        write_cell(grid, f"small/{seed}/start", [0, 0, 1])
    written = write_figures(Results(described, grid), grid, grid.out)
    assert [path.name for path in written] == ["small-bars.svg", "small-curves.svg", "small-credit.svg"]
    texts = [path.read_text() for path in written]
    assert "all of it" in texts[0] and "SASRec top-1" in texts[0] and ">start<" not in texts[1]
    again = write_figures(Results(described, grid), grid, grid.out)
    assert [path.read_text() for path in again] == texts


def test_a_page_gets_the_tables_between_its_comments(
    found: tuple[Experiment, Grid], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described, grid = found
    write_cell(grid, "small/3/full", [1, 0])
    page = tmp_path / "results.md"
    page.write_text("top\n<!-- results: grid -->\nfrom before\n<!-- end: grid -->\nbottom\n")
    options = experiment.ExperimentConfig(file=described.source, out=str(grid.out), jobs=0, publish=str(page))
    for _ in range(2):
        assert experiment.experiment(options) == 0
        text = page.read_text()
        assert text.startswith("top\n<!-- results: grid -->\n") and text.endswith("<!-- end: grid -->\nbottom\n")
        assert "from before" not in text and "few users" in text and "](results/grid/small-bars.svg)" in text
    kept = {path.name for path in (tmp_path / "results" / "grid").iterdir()}
    assert kept >= {"small-bars.svg", "table.csv", "paired.csv", "cells.csv"}
    page.write_text("no comments")
    with pytest.raises(ConfigError, match="needs a line <!-- results: grid -->"):
        experiment.experiment(options)
