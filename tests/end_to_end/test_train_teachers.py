"""Runs with teachers of other weights: they train, and go on from a checkpoint with the teacher that they had."""

from __future__ import annotations

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
