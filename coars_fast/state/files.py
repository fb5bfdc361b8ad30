"""Files that are whole or absent, whenever the process dies; and files of one JSON object a line.

An atomic write goes to a temporary file in the same folder, reaches the disk (fsync), and takes the final name in one
step (`os.replace`), which the folder's own fsync makes durable. No torch here: plots and the report read with it too.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from coars_fast.errors import RunFolderError


def replace_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in place: `path` holds either what it held before or all of
    the new content, even if the process or the machine dies meanwhile."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(beside)
        # Some writers make files that only their owner may read; a run folder is shared like any other file.
        beside.chmod(0o666 & ~_umask())
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    fsync_folder(path.parent)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """:func:`replace_with` of bytes."""
    replace_with(path, lambda beside: beside.write_bytes(data))


def atomic_write_text(path: Path, text: str) -> None:
    """:func:`atomic_write_bytes` of UTF-8 text."""
    atomic_write_bytes(path, text.encode())


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Make every file and folder below `folder`, and `folder` itself, durable."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            fsync_folder(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    fsync_folder(folder)


def delete_folder(folder: Path) -> None:
    """Delete `folder`; it loses its name first, so that a kill meanwhile cannot leave half of it under that name."""
    doomed = folder
    if ".tmp-" not in folder.name:
        doomed = folder.with_name(f"{folder.name}.tmp-deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numbers of numpy or torch become Python's, and what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return plain(value.item())
    raise TypeError(f"a run folder cannot hold {value!r} ({type(value).__name__})")


def json_line(record: Mapping[str, Any]) -> str:
    """`record` on one line, with its line break."""
    return json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n"


def json_text(record: Mapping[str, Any]) -> str:
    """`record`, indented for people."""
    return json.dumps(plain(record), ensure_ascii=False, allow_nan=False, indent=2) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; :class:`RunFolderError` if it is missing or holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(f"{path}: no such file; is {path.parent} the folder of a run?") from None
    except ValueError as error:
        raise RunFolderError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RunFolderError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of `path`, none if there is no such file. A last line that a dying process tore is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    torn = lines.pop()  # b"" after a complete last line
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            # Blocks of a file can be lost in a power cut, and then the line break outlives what stood before it.
            if number == len(lines) and not torn:
                break
            raise RunFolderError(f"{path}, line {number}: not JSON: {error}; delete the line to go on") from error
        if not isinstance(record, dict):
            raise RunFolderError(f"{path}, line {number}: expected a JSON object; delete the line to go on")
        records.append(record)
    return records


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace `path` by `records`, atomically."""
    atomic_write_text(path, "".join(json_line(record) for record in records))


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
