"""Zip files that are broken, dangerous, or hold a folder of their own."""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path

import pytest

from coars_fast.data import archives
from coars_fast.data.archives import ArchiveError, unpack


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def archive(path: Path, members: dict[str, bytes], *, mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            file.writestr(info, content)
    return path


def test_a_single_folder_of_an_archive_becomes_the_folder(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"ml/": b"", "ml/u.data": b"1", "ml/sub/x": b"2"})
    assert unpack(path, tmp_path / "set") == tmp_path / "set"
    assert (tmp_path / "set/u.data").read_bytes() == b"1" and (tmp_path / "set/sub/x").read_bytes() == b"2"
    unpack(archive(tmp_path / "a.zip", {"u.data": b"3", "u.item": b"4"}), tmp_path / "flat")
    assert names(tmp_path / "flat") == ["u.data", "u.item"]
    assert names(tmp_path) == ["a.zip", "flat", "set"]


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "..\\evil", "C:\\evil", "C:/evil"])
def test_no_member_lies_outside(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "cache"
    inside.mkdir()
    path = archive(tmp_path / "a.zip", {"good": b"1", name: b"2"})
    with pytest.raises(ArchiveError, match=r"would lie outside its folder; nothing was unpacked"):
        unpack(path, inside / "set")
    assert names(inside) == [] and names(tmp_path) == ["a.zip", "cache"]


def test_links_bombs_and_broken_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.zip"
    with pytest.raises(ArchiveError, match="is a link or a device"):
        unpack(archive(path, {"link": b"/etc/passwd"}, mode=stat.S_IFLNK | 0o777), tmp_path / "set")
    monkeypatch.setattr(archives, "_MAX_RATIO", 2)
    with pytest.raises(ArchiveError, match=r"would become 5,000,000; not unpacked"):
        unpack(archive(path, {"zeros": b"0" * 5_000_000}), tmp_path / "set")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ArchiveError, match="not a zip file that can be unpacked"):
        unpack(path, tmp_path / "set")
    whole = bytearray(archive(path, {"a": b"hello " * 40}).read_bytes())
    whole[40] ^= 0xFF
    path.write_bytes(whole)
    with pytest.raises(ArchiveError, match="not a zip file that can be unpacked"):
        unpack(path, tmp_path / "set")
    whole[whole.index(b"PK\5\6") + 16 + 3] = 0x7F  # where the directory begins: far behind the end
    path.write_bytes(whole)
    with pytest.raises(ArchiveError, match="not a zip file that can be unpacked"):
        unpack(path, tmp_path / "set")
    for members in ({}, {"empty/": b""}):
        with pytest.raises(ArchiveError, match=r"a\.zip: holds no files"):
            unpack(archive(path, members), tmp_path / "set")
    with pytest.raises(ArchiveError, match="is no name of a file"):
        unpack(archive(path, {"a\nb": b"1"}), tmp_path / "set")
    assert names(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("order", [("a", "a/b"), ("a/b", "a"), ("a", "a/")])
def test_a_name_of_a_file_and_of_a_folder(tmp_path: Path, order: tuple[str, str]) -> None:
    path = archive(tmp_path / "a.zip", {name: b"" if name.endswith("/") else b"1" for name in order})
    with pytest.raises(ArchiveError, match=rf"a\.zip: '{order[1]}' needs a name as a file and as a folder"):
        unpack(path, tmp_path / "set")
    assert names(tmp_path) == ["a.zip"]
