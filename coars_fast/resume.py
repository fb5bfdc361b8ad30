"""Where a run writes, and where it goes on after it was stopped.

A run is a folder and a checkpoint a folder in it; `--resume` names either, or `auto` for what `--out` holds. Whatever
was done after the checkpoint is forgotten and done again, the same: random draws are functions of seed and step.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coars_fast.config import Config
from coars_fast.errors import ConfigError, RunFolderError
from coars_fast.model.lora import adapter_state, load_adapter_state, load_peft, save_peft
from coars_fast.state.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    optimizer_from_tensors,
    optimizer_to_tensors,
    save_checkpoint,
    step_of,
)

if TYPE_CHECKING:
    from coars_fast.build import Parts
    from coars_fast.learn.step import Learner
    from coars_fast.progress import Screen
    from coars_fast.state.run_folder import RunFolder

AGENTS = ("recommender", "user")
"""Names of their adapters on disk."""


def run_path(config: Config) -> Path:
    """The run folder that the settings name. Where they name a run to go on with, it is there."""
    if config.resume in (None, "auto"):
        if config.out is not None:
            return Path(config.out)
        if config.resume == "auto":
            raise ConfigError("--resume auto: name the run folder with --out")
        return Path("runs") / f"{Path(config.preset).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    named = Path(config.resume)
    checkpoint = _named_checkpoint(config)
    folder = named if checkpoint is None else checkpoint.parent.parent
    if not named.is_dir():
        newest = find_checkpoint(folder)
        way_out = f"the newest there is {newest}" if newest else "name a run folder or a checkpoint in one"
        raise RunFolderError(f"--resume {named}: no such run or checkpoint folder; {way_out}")
    if not (folder / "config.json").is_file():
        raise RunFolderError(
            f"--resume {named}: {folder} holds no run (there is no config.json); name a run folder or a checkpoint in "
            f"one, or start a run there with --out {folder}"
        )
    if config.out is not None and Path(config.out).resolve() != folder.resolve():
        raise ConfigError(f"--out {config.out}: --resume {named} goes on in {folder}; leave --out away")
    return folder


def find_start(config: Config, run: RunFolder) -> Path | None:
    """The checkpoint to go on from: the one that the settings name, or else the run's newest; None: start at 0."""
    found = _named_checkpoint(config) or find_checkpoint(run.path)
    done, wanted = _done(found), config.train.num_steps
    if done > wanted:
        raise ConfigError(f"train.num_steps: {wanted}, but {found} is {done} steps on; raise it or name an earlier one")
    return found


def is_complete(run: RunFolder, start: Path | None, config: Config) -> bool:
    """Whether nothing is left to do from this checkpoint: all steps are done, and evaluated."""
    return _done(start) == config.train.num_steps and "after" in run.evaluation()


def restore(start: Path | None, learner: Learner) -> int:
    """Load adapters and optimizer from a checkpoint, where there is one; returns how many steps were done."""
    if start is None:
        return 0
    step, tensors, _ = load_checkpoint(start)
    for agent, name in enumerate(AGENTS):
        load_adapter_state(learner.decoder, agent, tensors[name], source=str(start / f"{name}.safetensors"))
    optimizer_from_tensors(learner.optimizer, tensors["optimizer"], learner.named_parameters())
    if learner.teacher is not None:
        learner.teacher.load(tensors.get("teacher"), str(start))
    return step


def save(run: RunFolder, learner: Learner, parts: Parts, step: int) -> None:
    """Write a checkpoint, and both adapters as PEFT folders."""
    state: dict[str, Any] = {name: adapter_state(learner.decoder, agent) for agent, name in enumerate(AGENTS)}
    state["optimizer"] = optimizer_to_tensors(learner.optimizer, learner.named_parameters())
    if learner.teacher is not None:
        state["teacher"] = learner.teacher.adapters
    save_checkpoint(run.path, step, state, {"seed": parts.config.seed}, keep=parts.config.checkpoint.keep)
    for agent, name in enumerate(AGENTS):
        save_peft(learner.decoder, agent, run.path / "adapters" / name, parts.base)


def load_run(config: Config, folder: Path, screen: Screen) -> Parts:
    """Everything of a run with the adapters that it saved last; before the first, it is the model before training.
    Nothing is written: the run may be going on.

    Raises:
        RunFolderError: the run has not come so far yet, or its data has changed.
    """
    from coars_fast.build import build

    is_trained = (folder / "adapters").is_dir()
    parts = build(config, folder, screen, adapters_follow=is_trained, only_read=True)
    if is_trained:
        for agent, name in enumerate(AGENTS):
            load_peft(parts.decoder, agent, folder / "adapters" / name)
    else:
        screen.say(f"{folder}: no adapters were saved yet; this is the model before training")
    return parts


def _named_checkpoint(config: Config) -> Path | None:
    """The checkpoint that `--resume` names; None if it names a run, `auto` or nothing."""
    if config.resume in (None, "auto"):
        return None
    path = Path(config.resume)
    return path if path.parent.name == "checkpoints" else None


def _done(checkpoint: Path | None) -> int:
    return (step_of(checkpoint) or 0) if checkpoint else 0
