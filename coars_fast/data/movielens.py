"""MovieLens as an implicit-feedback data set: who took what, and when.

Reads all public layouts: `movies.csv` + `ratings.csv` (ml-latest*, ml-20m, ml-25m, ml-32m; UTF-8), `movies.dat` +
`ratings.dat` with `::` (ml-1m: Latin-1, ml-10m: UTF-8) and `u.item` + `u.data` (ml-100k: Latin-1); a line of the latter
two that is not UTF-8 is read as Latin-1, and counted. As in the
sequential-recommendation literature every rating counts as an interaction, whatever its value; genres, tags and links
are left out. Movie titles stay as they are ("Matrix, The (1999)") but on one line and unique. Order, repetitions and
unknown movies: see :mod:`coars_fast.data.table`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from coars_fast.data.records import Dataset
from coars_fast.data.table import Table, Titles, assemble, csv_rows, data_path, found_in, text_lines
from coars_fast.errors import DataError, MissingDataError

_DOWNLOAD = "get a data set from https://grouplens.org/datasets/movielens/ and unpack it there"
_RATING_FIELDS = ("userId", "movieId", "rating", "timestamp")
_INT64 = np.iinfo(np.int64)


@dataclass(frozen=True)
class _Layout:
    movies: str
    ratings: str
    separator: str
    """Between the fields of a rating."""
    movie_separator: str
    has_header: bool


_LAYOUTS = (
    _Layout("movies.csv", "ratings.csv", ",", ",", True),
    _Layout("movies.dat", "ratings.dat", "::", "::", False),
    _Layout("u.item", "u.data", "\t", "|", False),
)


def is_movielens(folder: Path) -> bool:
    """Whether both files of a layout are there."""
    return any((folder / layout.movies).is_file() and (folder / layout.ratings).is_file() for layout in _LAYOUTS)


def load_movielens(folder: str | Path) -> Dataset:
    """Read a MovieLens folder. Items are the rated movies in order of movieId, users stand in order of userId.

    Raises:
        MissingDataError: no such folder, or neither layout's two files are in it.
        DataError: a file is malformed (names the file, line, field and text found), holds no rating, or its ratings
            belong to other movies.
    """
    folder = data_path(folder)
    layout = _find_layout(folder)
    titles = _read_movies(folder / layout.movies, layout)
    users, movies, times = _read_ratings(folder / layout.ratings, layout)
    movie_ids, items = np.unique(movies, return_inverse=True)
    user_ids, numbers = np.unique(users, return_inverse=True)
    table = Table(
        users=numbers,
        items=items,
        times=times,
        user_ids=tuple(map(str, user_ids.tolist())),
        item_ids=tuple(map(str, movie_ids.tolist())),
    )
    return assemble(
        table,
        titles,
        name=folder.resolve().name,
        layout="movielens",
        files=(folder / layout.ratings, folder / layout.movies),
    )


def _find_layout(folder: Path) -> _Layout:
    for layout in _LAYOUTS:
        if (folder / layout.movies).is_file() and (folder / layout.ratings).is_file():
            return layout
    raise MissingDataError(
        f"{folder}: expected movies.csv and ratings.csv, or movies.dat and ratings.dat, or u.item and u.data; found "
        f"{found_in(folder)}. "
        f"Point --data.path at the folder that holds both files, or {_DOWNLOAD}"
    )


def _read_movies(path: Path, layout: _Layout) -> Titles:
    """movieId -> raw title."""
    titles = Titles(file=path.name)
    rows = _csv_rows(path) if layout.has_header else _dat_rows(path, layout, titles.latin1)
    for line, row in rows:
        if len(row) < 2:
            raise DataError(f"{path}, line {line}: expected a movieId and a title, found {_show(row, layout)}")
        movie = str(_parse_int(row[0], path, line, "movieId"))
        if movie in titles.of:
            raise DataError(f"{path}, line {line}: movieId {movie} stands there twice; keep one of the lines")
        titles.of[movie] = row[1]
    if not titles.of:
        raise DataError(f"{path}: no movie in it; {_DOWNLOAD}")
    return titles


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, [movieId, title]) of every row, whatever the order of the columns."""
    rows = csv_rows(path)
    columns = _find_columns(path, next(rows, (1, []))[1], ("movieId", "title"))
    return ((line, [row[c] for c in columns if c < len(row)]) for line, row in rows)


def _dat_rows(path: Path, layout: _Layout, latin1: list[int]) -> Iterator[tuple[int, list[str]]]:
    for line, text in text_lines(path, latin1=latin1):
        movie, separator, rest = text.partition(layout.movie_separator)
        if layout.movie_separator == "|":  # date, link and genre flags follow
            yield line, [movie, rest.partition("|")[0]] if separator else [movie]
        else:  # A title may hold "::" itself: the id stands before the first, the genres after the last.
            yield line, [movie, rest.rpartition("::")[0] if "::" in rest else rest]


def _read_ratings(path: Path, layout: _Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(userId, movieId, timestamp), each [N] int64, in the order of the file; all four fields are checked."""
    columns = tuple(range(4))
    if layout.has_header:
        columns = _find_columns(path, next(csv_rows(path), (1, []))[1], _RATING_FIELDS)
    stride = len(layout.separator)  # split at each ":", "1::2" has an empty field between: every second one counts
    dtype = np.dtype([(name, np.float64 if name == "rating" else np.int64) for name in _RATING_FIELDS])
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "loadtxt: input contained no data", UserWarning)
            warnings.simplefilter("error", DeprecationWarning)  # older numpy only warns of "2.5" for a whole number
            rows = np.loadtxt(
                path,
                dtype=dtype,
                delimiter=layout.separator[0],
                usecols=[column * stride for column in columns],
                skiprows=int(layout.has_header),
                comments=None,
                encoding="utf-8-sig",
                ndmin=1,
            )
    except (ValueError, DeprecationWarning) as error:  # UnicodeDecodeError is a ValueError
        _explain_ratings(path, layout, columns, error)
    if not len(rows):
        raise DataError(f"{path}: no rating in it; {_DOWNLOAD}")
    if not np.isfinite(rows["rating"]).all():
        _explain_ratings(path, layout, columns, None)
    return rows["userId"], rows["movieId"], rows["timestamp"]


def _explain_ratings(path: Path, layout: _Layout, columns: tuple[int, ...], cause: Exception | None) -> NoReturn:
    """Read a file that numpy refused line by line, and raise the error that a person can act on."""
    for line, text in text_lines(path, latin1=None if layout.has_header else []):
        if line == 1 and layout.has_header:
            continue
        row = text.split(layout.separator)
        if len(row) <= max(columns):
            raise DataError(
                f"{path}, line {line}: expected {len(columns)} fields ({', '.join(_RATING_FIELDS)}) separated by "
                f"{layout.separator!r}, found {_show(row, layout)}"
            ) from cause
        for name, column in zip(_RATING_FIELDS, columns, strict=True):
            if name != "rating":
                _parse_int(row[column], path, line, name)
                continue
            try:
                finite = np.isfinite(float(row[column]))
            except ValueError:
                finite = False
            if not finite:
                raise DataError(
                    f"{path}, line {line}: rating should be a number, found {row[column][:60]!r}"
                ) from cause
    raise DataError(f"{path}: not readable as ratings ({cause})") from cause


def _find_columns(path: Path, header: list[str], wanted: tuple[str, ...]) -> tuple[int, ...]:
    names = [name.strip() for name in header]
    if missing := [name for name in wanted if name not in names]:
        raise DataError(
            f"{path}, line 1: expected a header with {', '.join(wanted)}; "
            f"{', '.join(missing)} is not in {','.join(header)[:60]!r}"
        )
    return tuple(names.index(name) for name in wanted)


def _parse_int(text: str, path: Path, line: int, name: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise DataError(f"{path}, line {line}: {name} should be a whole number, found {text[:60]!r}") from None
    if not _INT64.min <= value <= _INT64.max:
        raise DataError(f"{path}, line {line}: {name} is out of range, found {text[:60]!r}")
    return value


def _show(row: list[str], layout: _Layout) -> str:
    return repr(layout.separator.join(row)[:60])
