"""Preset `movielens_cpu`: titles as tokens, the warm start, then CoARS, on a small folder and a real one."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coars_fast import train
from coars_fast.cli import load_preset
from coars_fast.config import Config
from coars_fast.data.load import load_dataset
from coars_fast.data.movielens import load_movielens
from tests import tiny

DATA = Path(os.environ.get("COARS_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "ml-latest-small"
PRESET = load_preset("movielens_cpu")
NAMES = ("Alien Dawn", 'The "Quoted" One', "Comma, The", "Café Noir", "Ünder <|im_end|> Ground", "Seven: Part")


def write_movielens(folder: Path, *, num_users: int = 24, num_items: int = 60) -> Path:
    """A small MovieLens folder: csv, timestamps that tie, titles with quotes, commas, accents and a role marker, one
    that is a word of the prompts, and films that hardly anyone rated."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    lines = ["movieId,title,genres", "1,Note,Drama"]
    for item in range(1, num_items):
        title = f"{NAMES[item % len(NAMES)]} {item} ({1950 + item})".replace('"', '""')
        lines.append(f'{item + 1},"{title}",Drama|Comedy')
    (folder / "movies.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = ["userId,movieId,rating,timestamp"]
    taste = 1.0 / np.arange(3, num_items + 3)
    for user in range(num_users):
        for n, item in enumerate(rng.choice(num_items, 16, replace=False, p=taste / taste.sum()).tolist()):
            rows.append(f"{user + 1},{item + 1},{rng.integers(1, 11) / 2},{1_000_000 + n // 2}")
    (folder / "ratings.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def short_run(data: Path, model: Path, out: Path, **changes: Any) -> dict[str, Any]:
    tiny_data = {
        "data__path": data, "preset": "movielens_cpu", "data__candidates": None, "data__history_length": None,
        "world__num_items": None, "world__num_users": None, "world__interactions_per_user": None,
        "model__path": model, "sft__num_steps": 3, "sft__finding_steps": 2, "train__num_steps": 1,
    }  # fmt: skip
    train.main(tiny.arguments(out=out, **(tiny_data | changes)))
    return json.loads((out / "evaluation.json").read_text())


def base_model(folder: Path) -> Path:
    return tiny.write_model(folder, tiny.random_decoder(adapters=False, scale=0.05, max_position_embeddings=4096))


def test_a_movielens_folder_goes_through_warm_start_and_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from coars_fast.model.load import load_decoder, load_tokenizer

    data, model, out = write_movielens(tmp_path / "data"), base_model(tmp_path / "model"), tmp_path / "run"
    small = {"data__candidates": "random9+gt", "data__history_length": 4}
    evaluation = short_run(data, model, out, **small)
    assert {"before", "after", "difference"} <= set(evaluation)
    # What is rated often enough and is no word of the prompts is one token.
    everything, dataset = load_movielens(data), load_dataset(Config(data=replace(PRESET.data, path=str(data))))
    assert "Note" in dataset.titles and 30 < dataset.num_items < everything.num_items
    tokenizer, decoder = load_tokenizer(out / "base"), load_decoder(out / "base")
    added = {token for token in tokenizer.get_vocab() if token not in tiny.tokenizer().get_vocab()}
    assert added == {f" {title}" for title in dataset.titles if title != "Note"}
    assert decoder.config.vocab_size == len(tokenizer) == len(decoder.head_weight)
    printed = capsys.readouterr().out
    assert "warm start 3/3 conversations" in printed and f"{dataset.num_items} items" in printed
    # A resumed run reads SASRec and the warmed-up base from its folder.
    short_run(data, model, out, **small, train__num_steps=2, resume="auto")
    printed = capsys.readouterr().out
    assert "warm start" not in printed and "SASRec 1/1" not in printed


@pytest.mark.skipif(not (DATA / "ratings.csv").is_file(), reason=f"no MovieLens folder at {DATA}; set COARS_DATA")
def test_the_real_movielens_folder_goes_through(tmp_path: Path) -> None:
    evaluation = short_run(DATA, base_model(tmp_path / "model"), tmp_path / "run")
    assert evaluation["info"]["candidates"] == "random19+gt"
    assert evaluation["info"]["num_eval_users"] == 4
    assert 0 <= evaluation["after"]["hit@1"]["value"] <= 1
