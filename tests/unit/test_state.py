"""Run folders and checkpoints: what goes in comes back, and only the newest stays."""

import json
import math

import numpy as np
import pytest
import torch

from coars_fast.errors import ConfigError, RunFolderError
from coars_fast.state import files
from coars_fast.state.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    optimizer_from_tensors,
    optimizer_to_tensors,
    save_checkpoint,
)
from coars_fast.state.run_folder import RunFolder, check_settings, differences

CONFIG = {
    "out": "a",
    "resume": None,
    "seed": 1,
    "train": {"num_steps": 5, "learning_rate": 0.1},
    "checkpoint": {"keep": 2},
}


def test_records_of_a_run(tmp_path):
    with RunFolder.open(tmp_path / "deep" / "run", CONFIG, resume=False) as run:
        run.append_metrics(
            {"kind": "train", "step": 1, "loss": math.nan, "reward": torch.tensor(0.5), "n": np.int64(3)}
        )
        # Flushed at once: a report or `tail -f` reads the run while it goes on.
        assert files.read_jsonl(run.path / "metrics.jsonl") == [
            {"kind": "train", "step": 1, "loss": None, "reward": 0.5, "n": 3}
        ]
        run.append_metrics({"step": 2, "nested": {"x": [math.inf, 1.5]}})
        run.append_episodes([{"step": 1, "text": "a\nb\u2028“c”"}, {"step": 2}])
        run.write_evaluation({"before": {"hit@1": {"value": 0.5}}})
        run.write_evaluation({"before": {"hit@1": {"value": math.nan}}})
    assert files.read_jsonl(run.path / "metrics.jsonl")[1] == {"step": 2, "nested": {"x": [None, 1.5]}}
    assert files.read_jsonl(run.path / "episodes.jsonl") == [{"step": 1, "text": "a\nb\u2028“c”"}, {"step": 2}]
    assert files.read_json(run.path / "evaluation.json") == {"before": {"hit@1": {"value": None}}}
    assert json.loads((run.path / "config.json").read_text()) == CONFIG
    assert not list(run.path.glob(".*"))


def test_resume_may_extend_a_run(tmp_path):
    RunFolder.open(tmp_path, CONFIG, resume=True).close()  # `--resume auto` in an empty folder starts there
    longer = {
        **CONFIG,
        "out": "b",
        "preset": "my.toml",
        "resume": "auto",
        "train": {"num_steps": 9, "learning_rate": 0.1},
        "checkpoint": {},
    }
    RunFolder.open(tmp_path, longer, resume=True).close()
    assert files.read_json(tmp_path / "config.json") == longer
    check_settings(tmp_path, CONFIG)
    assert differences(CONFIG, {**CONFIG, "seed": 2, "new": True}) == {
        "seed": ("1", "2"),
        "new": ("(absent)", "true"),
    }


def test_truncate_after_forgets_the_later_timeline(tmp_path):
    with RunFolder.open(tmp_path, CONFIG, resume=False) as run:
        for step in range(1, 7):
            run.append_metrics({"kind": "train", "step": step})
        run.append_episodes({"step": step} for step in (0, 2, 4, 6))
        run.append_metrics({"kind": "note"})
        for step in (2, 4, 6):
            save_checkpoint(tmp_path, step, {}, {}, keep=3)
        run.truncate_after(4)
        run.append_metrics({"kind": "train", "step": 5})
    steps = [record.get("step") for record in files.read_jsonl(tmp_path / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, None, 5]
    assert [record["step"] for record in files.read_jsonl(tmp_path / "episodes.jsonl")] == [0, 2, 4]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000004"]


def test_truncate_after_forgets_the_evaluation_after(tmp_path):
    before = {"before": {"hit@1": 0.5}, "users": {"before": [1, 2]}}
    with RunFolder.open(tmp_path, CONFIG, resume=False) as run:
        assert run.evaluation() == {}
        run.write_evaluation({"before": {"hit@1": 0.5}, "after": {}, "users": {"before": [1, 2], "after": [3]}})
        run.truncate_after(4)
        assert run.evaluation() == before
        run.truncate_after(4)
        assert run.evaluation() == before


def stop_by_own_error(folder, config, write=lambda run: None, error=ConfigError):
    with pytest.raises(error), RunFolder.open(folder, config, resume=True) as run:
        write(run)
        raise error("the input is wrong")


def test_a_run_that_its_input_stops_leaves_the_folder_as_it_was(tmp_path):
    def make_base(run):
        (run.path / "base").mkdir()

    stop_by_own_error(tmp_path, CONFIG, make_base)
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    with RunFolder.open(tmp_path, CONFIG, resume=False) as run:
        make_base(run)
    stop_by_own_error(tmp_path, {**CONFIG, "out": "other"})
    assert files.read_json(tmp_path / "config.json") == CONFIG and (tmp_path / "base").is_dir()


@pytest.mark.parametrize("error", [ConfigError, KeyboardInterrupt])
def test_a_run_that_wrote_or_was_killed_keeps_its_settings(tmp_path, error):
    def write(run):
        if error is ConfigError:
            run.append_metrics({"step": 1})

    stop_by_own_error(tmp_path, CONFIG, write, error)
    assert files.read_json(tmp_path / "config.json") == CONFIG


def test_checkpoint_roundtrip(tmp_path):
    shared = torch.arange(6.0)
    tensors = {
        "recommender": {"a": torch.randn(3, 4), "half": torch.randn(2).bfloat16(), "step": torch.tensor(3.0)},
        "user": {"view": torch.randn(4, 3).T, "x": shared, "y": shared, "part": shared[2:]},
        "empty": {},
    }
    meta = {"learning_rate": 0.1, "note": "ü"}

    def adapter(folder):
        (folder / "adapter_config.json").write_text("{}")
        (folder / "sub").mkdir()
        (folder / "sub" / "adapter.bin").write_bytes(b"123")

    path = save_checkpoint(tmp_path, 20, tensors, meta, writers={"adapter_rec": adapter})
    assert path == tmp_path / "checkpoints" / "step-000020"
    step, loaded, loaded_meta = load_checkpoint(path)
    assert (step, loaded_meta, loaded.keys()) == (20, meta, tensors.keys())
    for name, group in tensors.items():
        assert loaded[name].keys() == group.keys()
        for key, value in group.items():
            assert loaded[name][key].dtype == value.dtype and torch.equal(loaded[name][key], value)
    assert (path / "adapter_rec" / "sub" / "adapter.bin").read_bytes() == b"123"
    checksums = files.read_json(path / "meta.json")["sha256"]
    assert {"adapter_rec/adapter_config.json", "adapter_rec/sub/adapter.bin", "user.safetensors"} <= checksums.keys()


def test_the_newest_checkpoints_are_kept_and_found(tmp_path):
    assert find_checkpoint(tmp_path / "nothing") is None
    for step in (1, 2, 10, 1_000_000):
        save_checkpoint(tmp_path, step, {"x": {"s": torch.tensor(step)}}, {}, keep=3)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000010", "step-1000000"]
    newest = find_checkpoint(tmp_path)
    assert newest is not None and load_checkpoint(newest)[0] == 1_000_000
    assert find_checkpoint(tmp_path / "checkpoints" / "step-000002") == tmp_path / "checkpoints" / "step-000002"
    with pytest.raises(RunFolderError, match="meta.json"):
        load_checkpoint(tmp_path)


def test_saving_a_step_again_replaces_it(tmp_path):
    for value in (1, 2):
        path = save_checkpoint(tmp_path, 5, {"x": {"v": torch.tensor(value)}}, {}, keep=1)
    assert load_checkpoint(path)[1]["x"]["v"] == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]


def model_and_optimizer():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2), torch.nn.Linear(2, 2))
    names = dict(model.named_parameters())
    groups = [{"params": [p for n, p in names.items() if "bias" in n], "lr": 0.1}]
    groups += [{"params": [p for n, p in names.items() if "weight" in n], "lr": 0.01, "weight_decay": 0.1}]
    return model, torch.optim.AdamW(groups), names


def steps(model, optimizer, start, stop):
    """Training whose data are functions of the step; the last layer is never trained."""
    for step in range(start, stop):
        data = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model[:2](data).pow(2).mean().backward()
        optimizer.step()


def test_a_resumed_optimizer_goes_on_bit_for_bit(tmp_path):
    model, optimizer, names = model_and_optimizer()
    steps(model, optimizer, 0, 3)
    state = optimizer_to_tensors(optimizer, names)
    assert state["0.weight:exp_avg"].shape == (4, 3) and not any(name.startswith("2.") for name in state)
    path = save_checkpoint(tmp_path, 3, {"model": model.state_dict(), "optimizer": state}, {})
    steps(model, optimizer, 3, 6)

    again, optimizer_again, names_again = model_and_optimizer()
    _, tensors, _ = load_checkpoint(path)
    again.load_state_dict(tensors["model"])
    before = {name: value.clone() for name, value in tensors["optimizer"].items()}
    optimizer_from_tensors(optimizer_again, tensors["optimizer"], names_again)
    assert [group["lr"] for group in optimizer_again.param_groups] == [0.1, 0.01]
    steps(again, optimizer_again, 3, 6)
    for name, parameter in names.items():
        assert torch.equal(parameter, names_again[name]), name
    for name, value in before.items():
        assert torch.equal(value, tensors["optimizer"][name]), "the tensors given in must not be trained on"


def test_an_optimizer_state_of_another_model():
    model, optimizer, names = model_and_optimizer()
    with pytest.raises(RunFolderError, match="'9.weight'"):
        optimizer_from_tensors(optimizer, {"9.weight:exp_avg": torch.zeros(4, 3)}, names)
    with pytest.raises(RunFolderError, match=r"0.weight:exp_avg: shape \[5, 3\]"):
        optimizer_from_tensors(optimizer, {"0.weight:exp_avg": torch.zeros(5, 3)}, names)


def test_json_refuses_what_it_cannot_hold():
    with pytest.raises(TypeError, match="object"):
        files.json_line({"x": object()})
