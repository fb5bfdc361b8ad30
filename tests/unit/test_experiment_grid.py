"""Experiment files: what they make of a grid, and what is said of a wrong one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coars_fast import cli
from coars_fast.errors import ConfigError
from coars_fast.experiments.grid import load_experiment

SHIPPED = Path(__file__).parents[2] / "experiments"
FILE = """
seeds = [3, 4]
compare = "full"
[base]
preset = "cpu_tiny"
train.num_steps = 5
[per_seed]
seed = "{seed}"
data.eval_seed = "2{seed}"
[datasets.small]
label = "few users"
world.num_users = 30
[datasets.large]
[variants.full]
[variants.bare]
label = "no credit"
loss.credit_weight = 0
datasets = ["small"]
seeds = 1
"""


def write(folder: Path, text: str = FILE, name: str = "grid.toml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_the_grid_has_every_data_set_seed_and_variant(tmp_path: Path) -> None:
    found = load_experiment(write(tmp_path))
    assert [cell.name for cell in found.cells] == [
        "small/3/full", "small/3/bare", "large/3/full", "small/4/full", "large/4/full"
    ]  # fmt: skip
    assert found.datasets == {"small": "few users", "large": "large"} and found.compare == ("full",)
    bare = found.cells[1].config
    assert (bare.seed, bare.data.eval_seed, bare.world.num_users) == (3, 23, 30)
    assert (bare.loss.credit_weight, bare.train.num_steps, bare.preset) == (0.0, 5, "cpu_tiny")
    assert found.cells[4].config.world.num_users == cli.load_preset("cpu_tiny").world.num_users


def test_flags_replace_the_base_and_no_more(tmp_path: Path) -> None:
    flags = ["--train.num-steps", "7", "--loss.credit-weight", "0.5", "--world.num-users", "9"]
    full, bare, *_ = load_experiment(write(tmp_path), flags).cells
    assert full.config.train.num_steps == bare.config.train.num_steps == 7
    assert (full.config.loss.credit_weight, bare.config.loss.credit_weight) == (0.5, 0.0)
    assert full.config.world.num_users == 30


def test_a_file_is_laid_over_the_one_that_it_extends(tmp_path: Path) -> None:
    write(tmp_path)
    more = 'extends = "grid.toml"\nseeds = [8]\n[base]\nsasrec.num_epochs = 1\n[variants.bare]\nlabel = "bare"\n'
    found = load_experiment(write(tmp_path, more, "more.toml"))
    assert [cell.name for cell in found.cells] == ["small/8/full", "small/8/bare", "large/8/full"]
    assert found.variants["bare"].label == "bare" and found.cells[1].config.loss.credit_weight == 0
    assert found.cells[0].config.sasrec.num_epochs == 1 and found.cells[0].config.train.num_steps == 5


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("loss.credit_weight = 0", "loss.credit_wieght = 0", "nearest: loss.credit_weight"),
        ("loss.credit_weight = 0", "lose.credit_weight = 0", "variants.bare.lose: no such setting; nearest: loss"),
        ("loss.credit_weight = 0", "loss.credit_weight = '0'", "expected float, got '0'"),
        ("loss.credit_weight = 0", "loss.credit_weight = -1", "small/3/bare: loss.credit_weight: -1.0 must not be"),
        ("loss.credit_weight = 0", "resume = 'auto'", "variants.bare.resume: no such setting"),
        ("[variants.bare]", "[variant.bare]", "variant: no such entry; nearest: variants"),
        ("[variants.bare]", "[variants.'a/b']", "a name is made of letters"),
        ('compare = "full"', 'compare = "ful"', "compare: 'ful' is not there; nearest: full"),
        ('["small"]', '["smal"]', "datasets: 'smal' is not there; nearest: small"),
        ("[3, 4]", "[3, 3]", "expected a list of different whole numbers"),
        ("[3, 4]", "3", "expected a list of different whole numbers"),
        ('preset = "cpu_tiny"', 'preset = "cpu_tyni"', "no such preset"),
        ('seed = "{seed}"', 'seed = "x{seed}"', "per_seed: seed: expected int"),
        ("seeds = [3", "extends = 'none.toml'\nseeds = [3", "no such experiment file"),
        ("seeds = [3", "extends = 'grid.toml'\nseeds = [3", "in a circle"),
        ("[base]", "[base", "not a TOML file"),
        ("[variants.full]", "[variants.sasrec_top1]", "sasrec_top1: the row of SASRec"),
        ("seeds = 1", "seeds = 0", "variants.bare.seeds: expected a list of different whole numbers"),
        ("seeds = 1", "seeds = [3, 7]", "variants.bare.seeds: 7 is not among the file's seeds [3, 4]"),
        ('["small"]', "[]", "variants.bare.datasets: expected a name or a list of names, got []"),
        ('seed = "{seed}"\ndata.eval_seed = "2{seed}"', "", "small/3/full and small/4/full have the same settings"),
        ("loss.credit_weight = 0", "data.eval_seed = 9", "variants.bare: data.eval_seed is 9, that of full is 23"),
        ("loss.credit_weight = 0", "world.num_items = 99", "variants.bare: world.num_items is 99"),
        ("loss.credit_weight = 0", "data.candidates = 'top20'", "variants.bare: data.candidates is top20"),
        ('label = "no credit"', 'label = "full"', "variants: full and bare are both called 'full'"),
        ('label = "few users"', 'label = "large"', "datasets: small and large are both called 'large'"),
    ],
)
def test_a_wrong_file_is_named_with_the_way_out(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in FILE
    with pytest.raises(ConfigError) as error:
        load_experiment(write(tmp_path, FILE.replace(old, new, 1)))
    assert said in str(error.value)


def test_cells_are_chosen_by_name_or_by_a_part_of_it(tmp_path: Path) -> None:
    found = load_experiment(write(tmp_path))
    assert [c.name for c in found.select(["bare", "large/4/*"])] == ["small/3/bare", "large/4/full"]
    assert len(found.select(["3"])) == 3 and found.select([]) == found.cells
    with pytest.raises(ConfigError, match="--only ful: no such cell; nearest: full"):
        found.select(["ful"])


@pytest.mark.parametrize("name", ["default", "world", "movielens", "held_out", "credit", "smoke", "smoke_movielens"])
def test_the_files_that_are_shipped_make_cells_that_a_run_can_be_started_with(name: str) -> None:
    flags = ["--data.path", "FOLDER"] if "movielens" in name or name == "held_out" else []
    found = load_experiment(SHIPPED / f"{name}.toml", flags)
    assert found.compare == ("weight_0" if name == "credit" else "clipped",)
    assert set(found.curves) <= set(found.variants)
    of_one_seed = [cell for cell in found.cells if cell.seed == found.seeds[0]]
    assert {cell.variant for cell in of_one_seed} == set(found.variants), "the first seed has every variant"
    for cell in of_one_seed:
        config = replace(cell.config, out="runs/a folder")
        start = replace(cli.load_preset(config.preset), preset=config.preset)
        assert cli.parse_config(["--preset", config.preset, *cli.flags(config, start)]) == config
    others = [cell.config for cell in of_one_seed]
    assert len({str(config) for config in others}) == len(others), "no two variants are the same run"
