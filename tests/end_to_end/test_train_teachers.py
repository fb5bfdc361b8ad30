"""Runs with teachers of other weights: they train, and go on from a checkpoint with the teacher that they had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coars_fast import resume, train
from coars_fast.errors import CoarsError
from coars_fast.resume import AGENTS
from tests import tiny


def adapter_bytes(run: Path) -> dict[str, bytes]:
    return {name: (run / "adapters" / name / "adapter_model.safetensors").read_bytes() for name in AGENTS}


@pytest.mark.parametrize("teacher", ["ema", pytest.param("initial", marks=pytest.mark.slow)])
def test_a_run_with_another_teacher_goes_on_as_if_it_was_never_stopped(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.write_model(tmp_path / "model", tiny.random_decoder(adapters=False))
    options: dict[str, Any] = {
        "model__path": model, "loss__teacher": teacher, "loss__teacher_decay": "0.5", "loss__credit_weight": "1.0",
    }  # fmt: skip
    train.main(tiny.arguments(out=tmp_path / "whole", **options))

    save = resume.save

    def save_and_stop(run: Any, learner: Any, parts: Any, step: int) -> None:
        save(run, learner, parts, step)
        raise CoarsError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save", save_and_stop)
        with pytest.raises(SystemExit):
            train.main(tiny.arguments(out=tmp_path / "parts", **options))
    train.main(tiny.arguments(out=tmp_path / "parts", resume="auto", **options))
    assert adapter_bytes(tmp_path / "parts") == adapter_bytes(tmp_path / "whole")


def test_a_run_whose_teacher_is_scored_by_the_engine_is_the_same_run(tmp_path: Path) -> None:
    metrics = {}
    for placement in ("trainer", "engine"):
        model = tiny.write_model(tmp_path / placement / "model", tiny.random_decoder(adapters=False))
        out = tmp_path / placement / "run"
        train.main(tiny.arguments(out=out, model__path=model, loss__teacher_placement=placement))
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        metrics[placement] = [record for record in records if record["kind"] == "train"]
    for ours, theirs in zip(metrics["engine"], metrics["trainer"], strict=True):
        assert ours["rollout_scored_tokens"] > 0 == theirs["rollout_scored_tokens"]
        for name in ("loss", "credit_abs_mean", "grad_norm_rec"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss__teacher": "ema"}, "engine scores with the current adapters"),
        ({"loss__credit_weight": "0"}, "engine scores with the current adapters"),
        ({"game__reference": "other_user"}, "before game.reference other_user can be written"),
    ],
)
def test_what_the_engine_cannot_score_is_refused(
    options: dict[str, str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main(tiny.arguments(out=tmp_path / "run", loss__teacher_placement="engine", **options))
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
