"""Downloads from a server on this machine: broken transfers, wrong checksums, servers without ranges, what is there."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from coars_fast.data import __main__ as program
from coars_fast.data import download
from coars_fast.data.download import DownloadError, fetch, fetch_folder, fetch_md5
from coars_fast.data.kept import KeptError
from coars_fast.data.public import PUBLIC, PublicSet

CONTENT = bytes(range(256)) * 900
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `files`; breaks off after `limits` bytes of each answer in turn, then answers whole."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {"/data.bin": CONTENT}
        self.limits: list[int] = []
        self.errors: list[int] = []
        self.ranges, self.etag, self.length = True, '"v1"', True
        self.asked: list[str | None] = []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore

    def do_GET(self) -> None:
        server = self.server
        server.asked.append(self.headers.get("Range"))
        if self.path.startswith("/away"):
            self.send_response(302)
            self.send_header("Location", "http://example.invalid/data.bin")
            self.end_headers()
            return
        if server.errors:
            self.send_error(server.errors.pop(0))
            return
        if self.path not in server.files:
            self.send_error(404)
            return
        content, start = server.files[self.path], 0
        asked = self.headers.get("Range")
        if asked and server.ranges and self.headers.get("If-Range") == server.etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if server.length:
            self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", server.etag)
        self.end_headers()
        sent = content[start:]
        self.wfile.write(sent[: server.limits.pop(0)] if server.limits else sent)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def nothing(done: int, total: int) -> None:
    pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole_with_its_checksum_beside_it(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    target = tmp_path / "new" / "data.bin"
    found = fetch(server.url("data.bin"), target, sha256=SHA256.upper(), progress=lambda *call: seen.append(call))
    assert found == SHA256 and target.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert names(target.parent) == ["data.bin", "data.bin.sha256"]
    assert (tmp_path / "new" / "data.bin.sha256").read_text() == f"{SHA256}  data.bin\n"


def test_a_broken_transfer_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    server.limits = [1000, 5000]
    fetch(server.url("data.bin"), tmp_path / "data.bin", sha256=SHA256, progress=nothing)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000-", "bytes=6000-"]


def test_another_call_goes_on_with_what_an_earlier_one_left(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "data.bin"
    server.limits = [1000] * download.ATTEMPTS
    with pytest.raises(DownloadError, match=r"broken off 5 times.*5,000 bytes are kept in .*run the command again"):
        fetch(server.url("data.bin"), target, sha256=SHA256, progress=nothing)
    assert names(tmp_path) == ["data.bin.part", "data.bin.part.json"]
    server.asked.clear()
    fetch(server.url("data.bin"), target, sha256=SHA256, progress=nothing)
    assert server.asked == ["bytes=5000-"] and target.read_bytes() == CONTENT


def test_all_bytes_there_but_no_name_yet(server: Server, tmp_path: Path) -> None:
    """As if the process had died between the last byte and the checksum."""
    (tmp_path / "data.bin.part").write_bytes(CONTENT)
    (tmp_path / "data.bin.part.json").write_text(f'{{"url": "{server.url("data.bin")}", "mark": "\\"v1\\""}}')
    fetch(server.url("data.bin"), tmp_path / "data.bin", sha256=SHA256, progress=nothing)
    assert server.asked == [f"bytes={len(CONTENT)}-"] and (tmp_path / "data.bin").read_bytes() == CONTENT
    (tmp_path / "data.bin.part").write_bytes(CONTENT + b"more")
    (tmp_path / "data.bin.part.json").write_text(f'{{"url": "{server.url("data.bin")}", "mark": "\\"v1\\""}}')
    fetch(server.url("data.bin"), tmp_path / "data.bin", sha256=SHA256, progress=nothing)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT, "more than there is: fetched anew"


def test_a_server_without_ranges_begins_again(server: Server, tmp_path: Path) -> None:
    server.ranges, server.limits = False, [1000]
    fetch(server.url("data.bin"), tmp_path / "data.bin", sha256=SHA256, progress=nothing)
    assert server.asked == [None, "bytes=1000-"] and (tmp_path / "data.bin").read_bytes() == CONTENT


def test_a_server_that_tells_no_length(server: Server, tmp_path: Path) -> None:
    server.length = False
    seen: list[tuple[int, int]] = []
    fetch(server.url("data.bin"), tmp_path / "data.bin", sha256=None, progress=lambda *call: seen.append(call))
    assert seen[-1] == (len(CONTENT), 0)


def test_a_file_that_changed_meanwhile_is_not_mixed_with_the_old_one(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "data.bin"
    server.limits = [1000] * download.ATTEMPTS
    with pytest.raises(DownloadError):
        fetch(server.url("data.bin"), target, sha256=None, progress=nothing)
    server.files["/data.bin"], server.etag = CONTENT[::-1], '"v2"'
    fetch(server.url("data.bin"), target, sha256=None, progress=nothing)
    assert target.read_bytes() == CONTENT[::-1]


def test_a_wrong_checksum_deletes_what_was_fetched(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "data.bin"
    with pytest.raises(DownloadError, match=rf"the SHA-256 is {SHA256}, expected {'0' * 64}; it was deleted"):
        fetch(server.url("data.bin"), target, sha256="0" * 64, progress=nothing)
    with pytest.raises(DownloadError, match=r"the MD5 is [0-9a-f]{32}, published 1{32}"):
        fetch(server.url("data.bin"), target, sha256=None, md5="1" * 32, progress=nothing)
    assert names(tmp_path) == []


def test_without_a_published_checksum_the_first_download_counts(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "data.bin"
    fetch(server.url("data.bin"), target, sha256=None, progress=nothing)
    fetch(server.url("data.bin"), target, sha256=None, progress=nothing)
    server.files["/data.bin"] = CONTENT[::-1]
    with pytest.raises(DownloadError, match=r"that of the first download, in .*data\.bin\.sha256, is"):
        fetch(server.url("data.bin"), target, sha256=None, progress=nothing)
    assert target.read_bytes() == CONTENT, "what was there stays"
    fetch(server.url("data.bin"), target, sha256=hashlib.sha256(CONTENT[::-1]).hexdigest(), progress=nothing)
    assert target.read_bytes() == CONTENT[::-1], "an explicit checksum wins"


def test_errors_of_the_server(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"the server answers 404"):
        fetch(server.url("nothing"), tmp_path / "x", sha256=None, progress=nothing)
    server.errors = [503, 500]
    fetch(server.url("data.bin"), tmp_path / "data.bin", sha256=SHA256, progress=nothing)
    with pytest.raises(DownloadError, match=r"example\.invalid/data\.bin: not an https address"):
        fetch(server.url("away"), tmp_path / "x", sha256=None, progress=nothing)
    for url in ("http://example.org/x", "file:///etc/passwd", "ftp://example.org/x"):
        with pytest.raises(DownloadError, match="not an https address"):
            fetch(url, tmp_path / "x", sha256=None, progress=nothing)


def test_a_disk_without_room(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(DownloadError, match=r"230,400 bytes are to come, 10 are free"):
        fetch(server.url("data.bin"), tmp_path / "data.bin", sha256=None, progress=nothing)


def test_published_md5(server: Server) -> None:
    md5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
    for text in (f"MD5 (ml-1m.zip) = {md5}\n", f"{md5.upper()}  ml-1m.zip\n"):
        server.files["/data.bin.md5"] = text.encode()
        assert fetch_md5(server.url("data.bin.md5")) == md5
    assert fetch_md5(server.url("none.md5")) is None
    server.files["/data.bin.md5"] = b"<html>" + SHA256.encode()
    with pytest.raises(DownloadError, match="no MD5 in it"):
        fetch_md5(server.url("data.bin.md5"))


# The command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(
            "toy/interactions.csv", "user,item\n" + "".join(f"{u},{3 * u + i}\n" for u in range(9) for i in range(30))
        )
        file.writestr("toy/items.csv", "item,title\n" + "".join(f"{i},Title {i}\n" for i in range(60)))
    server.files["/toy.zip"] = buffer.getvalue()
    md5 = hashlib.md5(buffer.getvalue(), usedforsecurity=False).hexdigest()
    server.files["/toy.zip.md5"] = f"MD5 (toy.zip) = {md5}\n".encode()
    monkeypatch.setitem(
        PUBLIC, "toy", PublicSet(urls=(server.url("toy.zip"),), terms="Only for toys.", md5_beside=True)
    )
    return server


def test_the_command_shows_the_terms_first(
    published: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n"))
    with pytest.raises(SystemExit):
        program.main(["download", "toy"])
    shown = capsys.readouterr()
    assert "Only for toys." in shown.out and "give --accept-license" in shown.err and not published.asked
    program.main(["download", "toy", "--accept-license"])
    folder = tmp_path / "coars_fast" / "data" / "toy"
    assert "MD5 as published" in capsys.readouterr().out and names(folder) == ["interactions.csv", "items.csv"]
    program.main(["inspect", str(folder), "--plot", str(tmp_path / "plot.png")])
    shown = capsys.readouterr().out
    assert "6 items of items.csv that nobody took" in shown and "100.0%" in shown
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "\nnote" not in shown
    program.main(["inspect", str(folder), "--plot", str(tmp_path / "plot.png"), "--candidates", "random25+gt"])
    assert "data.candidates: random25+gt needs 26 items" in capsys.readouterr().out


def test_the_command_without_a_name_or_with_a_wrong_one(capsys: pytest.CaptureFixture[str]) -> None:
    program.main(["download"])
    assert "ml-1m" in capsys.readouterr().out
    program.main(["--help"])
    assert "inspect PATH" in capsys.readouterr().out
    for arguments, message in (
        (["download", "nothing"], "no such data set; known are ml-latest-small"),
        (["fetch"], "no such command; there are inspect, download, sasrec"),
        (["download", "amazon2023-games", "--sha256", "1"], "has 2 files, found 1 sums"),
        (["inspect", "nowhere"], "no such folder"),
    ):
        with pytest.raises(SystemExit):
            program.main(arguments)
        assert message in capsys.readouterr().err


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


Call = Callable[..., str]
"""Runs `download` with these arguments; returns what it printed on stdout, or on stderr where it failed."""


@pytest.fixture
def call(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Sets without published sums: `one`, a zip file, and `two`, two gzip files."""
    server.files["/one.zip"] = zipped({"one/ratings.csv": b"x", "one/sub/movies.csv": b"y"})
    server.files |= {"/a.gz": gzip.compress(CONTENT), "/b.gz": gzip.compress(CONTENT[::-1])}
    for name, files in (("one", ("one.zip",)), ("two", ("a.gz", "b.gz"))):
        monkeypatch.setitem(PUBLIC, name, PublicSet(urls=tuple(map(server.url, files)), terms="Toys."))

    def run(*arguments: str) -> str:
        server.asked.clear()
        try:
            program.main(["download", "--accept-license", "--to", str(tmp_path / "to"), *arguments])
        except SystemExit as stop:
            assert stop.code == 2
            return capsys.readouterr().err
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(("name", "file"), [("one", "one.zip"), ("two", "a.gz")])
@pytest.mark.parametrize("cut", [False, True])
def test_a_broken_file_is_not_the_one_that_later_ones_must_match(
    server: Server, tmp_path: Path, call: Call, name: str, file: str, cut: bool
) -> None:
    right = server.files[f"/{file}"]
    server.files[f"/{file}"] = right[:-30] if cut else b"<html>Log in first</html>"
    message = call(name)
    assert f"{file}.part: not a {'zip' if name == 'one' else 'gzip'} file" in message
    assert f"what {server.url(file)} sent was deleted, the next call begins anew" in message
    assert not [path for path in (tmp_path / "to").rglob("*") if path.is_file()]
    server.files[f"/{file}"] = right
    assert "ready" in call(name)
    if name == "two":
        (tmp_path / "to/two/a.gz").unlink()
    else:
        shutil.rmtree(tmp_path / "to/one")
    server.files[f"/{file}"] = zipped({"x": b"new"}) if name == "one" else gzip.compress(b"new")
    assert re.search(rf"first download, in (.*{file}\.sha256), is .*; delete that file too", message := call(name))
    Path(re.findall(r"in (\S+\.sha256), is", message)[0]).unlink()
    assert "ready" in call(name), "what it said to delete is enough"


def test_what_is_complete_is_not_fetched_again(server: Server, tmp_path: Path, call: Call) -> None:
    second = server.files.pop("/b.gz")
    assert "404" in call("two")
    server.files["/b.gz"] = second
    assert "a.gz: complete from an earlier call" in (shown := call("two")) and len(server.asked) == 1
    assert "b.gz: SHA-256" in shown
    assert call("two").count("complete from an earlier call") == 2 and not server.asked
    assert "ready" in call("one") and len(server.asked) == 1
    assert "one.zip: complete from an earlier call" in call("one") and not server.asked
    (tmp_path / "to/one/ratings.csv").unlink()
    assert "one.zip: SHA-256" in call("one") and len(server.asked) == 1, "a file was missing"
    server.files["/one.zip"] = zipped({"one/new.csv": b"z"})
    sha256 = hashlib.sha256(server.files["/one.zip"]).hexdigest()
    assert "as you asked" in call("one", "--sha256", sha256), "another version is demanded"
    assert names(tmp_path / "to/one") == ["new.csv"] and names(tmp_path / "to") == ["one", "one.zip.sha256", "two"]


@pytest.mark.parametrize("step", ["coars_fast.data.download.write_sums", "pathlib.Path.rename", "os.replace"])
@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize("again", [False, True])
def test_a_death_while_names_are_given_costs_nothing(
    server: Server, tmp_path: Path, call: Call, name: str, step: str, again: bool
) -> None:
    if again:  # over an older version
        call(name)
        server.files["/one.zip"] = zipped({"one/new.csv": b"z"})
        server.files["/a.gz"] = gzip.compress(b"new")
    files = ("one.zip",) if name == "one" else ("a.gz", "b.gz")
    demanded = ("--sha256", ",".join(hashlib.sha256(server.files[f"/{file}"]).hexdigest() for file in files))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        if (name, step) != ("two", "pathlib.Path.rename"):  # which it never calls
            with pytest.raises(SystemExit, match="130"):
                program.main(["download", name, "--accept-license", "--to", str(tmp_path / "to"), *demanded])
    assert "ready" in call(name, *demanded)
    assert "complete from an earlier call" in call(name) and not server.asked


def test_files_of_others_stay(server: Server, tmp_path: Path, call: Call) -> None:
    for name, place in (("one", "one/my_notes.txt"), ("two", "two/b.gz")):
        notes = tmp_path / "to" / place
        notes.parent.mkdir(parents=True)
        notes.write_text("mine")
        assert "move " in (message := call(name)) and str(notes.parent) in message and notes.name in message
        assert notes.read_text() == "mine" and not server.asked
        notes.unlink()
    assert "ready" in call("one") and "ready" in call("two")
    notes = tmp_path / "to/one/my_notes.txt"
    notes.write_text("mine")
    assert "one.zip: complete" in call("one") and notes.read_text() == "mine", "they are in nobody's way"
    notes.unlink()
    (tmp_path / "to/one/ratings.csv").write_text("changed")
    assert "have changed since: ratings.csv; move them away" in call("one")
    (tmp_path / "to/two/b.gz").write_bytes(b"changed")
    assert "two/b.gz: not fetched by this command, or changed since" in call("two")
    sums = [hashlib.sha256((tmp_path / "to/two" / name).read_bytes()).hexdigest() for name in ("a.gz", "b.gz")]
    assert "not fetched" in call("two", "--sha256", ", ".join(sums).upper()) and not server.asked
    assert "b.gz: complete" in call("two"), "its sum was kept"


def test_notes_put_down_during_the_transfer_stay_too(server: Server, tmp_path: Path, call: Call) -> None:
    archive, folder = tmp_path / "to/one.zip", tmp_path / "to/one"

    def write_notes(done: int, total: int) -> None:
        folder.mkdir()
        (folder / "my_notes.txt").write_text("mine")

    with pytest.raises(KeptError, match=r"to/one: holds files .*: my_notes\.txt; move them away"):
        fetch_folder(server.url("one.zip"), archive, folder, sha256=None, progress=write_notes)
    (folder / "my_notes.txt").rename(tmp_path / "moved")
    assert "one.zip: SHA-256" in call("one")
    assert server.asked == [f"bytes={len(server.files['/one.zip'])}-"], "all of it had been kept"


def test_a_file_where_a_folder_should_be(tmp_path: Path, call: Call) -> None:
    (tmp_path / "to").mkdir()
    for name in ("one", "two"):
        place = tmp_path / "to" / name
        place.write_text("mine")
        assert re.search(rf"to/{name}: .*give another --to", call(name))
        assert re.search(rf"to/{name}.*: no folder can be made .*give another --to", call(name, "--to", str(place)))
        assert place.read_text() == "mine"


@pytest.mark.parametrize("sums", ["abc,def", f"{SHA256},", f"{SHA256}, {SHA256[:-1]}", f"{SHA256},{SHA256[:-1]}g"])
def test_a_sum_that_is_none_is_refused_before_the_transfer(server: Server, call: Call, sums: str) -> None:
    assert "--sha256: expected 64 hexadecimal digits, found '" in call("two", "--sha256", sums)
    assert "--sha256: two has 2 files, found 1 sums" in call("two", "--sha256", "")
    assert not server.asked


def test_every_public_set_names_its_terms_and_is_fetched_safely() -> None:
    for found in PUBLIC.values():
        assert "https://" in found.terms and all(url.startswith("https://") for url in found.urls)
