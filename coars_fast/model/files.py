"""Reading and writing of a model folder's files: whole or not at all, and never pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coars_fast.errors import MissingModelError, ModelError
from coars_fast.state.files import atomic_write_text, replace_with

__all__ = ["open_safetensors", "read_json", "write_json", "write_safetensors"]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as indented JSON, atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    atomic_write_text(path, text)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors, atomically; views and tensors of any device are fine."""
    # Sharing storage is refused by the format, and a tensor that is a view would drag its whole storage along.
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace_with(path, lambda beside: save_file(whole, beside, metadata={"format": "pt"}))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        MissingModelError: there is no such file.
        ModelError: it is not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingModelError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not valid JSON ({error}); copy or download the file again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: a JSON object expected, found {type(content).__name__}")
    return content


@contextmanager
def open_safetensors(path: Path, device: str = "cpu"):  # noqa: ANN201 (an opaque handle of the safetensors package)
    """Open a safetensors file for reading tensor by tensor.

    Raises:
        MissingModelError: there is no such file.
        ModelError: it is truncated or not safetensors.
    """
    if not path.is_file():
        raise MissingModelError(f"{path}: no such file")
    try:
        handle = safe_open(path, framework="pt", device=device)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: damaged or not safetensors ({error}); copy or download the file again") from error
    with handle as opened:
        yield opened
