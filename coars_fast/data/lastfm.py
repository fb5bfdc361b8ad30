"""HetRec 2011 LastFM (hetrec2011-lastfm-2k): which artists a user tagged, and when.

`artists.dat` names the artists. `user_artists.dat` says who listened to whom and how often, but not when, so it gives
no order: an order made from play counts would hold out the least or the most played artist, not the next one. So the
interactions are those of `user_taggedartists-timestamps.dat`: an artist counts from the first time that the user
tagged it, and artists that a user played but never tagged are counted and left out. Tags of one session share a day,
often the very timestamp: `inspect` says how many are tied.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from coars_fast.data.records import Dataset
from coars_fast.data.table import (
    Rows,
    Titles,
    assemble,
    data_path,
    find_column,
    found_in,
    parse_id,
    parse_time,
    text_lines,
)
from coars_fast.errors import DataError, MissingDataError

ARTISTS, TAGGED, PLAYED = "artists.dat", "user_taggedartists-timestamps.dat", "user_artists.dat"


def is_lastfm(folder: Path) -> bool:
    """Whether the artists are there, with either file of what users did."""
    return (folder / ARTISTS).is_file() and any((folder / name).is_file() for name in (TAGGED, PLAYED))


def load_lastfm(folder: str | Path) -> Dataset:
    """Read a hetrec2011-lastfm-2k folder.

    Raises:
        MissingDataError: no such folder, or a file is missing; says so if only play counts, without an order, are
            there.
        DataError: a file is malformed; names the file, line and field.
    """
    folder = data_path(folder)
    if not (folder / ARTISTS).is_file():
        raise MissingDataError(f"{folder}: expected {ARTISTS} and {TAGGED}; found {found_in(folder)}")
    if not (folder / TAGGED).is_file():
        raise MissingDataError(
            f"{folder}: {TAGGED} is missing; {PLAYED} has play counts but no times, so it gives no order of "
            f"interactions: unpack the whole archive there"
        )
    artists, rows, pairs = Titles(file=ARTISTS), Rows(), set()
    for line, (artist, name) in _fields(folder / ARTISTS, ("id", "name"), artists.latin1):
        artists.add(parse_id(artist, "id", folder / ARTISTS, line), name)
    path = folder / TAGGED
    for line, (user, artist, time) in _fields(path, ("userID", "artistID", "timestamp")):
        user, artist = parse_id(user, "userID", path, line), parse_id(artist, "artistID", path, line)
        rows.add(user, artist, parse_time(time, path, line))
        pairs.add((user, artist))
    untagged = 0
    if (folder / PLAYED).is_file():
        played = {tuple(row) for _, row in _fields(folder / PLAYED, ("userID", "artistID"))}
        untagged = len(played - pairs)
    return assemble(
        rows.table(),
        artists,
        name=folder.resolve().name,
        layout="lastfm",
        files=(path, folder / ARTISTS),
        max_unknown_share=0.3,  # artists.dat lists those that were played; some others were tagged
        left_out=[(f"artists of users in {PLAYED} that they never tagged (no time)", untagged)],
    )


def _fields(path: Path, names: tuple[str, ...], latin1: list[int] | None = None) -> Iterator[tuple[int, list[str]]]:
    """(line, the named fields) of every row of a tab-separated file with a header; `latin1` as in `text_lines`."""
    columns: list[int] = []
    for line, text in text_lines(path, latin1=latin1):
        row = text.split("\t")
        if not columns:
            columns = [find_column(row, (name,), path) for name in names]
            continue
        if len(row) <= max(columns):
            raise DataError(
                f"{path}, line {line}: expected the fields {', '.join(names)} between tabs, found {text[:60]!r}"
            )
        yield line, [row[column] for column in columns]
