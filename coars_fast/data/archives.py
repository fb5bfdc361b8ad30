"""Read what was fetched so that it cannot do harm: unpack zip files whole or not at all, look through gzip files.

Nothing that exists is replaced here; what may be is for :mod:`coars_fast.data.kept` to say.
"""

from __future__ import annotations

import errno
import gzip
import lzma
import os
import shutil
import stat
import zipfile
import zlib
from pathlib import Path

from coars_fast.errors import CoarsError

_BLOCK = 1 << 20
_MAX_UNPACKED = 20 << 30
_MAX_RATIO = 200
_NOT_THE_DISK = (None, errno.EINVAL, errno.ENAMETOOLONG)  # broken data, a place before its beginning, a name


class ArchiveError(CoarsError, OSError):
    """An archive is broken, or unsafe to unpack."""


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a zip file as `folder`, which must not exist yet. A single folder inside becomes `folder`.

    Raises:
        ArchiveError: not a zip file, a broken or an empty one; a member that would lie outside, is a link or a device,
            or has the name of a folder; or one that grows suspiciously.
    """
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:
            members = file.infolist()
            size = sum(member.file_size for member in members)
            packed = sum(member.compress_size for member in members)
            if size > _MAX_UNPACKED or size > _MAX_RATIO * max(packed, 1 << 20):
                raise ArchiveError(f"{archive}: {packed:,} bytes would become {size:,}; not unpacked")
            if all(member.is_dir() for member in members):
                raise ArchiveError(f"{archive}: holds no files")
            for member in members:
                _unpack_member(file, member, beside, archive)
        inside = list(beside.iterdir())
        source = inside[0] if len(inside) == 1 and inside[0].is_dir() else beside
        source.rename(folder)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError) as error:
        raise ArchiveError(f"{archive}: not a zip file that can be unpacked ({error})") from error
    except OSError as error:
        if isinstance(error, ArchiveError) or error.errno not in _NOT_THE_DISK:
            raise
        raise ArchiveError(f"{archive}: not a zip file that can be unpacked ({error})") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _unpack_member(file: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path, archive: Path) -> None:
    name, kind = member.filename.replace("\\", "/"), stat.S_IFMT(member.external_attr >> 16)
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or ":" in parts[0]:
        raise ArchiveError(f"{archive}: {member.filename!r} would lie outside its folder; nothing was unpacked")
    if not name or min(name) < " ":
        raise ArchiveError(f"{archive}: {member.filename!r} is no name of a file; nothing was unpacked")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ArchiveError(f"{archive}: {member.filename!r} is a link or a device; nothing was unpacked")
    target = folder.joinpath(*parts)
    left = member.file_size
    try:
        if member.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with file.open(member) as source, target.open("wb") as copy:
            while data := source.read(min(_BLOCK, left + 1)):
                left -= len(data)
                if left < 0:
                    raise ArchiveError(f"{archive}: {member.filename!r} is larger than it says; nothing was unpacked")
                copy.write(data)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise ArchiveError(
            f"{archive}: {member.filename!r} needs a name as a file and as a folder; nothing was unpacked"
        ) from error


def check_gzip(path: Path) -> None:
    """Read a gzip file to its end.

    Raises:
        ArchiveError: not a gzip file, one cut short, or one with nothing in it.
    """
    try:
        with gzip.open(path) as file:
            some = file.read(_BLOCK)
            while file.read(_BLOCK):
                pass
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ArchiveError(f"{path}: not a gzip file that can be read ({error})") from error
    if not some:
        raise ArchiveError(f"{path}: holds nothing")
