"""Fetch a file over HTTPS so that it can be interrupted.

What has arrived lies in `<file>.part` beside the target, with the server's mark of its version (ETag or date) in
`<file>.part.json`; a later call asks for the rest (`Range`, `If-Range`) and begins again where the server changed its
file or cannot send parts. A file takes its name, and its checksum is kept for later calls, when it is complete, has the
right checksum and can be read. What lies in its place is replaced: ask :mod:`coars_fast.data.kept` before.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from coars_fast.data.archives import ArchiveError, check_gzip, unpack
from coars_fast.data.kept import check_folder, list_of, read_sums, sums_of, write_sums
from coars_fast.errors import CoarsError
from coars_fast.state.files import fsync_folder, fsync_tree

Progress = Callable[[int, int], None]
"""Called with (bytes so far, bytes in all; 0 if the server does not say)."""

ATTEMPTS = 5
TIMEOUT_SECONDS = 60.0
_PAUSE_SECONDS = 1.0  # before the second attempt; doubled before each further one
_BLOCK = 1 << 20


class DownloadError(CoarsError, OSError):
    """A file could not be fetched whole, has another checksum, or cannot be read."""


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    """Follows redirections, but not away from HTTPS."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[override]
        _check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_OnlyHttps)


def fetch(url: str, target: Path, *, sha256: str | None, md5: str | None = None, progress: Progress) -> str:
    """Fetch `url` to `target`, going on with what an earlier call had of it, and return its SHA-256.

    A known `sha256` or `md5` must match. Without one the SHA-256 is kept in `<target>.sha256` and must match the one
    that an earlier download left there. A file named `.gz` is read to its end before.

    Raises:
        DownloadError: not HTTPS, the server refuses or breaks off too often, no room, or another checksum or a broken
            file (what was fetched is deleted then).
    """
    part = _part_of(target)
    found = _fetch_part(url, part, target, sha256, md5, progress)
    if target.suffix == ".gz":
        with _deleted_if_broken(url, part):
            check_gzip(part)
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    # A file with the sum of another version would not count as fetched, if the process died between the two.
    target.unlink(missing_ok=True)
    write_sums(target, {target: found})
    os.replace(part, target)
    _mark_of(part).unlink(missing_ok=True)
    fsync_folder(target.parent)
    return found


def fetch_folder(
    url: str, archive: Path, folder: Path, *, sha256: str | None, md5: str | None = None, progress: Progress
) -> str:
    """Fetch the zip file `url` as :func:`fetch` would fetch `archive`, and unpack it as `folder`; the archive itself is
    not kept. Returns its SHA-256.

    Raises:
        DownloadError: see :func:`fetch`; or the folder cannot be written.
        KeptError: the folder holds files of somebody else by now; what was fetched stays for the next call.
    """
    part = _part_of(archive)
    found = _fetch_part(url, part, archive, sha256, md5, progress)
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        with _deleted_if_broken(url, part):
            unpack(part, fresh)
        sums = {archive: found} | {folder / path: digest for path, digest in sums_of(fresh).items()}
        fsync_tree(fresh)
        check_folder(archive, folder)
        if folder.is_dir():
            shutil.rmtree(folder)
        write_sums(archive, sums)  # before the files: without it they would count as somebody else's
        fresh.rename(folder)
    except OSError as error:
        if isinstance(error, CoarsError):
            raise
        raise DownloadError(
            f"{folder}: cannot be written ({error.strerror or error}); {part} is kept: run the command again"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    _delete(part)
    fsync_folder(folder.parent)
    return found


def fetch_md5(url: str) -> str | None:
    """The MD5 that the `.md5` file at this address names, whatever stands around it; None if there is no such file."""
    _check_url(url)
    try:
        with _OPENER.open(url, timeout=TIMEOUT_SECONDS) as response:
            text = response.read(4096).decode("ascii", "replace")
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (403, 404, 410):
            return None
        raise DownloadError(f"{url}: the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"{url}: {error or type(error).__name__}") from error
    match = re.search(r"(?<![0-9a-fA-F])[0-9a-fA-F]{32}(?![0-9a-fA-F])", text)
    if match is None:
        raise DownloadError(f"{url}: no MD5 in it, found {text[:60]!r}")
    return match[0].lower()


def _fetch_part(url: str, part: Path, target: Path, sha256: str | None, md5: str | None, progress: Progress) -> str:
    """Make `part` complete and return its SHA-256, which is the right one of `target`."""
    _check_url(url)
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(
            f"{part.parent}: no folder can be made here ({error.strerror}); give another --to"
        ) from error
    pause = _PAUSE_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        before = _size(part)
        try:
            _fetch_rest(url, part, progress)
            break
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, DownloadError):
                raise
            if isinstance(error, urllib.error.HTTPError):
                error.close()
                if error.code < 500 and error.code != 429:
                    raise DownloadError(f"{url}: the server answers {error.code} {error.reason}") from error
            if _size(part) > before:
                pause = _PAUSE_SECONDS  # it goes on, if slowly
            if attempt == ATTEMPTS:
                raise DownloadError(
                    f"{url}: broken off {ATTEMPTS} times ({error or type(error).__name__}); {_size(part):,} bytes are "
                    f"kept in {part}: run the command again to go on from there"
                ) from error
            time.sleep(pause)
            pause *= 2
    return _verify(url, part, target, sha256, md5)


def _fetch_rest(url: str, part: Path, progress: Progress) -> None:
    """Append to `part` what it lacks; :class:`http.client.IncompleteRead` or another OSError if that breaks off."""
    have, mark = _size(part), _read_mark(part, url)
    headers = {"Accept-Encoding": "identity", "User-Agent": "coars_fast"}
    if have and mark:
        headers |= {"Range": f"bytes={have}-", "If-Range": mark}
    try:
        response = _OPENER.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        error.close()
        if (error.headers.get("Content-Range") or "") == f"bytes */{have}":
            return  # an earlier call had fetched it all
        _delete(part)
        raise http.client.IncompleteRead(b"") from error
    with response:
        start = _start_of(response.headers.get("Content-Range")) if response.status == 206 else 0
        if start not in (0, have):
            raise DownloadError(f"{url}: asked for bytes from {have}, the server sends them from {start}")
        length = int(response.headers.get("Content-Length") or 0)
        total = start + length if length else 0
        if length > (free := shutil.disk_usage(part.parent).free):
            raise DownloadError(f"{part.parent}: {length:,} bytes are to come, {free:,} are free")
        etag = response.headers.get("ETag") or ""
        new_mark = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
        _mark_of(part).write_text(json.dumps({"url": url, "mark": new_mark}))
        with part.open("r+b" if start else "wb") as file:
            file.seek(start)
            file.truncate()
            while data := response.read(_BLOCK):
                file.write(data)
                start += len(data)
                progress(start, total)
        if total and start < total:
            raise http.client.IncompleteRead(b"", total - start)


def _verify(url: str, part: Path, target: Path, sha256: str | None, md5: str | None) -> str:
    """The SHA-256 of `part`; deletes it and raises if it is not the one that it should be."""
    digests = {"SHA-256": hashlib.sha256(), "MD5": hashlib.md5(usedforsecurity=False)}
    with part.open("rb") as file:
        while data := file.read(_BLOCK):
            for digest in digests.values():
                digest.update(data)
    found = {name: digest.hexdigest() for name, digest in digests.items()}
    trusted = None if sha256 or md5 else read_sums(target).get(target)
    for name, expected, source, way_out in (
        ("SHA-256", sha256, "expected", ""),
        ("MD5", md5, "published", ""),
        (
            "SHA-256",
            trusted,
            f"that of the first download, in {list_of(target)}, is",
            "; delete that file too if you trust the new one",
        ),
    ):
        if expected and found[name] != expected.lower():
            _delete(part)
            raise DownloadError(
                f"{url}: the {name} is {found[name]}, {source} {expected.lower()}; it was deleted{way_out}"
            )
    return found["SHA-256"]


@contextmanager
def _deleted_if_broken(url: str, part: Path) -> Iterator[None]:
    """An archive that cannot be read goes, and its sum was not kept: the next call begins anew."""
    try:
        yield
    except ArchiveError as error:
        _delete(part)
        raise DownloadError(f"{error}; what {url} sent was deleted, the next call begins anew") from error


def _check_url(url: str) -> None:
    """HTTPS alone; plain HTTP from this very machine, for tests and mirrors."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost")):
        raise DownloadError(f"{url}: not an https address")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _delete(part: Path) -> None:
    part.unlink(missing_ok=True)
    _mark_of(part).unlink(missing_ok=True)


def _mark_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_mark(part: Path, url: str) -> str | None:
    """What names the server's version of which `part` is the beginning; None if it is unknown or of another address."""
    try:
        record = json.loads(_mark_of(part).read_text())
        return record["mark"] if record["url"] == url else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _start_of(content_range: str | None) -> int:
    match = re.match(r"bytes (\d+)-", content_range or "")
    return int(match[1]) if match else -1
