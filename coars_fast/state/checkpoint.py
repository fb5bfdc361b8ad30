"""Checkpoints: safetensors files and a `meta.json` in `checkpoints/step-000020/`, whole or absent.

A checkpoint is written into a folder of another name, reaches the disk, and takes its name by one rename. safetensors
carries no checksum, so `meta.json` holds the SHA-256 of every file, and loading compares them first. No pickle.

There is no random state in a checkpoint, on purpose: every random draw of the trainer is a stateless function of
(seed, step), so that step 21 of a resumed run draws what step 21 of an uninterrupted one does.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from coars_fast.errors import RunFolderError
from coars_fast.state.files import atomic_write_text, delete_folder, fsync_folder, fsync_tree, json_text, read_json

FORMAT = 1
NAME = re.compile(r"step-(\d{6,})(\.replaced)?")


def save_checkpoint(
    folder: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    meta: Mapping[str, Any],
    *,
    writers: Mapping[str, Callable[[Path], None]] | None = None,
    keep: int = 2,
) -> Path:
    """Write `checkpoints/step-<step>` in the run folder `folder`, then delete all but the newest `keep`.

    `tensors`: file name (without its ending) -> the tensors in it, on any device. `writers`: subfolder name -> a
    function that fills that (existing, empty) subfolder; its files are checksummed too. `meta`: anything JSON can hold.
    """
    home = Path(folder) / "checkpoints"
    home.mkdir(parents=True, exist_ok=True)
    fsync_folder(home.parent)
    _sweep(home)
    target = home / f"step-{step:06d}"
    temporary = home / f"{target.name}.tmp-{os.getpid()}"
    temporary.mkdir()
    for name, group in tensors.items():
        safetensors.torch.save_file(_unshared(group), temporary / f"{name}.safetensors")
    for name, write in (writers or {}).items():
        (temporary / name).mkdir()
        write(temporary / name)
    checksums = {path.relative_to(temporary).as_posix(): _sha256(path) for path in _files(temporary)}
    content = {"format": FORMAT, "step": step, "meta": meta, "sha256": checksums}
    atomic_write_text(temporary / "meta.json", json_text(content))
    fsync_tree(temporary)
    if target.exists():
        # A folder cannot take the name of a full one; until the second rename, find_checkpoint knows this name too.
        target.rename(home / f"{target.name}.replaced")
    temporary.rename(target)
    fsync_folder(home)
    _sweep(home, keep)
    return target


def find_checkpoint(path: str | Path) -> Path | None:
    """The newest checkpoint of a run folder, or `path` itself if that is a checkpoint; None if there is none."""
    path = Path(path)
    if (path / "meta.json").is_file():
        return path
    found = _checkpoints(path / "checkpoints")
    return found[-1] if found else None


def step_of(path: Path) -> int | None:
    """The step in a checkpoint folder's name; None for another name."""
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def load_checkpoint(path: str | Path) -> tuple[int, dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(step, tensors on the CPU, meta) as given to :func:`save_checkpoint`; subfolders of `writers` are the caller's.

    Every file is compared with its checksum first. Raises :class:`RunFolderError` naming the file that is missing or
    damaged, and the checkpoint to go back to.
    """
    path = Path(path)
    try:
        content = read_json(path / "meta.json")
        step, meta, checksums = content["step"], content["meta"], content["sha256"]
    except (RunFolderError, KeyError) as error:
        raise RunFolderError(f"{path / 'meta.json'}: missing or damaged ({error}); {_way_out(path)}") from error
    if content.get("format") != FORMAT:
        found = content.get("format")
        raise RunFolderError(f"{path}: format {found!r}; this version of coars_fast reads {FORMAT}")
    for name, checksum in checksums.items():
        file = path / name
        if not file.is_file():
            raise RunFolderError(f"{file}: missing; {_way_out(path)}")
        if _sha256(file) != checksum:
            raise RunFolderError(f"{file}: damaged, its checksum is not the one in meta.json; {_way_out(path)}")
    files = [path / name for name in checksums if "/" not in name and name.endswith(".safetensors")]
    return step, {file.stem: safetensors.torch.load_file(file) for file in files}, meta


# The optimizer ------------------------------------------------------------------------------------------------------


def optimizer_to_tensors(optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of `optimizer` as `<parameter name>:<state key>` -> tensor; parameters never stepped have none.

    `names`: parameter name -> parameter, for every parameter of the optimizer. Learning rates and other settings are
    not state here: they follow from the configuration and the step.
    """
    name_of = {id(parameter): name for name, parameter in names.items()}
    tensors = {}
    for parameter in _parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name_of[id(parameter)]}:{key}"] = torch.as_tensor(value)
    return tensors


def optimizer_from_tensors(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], names: Mapping[str, Tensor]
) -> None:
    """Put back what :func:`optimizer_to_tensors` gave; each tensor goes to its parameter's device.

    Raises :class:`RunFolderError` for a parameter that is not among `names` or has another shape.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition(":")
        if name not in names:
            raise RunFolderError(f"optimizer state of {name!r}: this run has no such parameter; is it another model?")
        if value.ndim and value.shape != names[name].shape:
            raise RunFolderError(
                f"optimizer state {full_name}: shape {list(value.shape)}, the parameter has {list(names[name].shape)}; "
                "is it another model or LoRA rank?"
            )
        # load_state_dict keeps tensors of the right device and type as they are; the caller's must not change.
        state.setdefault(name, {})[key] = value.clone()
    name_of = {id(parameter): name for name, parameter in names.items()}
    order = [name_of[id(parameter)] for parameter in _parameters(optimizer)]
    indexed = {index: state[name] for index, name in enumerate(order) if name in state}
    optimizer.load_state_dict({"state": indexed, "param_groups": optimizer.state_dict()["param_groups"]})


# Helpers ------------------------------------------------------------------------------------------------------------


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    """In the order in which the optimizer numbers them."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _unshared(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, no two in the same memory, as safetensors wants them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in group.items():
        tensor = tensor.detach().contiguous().cpu()
        address = tensor.untyped_storage().data_ptr()
        if address in seen:
            tensor = tensor.clone()
        seen.add(address)
        result[name] = tensor
    return result


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checkpoints(home: Path) -> list[Path]:
    """Oldest first; `step-N.replaced` counts only while `step-N` is missing."""
    found: dict[int, Path] = {}
    for path in sorted(home.glob("step-*"), reverse=True):  # "step-000020.replaced" comes before "step-000020"
        step = step_of(path)
        if step is not None:
            found[step] = path
    return [found[step] for step in sorted(found)]


def _sweep(home: Path, keep: int | None = None) -> None:
    """Delete what a killed save left behind and, given `keep`, all checkpoints but the newest."""
    valid = _checkpoints(home)
    stay = valid[-keep:] if keep else valid
    for path in list(home.glob("step-*")):
        if path not in stay:
            delete_folder(path)


def _way_out(path: Path) -> str:
    """What to do instead of loading the broken checkpoint `path`."""
    step = step_of(path)
    earlier = [other for other in _checkpoints(path.parent) if step is not None and (step_of(other) or 0) < step]
    if earlier:
        return f"go on from the checkpoint before it: --resume {earlier[-1]}"
    return "there is no checkpoint before it; start again with another --out"
