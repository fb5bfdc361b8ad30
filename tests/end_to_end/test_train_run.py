"""A whole run through the command line, tiny: what it leaves on disk, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from coars_fast import resume, train
from coars_fast.errors import CoarsError
from coars_fast.state.run_folder import RunFolder
from tests import tiny

AGENTS = ("recommender", "user")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was taught the reply formats for a few seconds."""
    return tiny.write_model(tmp_path_factory.mktemp("model"), tiny.taught_decoder(adapters=False))


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of three steps, with a short evaluation after each."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train.main(tiny.arguments(out=out, model__path=model, train__num_steps=3, eval__every=1))
    return out


def arguments(out: Path | None, model: Path, **changes: Any) -> list[str]:
    return tiny.arguments(out=out, model__path=model, **({"train__num_steps": 3, "eval__every": 1} | changes))


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if "seconds" not in name} for record in found]


def adapter_bytes(run: Path) -> dict[str, bytes]:
    return {name: (run / "adapters" / name / "adapter_model.safetensors").read_bytes() for name in AGENTS}


# --------------------------------------------------------------------------------------------------- what a run leaves


def test_the_run_folder_has_everything_by_its_name(finished: Path) -> None:
    for name in ("config.json", "metrics.jsonl", "episodes.jsonl", "evaluation.json", "report.html"):
        assert (finished / name).stat().st_size > 100, name
    assert list(finished.glob("**/*.png"))
    for name in AGENTS:
        assert {path.name for path in (finished / "adapters" / name).iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
    checkpoint = finished / "checkpoints" / "step-000003"
    assert {path.name for path in checkpoint.iterdir()} == {
        "meta.json", "recommender.safetensors", "user.safetensors", "optimizer.safetensors"
    }  # fmt: skip


def test_the_evaluation_has_before_after_and_difference_with_intervals(finished: Path) -> None:
    evaluation = json.loads((finished / "evaluation.json").read_text())
    for part in ("before", "after", "difference"):
        for name in ("hit@1", "hit@1_sampled", "user_f1", "user_f1_disc@1:1", "user_f1_disc@1:9", "mean_turns",
                     "acceptance", "exclusion_rate", "parse_failure_rec", "parse_failure_user", "repeat_rate",
                     "false_positive_rate"):  # fmt: skip
            interval = evaluation[part][name]
            assert set(interval) == {"value", "low", "high"}
            assert interval["low"] <= interval["high"]
    before, after = evaluation["before"], evaluation["after"]
    for name, difference in evaluation["difference"].items():
        assert difference["value"] == pytest.approx(after[name]["value"] - before[name]["value"], abs=1e-9)
    assert evaluation["before"]["parse_failure_rec"]["value"] < 0.9  # the conversations mean something
    assert evaluation["info"]["num_eval_users"] == 4


def test_the_records_follow_the_steps(finished: Path) -> None:
    metrics = records(finished / "metrics.jsonl")
    assert [r["step"] for r in metrics if r["kind"] == "train"] == [1, 2, 3]
    assert [r["step"] for r in metrics if r["kind"] == "evaluation"] == [0, 1, 2, 3]
    for record in metrics:
        if record["kind"] == "train":
            # the bound: what was recorded while sampling is what the training forward computes
            assert record["logp_difference_max"] < 1e-4
            assert record["grad_norm_rec"] > 0
    evaluation = json.loads((finished / "evaluation.json").read_text())
    last = [r for r in metrics if r["kind"] == "evaluation"][-1]
    assert last["metrics"] == evaluation["after"]


def test_the_settings_can_be_read_back(finished: Path, model: Path) -> None:
    settings = json.loads((finished / "config.json").read_text())
    assert settings["model"]["path"] == str(model)
    assert settings["train"]["num_steps"] == 3 and settings["preset"] == "cpu_tiny"


def test_transcripts_are_readable(finished: Path) -> None:
    episodes = records(finished / "episodes.jsonl")
    assert {episode["kind"] for episode in episodes} == {"eval_before", "train", "eval_after"}
    for episode in episodes:
        assert episode["turns"] and episode["target_title"]
        for turn in episode["turns"]:
            assert turn["rec_valid"] == (turn["item_title"] is not None)
            assert "<|im_" not in turn["rec_text"] + turn["user_text"]
    assert any(turn["user_text"] for episode in episodes for turn in episode["turns"])


def test_training_moved_the_adapters(finished: Path) -> None:
    from safetensors.torch import load_file

    for name in AGENTS:
        state = load_file(finished / "adapters" / name / "adapter_model.safetensors")
        assert any(bool(value.any()) for key, value in state.items() if "lora_B" in key), name


def test_the_adapters_load_with_peft(finished: Path, model: Path) -> None:
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    from coars_fast.model.load import load_decoder
    from coars_fast.model.lora import add_adapters, load_peft

    decoder = load_decoder(model)
    add_adapters(decoder, rank=4, alpha=16.0)
    ids = list(range(20, 60))
    for agent, name in enumerate(AGENTS):
        folder = finished / "adapters" / name
        load_peft(decoder, agent, folder)
        theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder).eval()
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits[0, :-1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            torch.testing.assert_close(tiny.sequence_logp(decoder, ids, agent), expected, atol=1e-4, rtol=0)


def test_the_same_settings_give_the_same_run(finished: Path, model: Path, tmp_path: Path) -> None:
    train.main(arguments(tmp_path / "again", model))
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(finished)
    assert (tmp_path / "again" / "evaluation.json").read_text() == (finished / "evaluation.json").read_text()


def test_another_seed_gives_another_run_on_the_same_evaluation_users(
    finished: Path, model: Path, tmp_path: Path
) -> None:
    train.main(arguments(tmp_path / "other", model, seed=1, train__num_steps=1, eval__every=0))
    assert adapter_bytes(tmp_path / "other") != adapter_bytes(finished)
    evaluation, other = (json.loads((run / "evaluation.json").read_text()) for run in (finished, tmp_path / "other"))
    assert evaluation["before"] == other["before"]


# -------------------------------------------------------------------------------------------------------------- resume


class Killed(Exception):
    """Stands for the end of the process."""


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the run die right after the checkpoint of `step`."""
    save = resume.save

    def dying(run: Any, learner: Any, parts: Any, done: int) -> None:
        save(run, learner, parts, done)
        if done == step:
            raise Killed

    monkeypatch.setattr(resume, "save", dying)


@pytest.mark.parametrize("step", [1, 2])
def test_a_run_that_was_stopped_goes_on_as_if_it_never_was(
    finished: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(step, patch)
        train.main(arguments(out, model))
    assert not (out / "report.html").exists()
    train.main(arguments(out, model, resume="auto"))
    assert adapter_bytes(out) == adapter_bytes(finished)
    assert (out / "evaluation.json").read_text() == (finished / "evaluation.json").read_text()
    assert without_times(records(out / "metrics.jsonl")) == without_times(records(finished / "metrics.jsonl"))
    assert records(out / "episodes.jsonl") == records(finished / "episodes.jsonl")


def test_a_run_that_was_stopped_before_its_first_checkpoint_starts_again(
    finished: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def dying(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(resume, "save", dying)
        train.main(arguments(out, model))
    train.main(arguments(out, model, resume="auto"))
    assert adapter_bytes(out) == adapter_bytes(finished)
    assert without_times(records(out / "metrics.jsonl")) == without_times(records(finished / "metrics.jsonl"))


def test_resume_from_a_named_checkpoint_forgets_what_came_after(finished: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    argv = arguments(None, model, resume=out / "checkpoints" / "step-000001")
    train.main(argv)
    assert adapter_bytes(out) == adapter_bytes(finished)
    assert (out / "evaluation.json").read_text() == (finished / "evaluation.json").read_text()
    assert [r["step"] for r in records(out / "metrics.jsonl") if r["kind"] == "train"] == [1, 2, 3]


def test_resume_with_more_steps_extends_a_finished_run(finished: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    train.main(arguments(None, model, resume=out, train__num_steps=4))
    metrics = records(out / "metrics.jsonl")
    assert [r["step"] for r in metrics if r["kind"] == "train"] == [1, 2, 3, 4]
    assert adapter_bytes(out) != adapter_bytes(finished)


def test_resume_of_a_finished_run_repeats_nothing(
    finished: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "report.html").unlink()
    train.main(arguments(out, model, resume="auto"))
    assert "all 3 steps are done and evaluated" in capsys.readouterr().out
    assert (out / "report.html").is_file()
    assert adapter_bytes(out) == adapter_bytes(finished)
    assert (out / "evaluation.json").read_text() == (finished / "evaluation.json").read_text()
    assert without_times(records(out / "metrics.jsonl")) == without_times(records(finished / "metrics.jsonl"))
    assert records(out / "episodes.jsonl") == records(finished / "episodes.jsonl")


def test_a_longer_run_that_dies_before_its_last_evaluation_is_not_taken_for_finished(
    finished: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures of the shorter run must not pass for those of the longer one."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(4, patch)
        train.main(arguments(out, model, resume="auto", train__num_steps=4))
    assert set(json.loads((out / "evaluation.json").read_text())) == {"before", "users"}
    train.main(arguments(out, model, resume="auto", train__num_steps=4))
    evaluation = json.loads((out / "evaluation.json").read_text())
    last = [r for r in records(out / "metrics.jsonl") if r["kind"] == "evaluation"][-1]
    assert last["step"] == 4 and last["metrics"] == evaluation["after"]


def test_resume_with_fewer_steps_than_were_done_is_refused_and_changes_nothing(
    finished: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    message = refused(arguments(out, model, resume="auto", train__num_steps=2), capsys)
    assert "train.num_steps: 2" in message and "step-000003 is 3 steps on" in message
    assert (out / "config.json").read_text() == (finished / "config.json").read_text()


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a run that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        train.main(argv)
    assert exit_.value.code == 2 and isinstance(exit_.value.__cause__, CoarsError)
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def test_a_checkpoint_that_does_not_exist_is_an_error_and_nothing_is_lost(
    finished: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    missing = out / "checkpoints" / "step-000009"
    message = refused(arguments(None, model, resume=missing), capsys)
    assert str(missing) in message and str(out / "checkpoints" / "step-000003") in message
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == sorted(
        path.name for path in (finished / "checkpoints").iterdir()
    )


def test_a_damaged_checkpoint_names_the_file_and_the_one_before(
    finished: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    damaged = out / "checkpoints" / "step-000003" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    message = refused(arguments(out, model, resume="auto", train__num_steps=4), capsys)
    assert str(damaged) in message and "step-000002" in message
    assert adapter_bytes(out) == adapter_bytes(finished)


def test_a_run_folder_in_use_is_refused(
    finished: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with RunFolder.open(out, {}, resume=False):
        message = refused(arguments(out, model, resume="auto"), capsys)
    assert str(out) in message and "in use by process" in message and "--out" in message


def test_a_folder_that_holds_a_run_is_not_overwritten(
    finished: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.name != "run.lock"}
    message = refused(arguments(finished, model), capsys)
    assert str(finished) in message and "--resume auto" in message
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file() and p.name != "run.lock"}


def test_resume_with_other_settings_is_refused(finished: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(arguments(finished, model, resume="auto", train__learning_rate="1e-3"), capsys)
    assert "train.learning_rate was 0.002, now 0.001" in message


def test_resume_without_a_folder_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--out" in refused(arguments(None, model, resume="auto"), capsys)
    gone = tmp_path / "gone"
    assert str(gone) in refused(arguments(None, model, resume=gone), capsys)
    assert not gone.exists()


def test_resume_of_a_folder_that_holds_no_run_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    message = refused(arguments(None, model, resume=folder), capsys)
    assert str(folder) in message and "--out" in message
    assert not list(folder.iterdir())
