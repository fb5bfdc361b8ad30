"""Bad input to the command line: status 2, and one line that names field or file and the way out; nothing trained."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coars_fast import train
from coars_fast.errors import CoarsError
from coars_fast.model.tokenizer import train_tokenizer
from coars_fast.state.run_folder import RUN_FILES
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model"), tiny.random_decoder(adapters=False))


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    def update(*_: Any) -> None:
        raise AssertionError("a training step ran")

    monkeypatch.setattr("coars_fast.learn.step.Learner.update", update)


def refused(capsys: pytest.CaptureFixture[str], out: Path, **changes: Any) -> str:
    """The one line on stderr; the run must end with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        train.main(tiny.arguments(out=out, **changes))
    assert exit_.value.code == 2 and isinstance(exit_.value.__cause__, CoarsError)
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.endswith("\n") and message.count("\n") == 1
    return message


CONTRADICTIONS: list[tuple[dict[str, Any], list[str]]] = [
    ({"objective": "faithful", "train__minibatches": 2}, ["faithful", "train.minibatches"]),
    ({"model__tokenizer": "catalogue"}, ["model.tokenizer", "--warm-start"]),
    ({"model__tokenizer": "catalogue", "warm_start": True, "sft__trainable": "adapters"}, ["sft.trainable all"]),
    ({"train__group_size": 3}, ["train.group_size: 3", "train.episodes_per_step"]),
    ({"train__minibatches": 5}, ["train.minibatches"]),
    ({"train__train_user": False, "train__train_recommender": False}, ["train.train_user", "nothing would be trained"]),
    ({"rollout__temperature": "0.7"}, ["rollout.temperature"]),
    ({"data__candidates": "random9"}, ["data.candidates", "random9", "top20+gt"]),
    ({"loss__clip_low": "1.5"}, ["loss.clip_low"]),
    ({"loss__dual_clip": "0.5"}, ["loss.dual_clip"]),
    ({"train__learning_rate": "0"}, ["train.learning_rate"]),
    ({"train__learning_rate": "nan"}, ["train.learning_rate"]),
    ({"data__num_eval_users": 0}, ["data.num_eval_users"]),
    ({"preset": "nope"}, ["--preset nope", "cpu_tiny"]),
    ({"preset": "movielens_cpu"}, ["--data.path", "MovieLens"]),
    ({"data__format": "movielens"}, ["data.format", "--data.path"]),
    ({"data__format": "world", "data__path": "ml"}, ["data.format", "data.path (ml)"]),
    ({"objective": "cispo", "loss__dual_clip": "3.0"}, ["loss.dual_clip", "cispo", "gspo"]),
    ({"objective": "faithful", "loss__dual_clip": "3.0"}, ["loss.dual_clip", "faithful", "gspo"]),
    ({"train__final_learning_rate": "1.5"}, ["train.final_learning_rate", "between 0 and 1"]),
    ({"sft__finding_steps": 3}, ["sft.finding_steps: 3", "sft.num_steps (2)"]),
    ({"preset": "movielens_cpu", "data__path": "ml"}, ["sft.finding_steps: ", "sft.num_steps (2)"]),
    ({"sft__finding_steps": -1}, ["sft.finding_steps: -1", "negative"]),
    ({"sft__finding_steps": 1, "sft__trainable": "adapters"}, ["sft.finding_steps: ", "--sft.trainable all"]),
    ({"data__min_item_interactions": -1}, ["data.min_item_interactions: -1", "negative"]),
]


@pytest.mark.parametrize(("changes", "expected"), CONTRADICTIONS)
def test_contradictory_settings_are_refused_before_anything_is_made(
    changes: dict[str, Any], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, tmp_path / "run", **changes)
    for part in expected:
        assert part in message
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------- data and models


def bad_input(kind: str, model: Path, tmp_path: Path) -> tuple[dict[str, Any], list[str]]:
    """Flags of a run whose data or model cannot be used, and what the message must name."""
    data, other = tmp_path / "data", tmp_path / "other"
    if kind == "no data folder":
        return {"data__path": tmp_path / "gone", "model__path": model}, [str(tmp_path / "gone")]
    if kind == "no ratings":
        data.mkdir()
        (data / "movies.csv").write_text("movieId,title,genres\n1,A (1999),Drama\n")
        return {"data__path": data, "model__path": model}, ["ratings"]
    if kind == "malformed ratings":
        data.mkdir()
        (data / "movies.csv").write_text("movieId,title,genres\n1,A (1999),Drama\n")
        (data / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,1,four,3\n")
        return {"data__path": data, "model__path": model}, [str(data / "ratings.csv"), "2"]
    if kind == "no item of so many interactions":
        changes = {"data__min_item_interactions": 10_000, "model__path": model}
        return changes, ["data.min_interactions = 5", "data.min_item_interactions = 10000"]
    if kind == "no model folder":
        return {"model__path": tmp_path / "gone"}, [str(tmp_path / "gone")]
    shutil.copytree(model, other)
    if kind == "no weights":
        (other / "model.safetensors").unlink()
        return {"model__path": other}, [str(other), "model.safetensors"]
    if kind == "another architecture":
        settings = json.loads((other / "config.json").read_text()) | {"model_type": "gpt2"}
        (other / "config.json").write_text(json.dumps(settings))
        return {"model__path": other}, [str(other / "config.json"), "gpt2", "qwen3"]
    if kind == "no tokenizer":
        for path in other.glob("tokenizer*"):
            path.unlink()
        return {"model__path": other}, [str(other), "tokenizer"]
    if kind == "no token for the words of items":
        train_tokenizer(["History: it"] * 20, 300).save_pretrained(other)
        changes = {"model__path": other, "model__tokenizer": "catalogue", "warm_start": True}
        return changes, ["model.tokenizer: 'catalogue'", "'Grandstar'", "coars_fast.pretrain", "use own"]
    if kind == "cut weights":
        weights = other / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        return {"model__path": other}, [str(weights)]
    if kind == "too few embeddings":
        tokenizer = copy.deepcopy(tiny.tokenizer())
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer.save_pretrained(other)
        return {"model__path": other}, [str(other), "[PAD]", f"vocab_size is {len(tiny.tokenizer())}"]
    assert kind == "too few positions"
    settings = json.loads((other / "config.json").read_text()) | {"max_position_embeddings": 50}
    (other / "config.json").write_text(json.dumps(settings))
    return {"model__path": other}, ["50 positions", "rollout.max_reply_tokens"]


KINDS = (
    "no data folder", "no ratings", "malformed ratings", "no item of so many interactions", "no model folder",
    "no weights", "another architecture", "no tokenizer", "no token for the words of items", "cut weights",
    "too few embeddings", "too few positions",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_data_and_models_that_cannot_be_used(
    kind: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused, and the run folder keeps nothing that would refuse a run with the input put right."""
    changes, expected = bad_input(kind, model, tmp_path)
    message = refused(capsys, tmp_path / "run", **changes)
    for part in expected:
        assert part in message
    assert not set(RUN_FILES).intersection(path.name for path in (tmp_path / "run").iterdir())


def test_the_same_run_folder_can_be_used_once_the_input_is_right(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    refused(capsys, out, model__path=tmp_path / "gone")
    train.main(tiny.arguments(out=out, model__path=model, train__num_steps=0))
    assert (out / "report.html").is_file()


def test_an_attention_backend_that_is_not_here_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, tmp_path / "run", model__path=model, model__attention="flash_attn", model__device="cpu")
    assert "flash_attn" in message and "sdpa" in message


def test_a_device_that_is_not_here_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, tmp_path / "run", model__path=model, model__device="toaster")
    assert "model.device" in message and "cpu" in message


def test_a_run_folder_that_is_a_file_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    message = refused(capsys, path, model__path=model)
    assert str(path) in message and "--out" in message
    assert path.read_text() == "x"


def test_candidates_that_a_user_does_not_leave_are_refused_before_anything_is_trained(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, tmp_path / "run", model__path=model, data__candidates="random50+gt")
    assert "data.candidates" in message and "took 16 of 60" in message and "at most 45 candidates" in message
    assert not list((tmp_path / "run").glob("sasrec-*"))


def test_the_program_itself_ends_with_one_line_and_status_2(tmp_path: Path) -> None:
    """In a process of its own: no traceback, nothing on stdout."""
    command = [sys.executable, "-m", "coars_fast.train", "--objective", "faithful", "--train.minibatches", "2"]
    result = subprocess.run([*command, "--out", str(tmp_path / "run")], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "error: --objective faithful has no importance ratio: train.minibatches must be 1\n"
    assert not (tmp_path / "run").exists()
