"""Decoders and tokenizers from a folder or from the Hugging Face hub, and back into a folder.

Only safetensors are read: a pickle can run anything, so `pytorch_model.bin` is refused and never downloaded, and no
code that a model ships is ever executed. Left out: quantised weights, and sharding on writing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coars_fast.errors import MissingModelError, ModelError
from coars_fast.model.config import DecoderConfig
from coars_fast.model.decoder import Decoder
from coars_fast.model.files import open_safetensors, read_json, write_json, write_safetensors

__all__ = ["load_decoder", "load_tokenizer", "resolve_folder", "save_decoder"]

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TEXT_PATTERNS = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def resolve_folder(path_or_hub_id: str | Path, *, weights: bool = True) -> Path:
    """A local folder with the model's files: the given one, or a download of the hub's model of that name.

    Args:
        path_or_hub_id: a folder, or "owner/name" on the hub.
        weights: download the weights, too, not only configuration and tokenizer.

    Raises:
        MissingModelError: no such folder, and the hub has no such model or cannot be reached.
        ModelError: the path is a file.
    """
    name = str(path_or_hub_id)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{path}: a file; a model is a folder with config.json and {_WEIGHTS}")
    if isinstance(path_or_hub_id, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise MissingModelError(f"{path}: no such folder")
    from huggingface_hub import snapshot_download

    patterns = [*_TEXT_PATTERNS, *(["*.safetensors"] if weights else [])]
    try:
        # Subfolders hold other formats of the same weights ("original/", "onnx/"): gigabytes that nobody would read.
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]))
    except Exception as error:  # its errors share no base class: HTTP, validation, offline mode, disk
        raise MissingModelError(
            f"{name!r} is neither a folder (no such folder: {path.absolute()}) nor a model that the hub would give "
            f"(it said: {type(error).__name__}: {error})"
        ) from error


def load_decoder(
    path_or_hub_id: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """Read a Llama, Qwen2 or Qwen3 checkpoint; peak memory is about one copy of the weights in `dtype`.

    Args:
        path_or_hub_id: a folder with config.json and model.safetensors (or its shards and index), or a hub id, which is
            downloaded.
        dtype: of the weights in memory, whatever they are on disk.
        device: where they go.

    Raises:
        MissingModelError: the folder, its config.json, its weights or one of its shards is not there.
        ModelError: an unsupported architecture, weights that are not safetensors, or missing, misshapen, unexpected or
            damaged tensors; names file, tensor, found and expected.
    """
    folder = resolve_folder(path_or_hub_id)
    config_file = folder / "config.json"
    config = DecoderConfig.from_hf(read_json(config_file), source=str(config_file))
    with torch.device("meta"):
        decoder = Decoder(config)
    expected = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    files = _weight_files(folder)
    _check_names(files, expected, config, folder)
    state: dict[str, Tensor] = {}
    spare_head: tuple[Path, Tensor] | None = None
    for path, names in files.items():
        with open_safetensors(path, str(device)) as handle:
            for name in names:
                shape = tuple(handle.get_slice(name).get_shape())
                wanted = expected.get(name, expected["model.embed_tokens.weight"])
                if shape != wanted:
                    raise ModelError(f"{path}: tensor {name} has shape {list(shape)}, expected {list(wanted)}")
                tensor = handle.get_tensor(name)
                if tensor.dtype not in _FLOATS:
                    raise ModelError(f"{path}: tensor {name} is {tensor.dtype}; only plain float weights are supported")
                # A copy on the CPU, since what safetensors returns is a window into the file.
                tensor = tensor.to(dtype, copy=tensor.device.type == "cpu")
                if name in expected:
                    state[name] = tensor
                else:
                    spare_head = (path, tensor)
    if spare_head is not None and not torch.equal(spare_head[1], state["model.embed_tokens.weight"]):
        raise ModelError(
            f"{spare_head[0]}: lm_head.weight differs from model.embed_tokens.weight, but {config_file} says "
            f"tie_word_embeddings: true; set it to false if the head is its own"
        )
    decoder.load_state_dict(state, assign=True)
    return decoder


def _weight_files(folder: Path) -> dict[Path, list[str]]:
    """Which file holds which tensors, from the single file or from the index of shards."""
    single, index = folder / _WEIGHTS, folder / _INDEX
    if single.is_file():
        with open_safetensors(single) as handle:
            return {single: list(handle.keys())}
    if not index.is_file():
        pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
        if pickles:
            raise ModelError(
                f"{folder}: weights must be safetensors, found {pickles[0]}; pickled files are never loaded. Convert: "
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) with transformers, from a "
                "source that you trust"
            )
        raise MissingModelError(f"{folder}: neither {_WEIGHTS} nor {_INDEX} is there")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: field weight_map with the shard of each tensor expected, found {weight_map!r}")
    files: dict[Path, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(f"{index}: tensor {name} is in {shard!r}; a safetensors file of this folder expected")
        files.setdefault(folder / shard, []).append(name)
    for path, names in files.items():
        if not path.is_file():
            raise MissingModelError(f"{path}: no such file, but {index.name} says that it holds {names[0]}")
        with open_safetensors(path) as handle:
            absent = sorted(set(names) - set(handle.keys()))
        if absent:
            raise ModelError(f"{path}: tensor {absent[0]} is missing, but {index.name} says that it is here")
    return files


def _check_names(files: dict[Path, list[str]], expected: Iterable[str], config: DecoderConfig, folder: Path) -> None:
    """Every tensor once, none unknown; drops what older checkpoints carry without need."""
    allowed = set(expected) | ({"lm_head.weight"} if config.tie_word_embeddings else set())
    for path, names in files.items():
        names[:] = [name for name in names if not name.endswith("rotary_emb.inv_freq")]
        unexpected = sorted(set(names) - allowed)
        if unexpected:
            hint = "; its config.json does not ask for it" if unexpected[0].endswith(".bias") else ""
            raise ModelError(
                f"{path}: unexpected tensor {unexpected[0]} (and {len(unexpected) - 1} more) for a {config.family} "
                f"model of {config.num_layers} layers{hint}"
            )
    missing = sorted(set(expected) - {name for names in files.values() for name in names})
    if missing:
        where = next(iter(files)) if len(files) == 1 else folder / _INDEX
        raise ModelError(f"{where}: tensor {missing[0]} is missing (and {len(missing) - 1} more)")


def load_tokenizer(path_or_hub_id: str | Path) -> Any:
    """The model's own tokenizer, as transformers' `AutoTokenizer` builds it; remote code is never run.

    Args:
        path_or_hub_id: as for `load_decoder`.

    Returns:
        A `transformers.PreTrainedTokenizerBase`.

    Raises:
        MissingModelError: no such folder, nor such a model on the hub.
        ModelError: no tokenizer in the folder, or one that transformers cannot build.
    """
    folder = resolve_folder(path_or_hub_id, weights=False)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"{folder}: no tokenizer; one of {', '.join(_TOKENIZER_FILES)} expected")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception on malformed files
        raise ModelError(f"{folder}: transformers cannot build the tokenizer: {error!r}") from error


def save_decoder(decoder: Decoder, folder: str | Path, *, hf_config_extra: Mapping[str, Any] | None = None) -> None:
    """Write config.json and model.safetensors so that `transformers.AutoModelForCausalLM` loads them; no adapters.

    Each file is written beside and renamed; the weights come first, so that a folder with a config.json is complete.

    Args:
        decoder: its base weights are written in their dtype.
        folder: made if need be.
        hf_config_extra: further fields of config.json, such as `eos_token_id`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor for name, tensor in decoder.state_dict().items() if ".lora_" not in name}
    dtype = str(decoder.head_weight.dtype).removeprefix("torch.")
    write_safetensors(folder / _WEIGHTS, weights)
    write_json(folder / "config.json", {**decoder.config.to_hf(), "dtype": dtype, **(hf_config_extra or {})})
