"""What runs share: a warm-started base and the evaluation before training, by a digest of all that they depend on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coars_fast import build as build_module
from coars_fast import cache, train
from coars_fast.build import build
from coars_fast.config import Config, SFTConfig
from coars_fast.config_checks import check
from coars_fast.errors import ConfigError
from coars_fast.progress import Screen
from tests import tiny


@pytest.fixture
def warm(tmp_path: Path) -> Config:
    model = tiny.write_model(tmp_path / "model", tiny.random_decoder(adapters=False, scale=0.05))
    sft = SFTConfig(num_steps=2, batch_size=2, cache=str(tmp_path / "cache"))
    config = tiny.tiny_config(warm_start=True, sft=sft)
    return replace(config, model=replace(config.model, path=str(model)))


def changed(config: Config, section: str, **changes: Any) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **changes)})


def test_runs_of_the_same_warm_start_share_its_base(
    warm: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[int] = []
    teach = build_module.warm_start
    monkeypatch.setattr(build_module, "warm_start", lambda *args: (taught.append(1), teach(*args))[1])

    def run(name: str, config: Config) -> dict[str, torch.Tensor]:
        (tmp_path / name).mkdir()
        return build(config, tmp_path / name, Screen()).decoder.state_dict()

    first = run("one", warm)
    # What is learned later, and how it is evaluated, does not matter.
    for name, config in {
        "two": warm,
        "three": changed(changed(warm, "loss", credit_weight=0.0), "train", num_steps=9),
        "four": changed(changed(warm, "game", stage="none", reference="truth", memory=1), "eval", num_samples=3),
    }.items():
        assert all(torch.equal(value, first[weight]) for weight, value in run(name, config).items())
        assert (tmp_path / name / "base" / "config.json").is_file(), "a run folder is whole by itself"
    assert len(taught) == 1
    others = (
        replace(warm, seed=1),
        changed(warm, "sft", num_steps=3),
        changed(warm, "world", seed=8),
        changed(warm, "data", history_length=2),
        changed(warm, "game", max_turns=3),
        changed(warm, "model", path=str(tiny.write_model(tmp_path / "m2", tiny.random_decoder(1, adapters=False)))),
    )
    for number, config in enumerate(others, start=2):
        run(f"other {number}", config)
        assert len(taught) == number
    kept = list((tmp_path / "cache").iterdir())
    assert len(kept) == len(taught) and not any(".tmp" in path.name for path in kept)


def test_half_a_base_is_made_again(warm: Config, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    first = build(warm, whole, Screen()).decoder.state_dict()
    (tmp_path / "torn" / "base").mkdir(parents=True)
    (tmp_path / "torn" / "base" / "tokenizer.json").write_text("{")
    again = build(warm, tmp_path / "torn", Screen()).decoder.state_dict()
    assert all(torch.equal(value, first[name]) for name, value in again.items())


def test_a_folder_is_kept_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "a").write_text("1")

    def fail(folder: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(cache, "fsync_tree", fail)
    with pytest.raises(OSError, match="disk full"):
        cache.put_folder(tmp_path / "made", tmp_path / "kept" / "one")
    assert list((tmp_path / "kept").iterdir()) == []
    monkeypatch.undo()
    cache.put_folder(tmp_path / "made", tmp_path / "kept" / "one")
    (tmp_path / "made" / "a").write_text("2")
    cache.put_folder(tmp_path / "made", tmp_path / "kept" / "one")
    assert (tmp_path / "kept" / "one" / "a").read_text() == "1", "the first stays"


def test_the_evaluation_before_is_shared_by_runs_that_begin_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.write_model(tmp_path / "model", tiny.taught_decoder(adapters=False))

    def run(name: str, **changes: Any) -> dict[str, Any]:
        shared = {"model__path": model, "eval__cache": tmp_path / "cache", "train__num_steps": 1}
        train.main(tiny.arguments(out=tmp_path / name, **(shared | changes)))
        return json.loads((tmp_path / name / "evaluation.json").read_text())

    first = run("one", eval__cache=None)
    assert "evaluation before 100/100" in capsys.readouterr().out
    for name, changes, is_shared in (
        ("two", {}, False),
        ("three", {"loss__credit_weight": 0}, True),
        ("four", {"train__num_steps": 0, "game__stage": "none"}, True),
        ("five", {"data__eval_seed": 5}, False),
        ("six", {"rollout__max_reply_tokens": 27}, False),
        ("seven", {"game__max_turns": 1}, False),
    ):
        found = run(name, **changes)
        printed = capsys.readouterr().out
        assert ("evaluation before from" in printed) == is_shared, name
        assert ("evaluation before 100/100" in printed) != is_shared, name
        if name in ("two", "three", "four"):
            assert found["before"] == first["before"] and found["users"]["before"] == first["users"]["before"]
    assert "evaluation after" not in capsys.readouterr().out
    found = json.loads((tmp_path / "four" / "evaluation.json").read_text())
    assert found["after"] == found["before"], "nothing was trained"
    records = [json.loads(line) for line in (tmp_path / "three" / "episodes.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in records[:4]] == ["eval_before"] * 4, "transcripts come along"


def test_weights_have_one_digest_and_others_another() -> None:
    decoder = tiny.random_decoder()
    first = cache.weights_digest(decoder)
    assert first == cache.weights_digest(tiny.random_decoder())
    with torch.no_grad():
        next(p for name, p in decoder.named_parameters() if ".lora_b." in name)[0, 0] += 1e-6
    assert cache.weights_digest(decoder) != first


def test_adapters_are_not_kept() -> None:
    with pytest.raises(ConfigError, match=r"sft\.cache: it keeps base models, not adapters"):
        check(Config(warm_start=True, sft=SFTConfig(trainable="adapters", cache="x")))
