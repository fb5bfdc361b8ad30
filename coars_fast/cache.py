"""What runs of one data set and seed share: warm-started bases (`sft.cache`) and evaluations before training
(`eval.cache`).

An entry's name holds a digest of everything that it depends on: other settings, other data or another base make
another entry, never a wrong one. Entries are put in place whole. One thing is not in a digest: the code. Who changes
how models are taught or evaluated gives a fresh folder, or deletes the old one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from coars_fast.config import Config
from coars_fast.data.records import Dataset
from coars_fast.data.splits import Split
from coars_fast.model.decoder import Decoder
from coars_fast.progress import Screen
from coars_fast.state.files import atomic_write_text, delete_folder, fsync_tree, json_text, plain, read_json

REWARD_SETTINGS = ("alpha", "stage", "exclude_accepted_misses", "balance_user_turns", "reference", "rewards")
"""Settings of the game that decide what is learned from a conversation, but not what is said in it or counted."""
TAUGHT_BY = {
    "data": ("num_eval_users", "eval_seed"),
    "sasrec": ("cache",),
    "sft": ("cache",),
    "model": ("path", "device", "gradient_checkpointing", "lora_rank", "lora_alpha"),
    "game": (*REWARD_SETTINGS, "memory"),
}
"""Sections that a warm-started base depends on, and their settings that have no part in it, or that are in the digest
of the users and of the weights."""


def warm_base_key(config: Config, dataset: Dataset, split: Split, decoder: Decoder) -> str:
    """Digest of all that a warm-started base depends on.

    Args:
        config: settings of the run.
        dataset: its titles.
        split: its training part.
        decoder: the base before anything was added to it.
    """
    settings = {section: _without(getattr(config, section), out) for section, out in TAUGHT_BY.items()}
    return _digest(
        settings | {"seed": config.seed},
        [dataset.titles, split.sequences, split.train_sequences, split.train_users],
        _made_with(decoder),
    )


def evaluation_key(config: Config, dataset: Dataset, split: Split, decoder: Decoder) -> str:
    """Digest of all that the evaluation of a model depends on: its weights, the users and what is asked of them."""
    settings = {
        "data": asdict(config.data),
        "game": _without(config.game, REWARD_SETTINGS),
        "rollout": _without(config.rollout, ("batch_size", "kv_gib")),
        "eval": _without(config.eval, ("cache", "every", "num_bootstrap")),
        "sasrec": _without(config.sasrec, ("cache",)),
    }
    users = [[u, split.sequences[u]] for u in split.eval_users]
    return _digest(settings, [dataset.titles, split.train_sequences, users], _made_with(decoder))


def shared_evaluation(
    config: Config,
    dataset: Dataset,
    split: Split,
    decoder: Decoder,
    screen: Screen,
    play: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """What `play()` returns for the model as it is now, or what another run kept of it in `eval.cache`."""
    if config.eval.cache is None:
        return play()
    path = Path(config.eval.cache) / f"evaluation-{evaluation_key(config, dataset, split, decoder)}.json"
    if path.is_file():
        screen.say(f"evaluation before from {path}")
        return read_json(path)
    record = play()
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json_text(record))
    return record


def weights_digest(decoder: Decoder) -> str:
    """Digest of all weights, adapters too, with their names and types."""
    found = hashlib.sha256()
    for name, weight in decoder.state_dict().items():
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        found.update(memoryview(weight.detach().cpu().contiguous().view(torch.uint8).numpy()).cast("B"))
    return found.hexdigest()


def put_folder(source: Path, kept: Path) -> None:
    """Copy the folder `source` to `kept`, which appears whole or not at all; a `kept` that is there already stays."""
    if kept.exists():
        return
    kept.parent.mkdir(parents=True, exist_ok=True)
    beside = kept.with_name(f"{kept.name}.tmp-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        shutil.copytree(source, beside)
        fsync_tree(beside)
        beside.rename(kept)
    except OSError:
        if not kept.exists():  # otherwise another run was faster
            raise
    finally:
        if beside.exists():
            delete_folder(beside)


def _made_with(decoder: Decoder) -> list[str]:
    return [weights_digest(decoder), decoder.head_weight.device.type, torch.__version__]


def _without(section: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in asdict(section).items() if name not in names}


def _digest(settings: Mapping[str, Any], *more: Any) -> str:
    text = json.dumps([plain(settings), *more], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
