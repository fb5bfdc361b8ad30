"""A trained SASRec is kept in the run folder, and for other runs in `sasrec.cache`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coars_fast import build
from coars_fast.config import Config, SASRecConfig, WorldConfig
from coars_fast.data.load import load_dataset
from coars_fast.data.sasrec import SASRec
from coars_fast.data.splits import make_split
from coars_fast.progress import Screen


def test_runs_share_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = SASRecConfig(hidden_size=8, num_epochs=1, max_length=10, cache=str(tmp_path / "cache"))
    config = Config(world=WorldConfig(num_users=30), sasrec=small)
    dataset = load_dataset(config)
    calls: list[int] = []
    train = build.train_sasrec
    monkeypatch.setattr(build, "train_sasrec", lambda *args, **kwargs: (calls.append(1), train(*args, **kwargs))[1])

    def sasrec(name: str, config: Config = config) -> SASRec:
        (tmp_path / name).mkdir(exist_ok=True)
        split = make_split(dataset, config.data)
        return build._sasrec(config, dataset, split, tmp_path / name, Screen(), only_read=False)

    first = sasrec("one")
    for name in ("one", "two"):
        again = sasrec(name)
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in first.state_dict().items())
    assert len(calls) == 1
    assert [p.name for p in (tmp_path / "two").iterdir()] == [p.name for p in (tmp_path / "cache").iterdir()]
    sasrec("three", replace(config, sasrec=replace(small, cache=None)))
    sasrec("one", replace(config, sasrec=replace(small, cache=None)))
    sasrec("two", replace(config, sasrec=replace(small, seed=1)))
    assert len(calls) == 3, "without a cache, and with other settings"
