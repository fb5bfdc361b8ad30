"""MovieLens as an implicit-feedback data set: who took what, and when.

Reads both public layouts: `movies.csv` + `ratings.csv` (ml-latest*, ml-20m, ml-25m, ml-32m; UTF-8) and `movies.dat` +
`ratings.dat` with `::` (ml-1m: Latin-1, ml-10m: UTF-8). As in the sequential-recommendation literature every rating
counts as an interaction, whatever its value; genres, tags and links are left out, and so are movies that nobody rated.

A user's items stand in order of (timestamp, movieId), because many timestamps are tied; of two ratings of the same
movie by the same user the first counts. Movie titles stay as they are ("Matrix, The (1999)") but on one line and
unique. Ratings of movies that the movie file lacks are dropped with a warning, or an error if more than 1 in 10.
"""

from __future__ import annotations

import csv
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from coars_fast.data.records import Dataset
from coars_fast.data.titles import unique_titles
from coars_fast.errors import DataError, MissingDataError

_LOG = logging.getLogger(__name__)
_MAX_UNKNOWN_SHARE = 0.1
_DOWNLOAD = "get a data set from https://grouplens.org/datasets/movielens/ and unpack it there"
_RATING_FIELDS = ("userId", "movieId", "rating", "timestamp")
_INT64 = np.iinfo(np.int64)


@dataclass(frozen=True)
class _Layout:
    movies: str
    ratings: str
    separator: str
    has_header: bool


_LAYOUTS = (
    _Layout("movies.csv", "ratings.csv", ",", True),
    _Layout("movies.dat", "ratings.dat", "::", False),
)


def load_movielens(folder: str | Path) -> Dataset:
    """Read a MovieLens folder. Items are the rated movies in order of movieId, users stand in order of userId.

    Raises:
        MissingDataError: no such folder, or neither layout's two files are in it.
        DataError: a file is malformed (names the file, line, field and text found), holds no rating, or its ratings
            belong to other movies.
    """
    folder = Path(folder)
    layout = _find_layout(folder)
    titles = _read_movies(folder / layout.movies, layout)
    users, movies = _order(*_read_ratings(folder / layout.ratings, layout))
    known = np.isin(movies, np.fromiter(titles, dtype=np.int64, count=len(titles)))
    if num_unknown := int((~known).sum()):
        first = int(movies[np.argmin(known)])
        text = (
            f"{folder / layout.ratings}: {num_unknown} of {len(movies)} interactions are with movies that "
            f"{layout.movies} lacks (such as movieId {first})"
        )
        if num_unknown > _MAX_UNKNOWN_SHARE * len(movies):
            raise DataError(f"{text}; are the two files of the same data set?")
        _LOG.warning("%s; they are dropped", text)
        users, movies = users[known], movies[known]
    movie_ids, items = np.unique(movies, return_inverse=True)
    user_ids, starts = np.unique(users, return_index=True)
    item_ids = tuple(str(i) for i in movie_ids.tolist())
    return Dataset(
        name=folder.resolve().name,
        titles=unique_titles([titles[i] for i in movie_ids.tolist()], item_ids),
        sequences=tuple(tuple(part.tolist()) for part in np.split(items, starts[1:])),
        user_ids=tuple(str(u) for u in user_ids.tolist()),
        item_ids=item_ids,
    )


def _find_layout(folder: Path) -> _Layout:
    if not folder.exists():
        raise MissingDataError(f"{folder}: no such folder; {_DOWNLOAD}, or give another --data.path")
    if not folder.is_dir():
        raise MissingDataError(f"{folder}: this is a file; --data.path takes the folder that holds the data set")
    for layout in _LAYOUTS:
        if (folder / layout.movies).is_file() and (folder / layout.ratings).is_file():
            return layout
    names = sorted(path.name for path in folder.iterdir())
    found = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "nothing"
    raise MissingDataError(
        f"{folder}: expected movies.csv and ratings.csv, or movies.dat and ratings.dat; found {found}. "
        f"Point --data.path at the folder that holds both files, or {_DOWNLOAD}"
    )


def _decode(path: Path, layout: _Layout) -> str:
    """The text of a file: UTF-8, with or without a byte-order mark; a `.dat` file that is not is Latin-1."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not layout.has_header:
            return data.decode("latin-1")
        line = data.count(b"\n", 0, error.start) + 1
        found = data[error.start : error.start + 8]
        raise DataError(f"{path}, line {line}: not UTF-8 ({found!r}); save the file as UTF-8") from error


def _read_movies(path: Path, layout: _Layout) -> dict[int, str]:
    """movieId -> raw title."""
    titles: dict[int, str] = {}
    rows = _csv_rows(path, layout) if layout.has_header else _dat_rows(path, layout)
    for line, row in rows:
        if len(row) < 2:
            raise DataError(f"{path}, line {line}: expected a movieId and a title, found {_show(row, layout)}")
        movie = _parse_int(row[0], path, line, "movieId")
        if movie in titles:
            raise DataError(f"{path}, line {line}: movieId {movie} stands there twice; keep one of the lines")
        titles[movie] = row[1]
    if not titles:
        raise DataError(f"{path}: no movie in it; {_DOWNLOAD}")
    return titles


def _csv_rows(path: Path, layout: _Layout) -> Iterator[tuple[int, list[str]]]:
    """(line, [movieId, title]) of every row, whatever the order of the columns."""
    reader = csv.reader(io.StringIO(_decode(path, layout), newline=""), strict=True)
    line = 1
    try:
        header = next(reader, [])
        columns = _find_columns(path, header, ("movieId", "title"))
        while True:
            line = reader.line_num + 1  # where the next row starts; a quoted title may span lines
            row = next(reader, None)
            if row is None:
                return
            if row:
                yield line, [row[c] for c in columns if c < len(row)]
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: not readable as CSV ({error}); look for a stray quote") from error


def _dat_rows(path: Path, layout: _Layout) -> Iterator[tuple[int, list[str]]]:
    for line, text in enumerate(_decode(path, layout).split("\n"), 1):
        text = text.rstrip("\r")
        if text:
            # A title may hold "::" itself: the id stands before the first, the genres after the last.
            movie, _, rest = text.partition(layout.separator)
            yield line, [movie, rest.rpartition(layout.separator)[0] if layout.separator in rest else rest]


def _read_ratings(path: Path, layout: _Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(userId, movieId, timestamp), each [N] int64, in the order of the file; all four fields are checked."""
    columns = tuple(range(4))
    if layout.has_header:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            columns = _find_columns(path, file.readline().rstrip("\r\n").split(","), _RATING_FIELDS)
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
                encoding="utf-8",
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
    for line, text in enumerate(_decode(path, layout).split("\n"), 1):
        text = text.rstrip("\r")
        if not text or (line == 1 and layout.has_header):
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


def _order(users: np.ndarray, movies: np.ndarray, timestamps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Users and movies sorted by (user, timestamp, movieId), each pair's first interaction only."""
    order = np.lexsort((movies, timestamps, users))
    users, movies = users[order], movies[order]
    by_pair = np.lexsort((movies, users))  # stable: within a pair the earliest stays first
    later = np.zeros(len(users), dtype=bool)
    first, second = by_pair[:-1], by_pair[1:]
    later[second] = (users[first] == users[second]) & (movies[first] == movies[second])
    return users[~later], movies[~later]


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
