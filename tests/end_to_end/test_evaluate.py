"""`python -m coars_fast.evaluate RUN`: the figures of a run's adapters again, or on other users."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from coars_fast import evaluate, train
from tests import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two large steps, so that training changes the figures."""
    folder = tmp_path_factory.mktemp("evaluate")
    model = tiny.write_model(folder / "model", tiny.taught_decoder(adapters=False))
    train.main(tiny.arguments(out=folder / "run", model__path=model, train__learning_rate=0.05))
    return folder / "run"


def test_the_figures_are_those_after_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main([str(run)])
    found, stored = (json.loads((run / f"{n}.json").read_text()) for n in ("evaluation-again", "evaluation"))
    assert found["metrics"] == stored["after"] != stored["before"]
    assert found["users"] == stored["users"]["after"]
    printed = capsys.readouterr().out
    assert "hit@1" in printed and "evaluation-again.json" in printed


def test_other_users_and_candidates(run: Path, tmp_path: Path) -> None:
    before = (run / "evaluation.json").read_bytes()
    evaluate.main([str(run), "--eval-seed", "7", "--num-eval-users", "3", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["settings"] == {"eval_seed": 7, "num_eval_users": 3}
    assert found["users"]["greedy"]["episodes"] == [1.0] * 3
    assert set(found["ids"]) <= set(json.loads(before)["users"]["ids"]), "held out by the run"
    evaluate.main([str(run), "--candidates", "random9+gt"])
    assert (run / "evaluation-candidates-random9+gt.json").is_file()
    assert (run / "evaluation.json").read_bytes() == before, "the run's own figures stay"


def test_a_run_without_adapters_is_the_model_before_training(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = json.loads((run / "config.json").read_text())["model"]["path"]
    train.main(tiny.arguments(out=tmp_path / "none", model__path=model, train__num_steps=0))
    evaluate.main([str(tmp_path / "none")])
    assert "no adapters were saved yet" in capsys.readouterr().out
    found = json.loads((tmp_path / "none" / "evaluation-again.json").read_text())
    assert found["metrics"] == json.loads((run / "evaluation.json").read_text())["before"]


def test_users_of_short_histories_leave_out_what_cannot_be_asked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = json.loads((run / "config.json").read_text())["model"]["path"]
    train.main(tiny.arguments(out=tmp_path / "run", model__path=model, train__num_steps=1, data__history_length=10))
    printed = capsys.readouterr().out
    assert printed.count("F1-disc at 1:1 is left out: no evaluation user took 10 items beside the 10 shown") == 1
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())["after"]
    assert "user_f1_disc@1:3" in found and "user_f1_disc@1:1" not in found
    assert (tmp_path / "run" / "report.html").is_file()


def test_nothing_is_made_in_a_run_that_may_be_going_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running = tmp_path / "run"
    shutil.copytree(run, running)
    config = json.loads((running / "config.json").read_text())

    def refused(said: str, **changes: Any) -> None:
        (running / "config.json").write_text(json.dumps(config | changes))
        there = sorted(running.rglob("*"))
        with pytest.raises(SystemExit):
            evaluate.main([str(running)])
        assert said in capsys.readouterr().err and sorted(running.rglob("*")) == there

    (running / "base").mkdir()
    (running / "base" / "model.safetensors").write_text("half of it")
    refused("the run has not made its base model yet", warm_start=True)
    refused("is not the data that it read", world=config["world"] | {"seed": 99})
    refused("config.json: loss.mystery: no such setting", loss=config["loss"] | {"mystery": 1})
    with pytest.raises(SystemExit):
        evaluate.main([str(run), "--out", str(tmp_path / "none" / "found.json")])
    assert "no folder" in capsys.readouterr().err


def test_what_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path)])
    assert "no config.json; name the folder of a run" in capsys.readouterr().err
