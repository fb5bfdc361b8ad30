"""What earlier downloads left on the disk: what is complete is not fetched again, what is not ours is not touched.

`<file>.sha256`, beside each file that was fetched, lists SHA-256 sums as `sha256sum` does: its own first, then those of
the files that were unpacked from it. A file that is not listed, or has changed since, counts as somebody else's.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from coars_fast.errors import CoarsError
from coars_fast.state.files import atomic_write_text

_NAMED = 5  # files in an error
_LINE = re.compile(r"([0-9a-fA-F]{64})(?: [ *](.+))?")


class KeptError(CoarsError, OSError):
    """Something that was not downloaded lies where a download should go."""


def list_of(target: Path) -> Path:
    """The file with the sums of `target`."""
    return target.with_name(f"{target.name}.sha256")


def read_sums(target: Path) -> dict[Path, str]:
    """Path -> SHA-256 of `target` and of what was unpacked from it; empty if it was never fetched."""
    if not list_of(target).is_file():
        return {}
    lines = map(_LINE.fullmatch, list_of(target).read_text(encoding="utf-8", errors="replace").split("\n"))
    return {target.parent / (line[2] or target.name): line[1].lower() for line in lines if line}


def write_sums(target: Path, sums: Mapping[Path, str]) -> None:
    """The inverse of :func:`read_sums`."""
    lines = [f"{digest}  {path.relative_to(target.parent)}\n" for path, digest in sums.items()]
    atomic_write_text(list_of(target), "".join(lines))


def sums_of(folder: Path) -> dict[Path, str]:
    """The SHA-256 of every file below `folder`, by its path in it."""
    return {path.relative_to(folder): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kept_file(target: Path, sha256: str | None) -> str | None:
    """The SHA-256 of `target` if it is there as it was fetched, or as `sha256` demands; None if it is to be fetched.

    Raises:
        KeptError: something else is there.
    """
    if not os.path.lexists(target):
        return None
    before = read_sums(target).get(target)
    found = sha256_of(target) if target.is_file() else None
    if found is not None and found == (sha256 or before):
        if found != before:
            write_sums(target, {target: found})
        return found
    if found is None or found != before:
        raise KeptError(
            f"{target}: not fetched by this command, or changed since (SHA-256 {found}); move it away to have it "
            f"fetched, or give its sum with --sha256 to keep it"
        )
    return None


def kept_folder(target: Path, folder: Path, sha256: str | None) -> str | None:
    """The SHA-256 of the archive `target` if all that was unpacked from it is still in `folder`, and `sha256` demands
    no other one; None if it is to be fetched.

    Raises:
        KeptError: see :func:`check_folder`; not if all is there, whatever else there is.
    """
    sums = read_sums(target)
    whole = sums.pop(target, None)
    if whole and sums and sha256 in (None, whole) and not any(_changed(path, sums) for path in sums):
        return whole
    check_folder(target, folder)
    return None


def check_folder(target: Path, folder: Path) -> None:
    """Raises :class:`KeptError` if `folder` is a file, or holds files that were not unpacked from `target`."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise KeptError(f"{folder}: a file or a link, where a folder is to be made; move it away, or give another --to")
    sums = read_sums(target)
    inside = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    foreign = [str(path.relative_to(folder)) for path in inside if _changed(path, sums)]
    if foreign:
        more = f" and {len(foreign) - _NAMED} more" if len(foreign) > _NAMED else ""
        raise KeptError(
            f"{folder}: holds files that this command did not put there, or that have changed since: "
            f"{', '.join(foreign[:_NAMED])}{more}; move them away, or give another --to"
        )


def _changed(path: Path, sums: Mapping[Path, str]) -> bool:
    """Whether `path` is not the file that is listed; a pipe or a device is never opened."""
    return path not in sums or path.is_symlink() or not path.is_file() or sha256_of(path) != sums[path]
