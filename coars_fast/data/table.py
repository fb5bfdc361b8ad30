"""From rows of files to a data set: every loader of a public layout ends here, so all of them order, drop and count
alike.

A user's items stand in order of (time, item id): ids that are whole numbers by their value and before all others, the
rest as text. Of two interactions of the same user with the same item the first counts. Interactions with items that
the items' file lacks are dropped with a warning, or an error where they are too many; so are items that nobody took.
"""

from __future__ import annotations

import csv
import gzip
import json
import logging
import math
import re
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from coars_fast.data.records import Dataset, Reading
from coars_fast.data.titles import fold_title, unique_titles
from coars_fast.errors import DataError, MissingDataError

_LOG = logging.getLogger(__name__)
MAX_UNKNOWN_SHARE = 0.1
ARCHIVES = (".zip", ".gz", ".tgz", ".tar", ".bz2", ".xz", ".zst", ".7z", ".rar")


@dataclass(frozen=True, kw_only=True)
class Table:
    """N interactions as files hold them."""

    users: np.ndarray
    """[N] index into `user_ids`."""
    items: np.ndarray
    """[N] index into `item_ids`."""
    times: np.ndarray | None
    """[N], in any unit; None: the order of the rows is the order of the interactions."""
    user_ids: Sequence[str]
    item_ids: Sequence[str]


class Rows:
    """Collects interactions one by one into a :class:`Table`."""

    def __init__(self) -> None:
        self._users, self._items, self._times = array("q"), array("q"), array("d")
        self._user_numbers: dict[str, int] = {}
        self._item_numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._users)

    def add(self, user: str, item: str, time: float = math.nan) -> None:
        self._users.append(self._user_numbers.setdefault(user, len(self._user_numbers)))
        self._items.append(self._item_numbers.setdefault(item, len(self._item_numbers)))
        self._times.append(time)

    def table(self) -> Table:
        """What was added; without times if the first row had none."""
        times = np.frombuffer(self._times, dtype=np.float64) if self._times else np.zeros(0)
        return Table(
            users=np.array(self._users, dtype=np.int64),
            items=np.array(self._items, dtype=np.int64),
            times=None if len(times) and math.isnan(times[0]) else times.copy(),
            user_ids=tuple(self._user_numbers),
            item_ids=tuple(self._item_numbers),
        )


@dataclass(kw_only=True)
class Titles:
    """item id -> title, as a file lists them."""

    file: str
    of: dict[str, str] = field(default_factory=dict)
    repeated: int = 0
    """Rows about an item that an earlier row had described."""
    latin1: list[int] = field(default_factory=list)
    """Lines that are not UTF-8 and were read as Latin-1; see :func:`text_lines`."""

    def add(self, item: str, title: str) -> None:
        """The first title that is not empty counts."""
        if item in self.of:
            self.repeated += 1
            if self.of[item].strip():
                return
        self.of[item] = title


def assemble(
    table: Table,
    titles: Titles,
    *,
    name: str,
    layout: str,
    files: Sequence[Path],
    max_unknown_share: float = MAX_UNKNOWN_SHARE,
    left_out: Sequence[tuple[str, int]] = (),
) -> Dataset:
    """Order, drop and count; items stand in order of their ids, and users too.

    Args:
        layout: `data.format` of these files.
        files: what was read, the interactions' file first.
        max_unknown_share: more interactions than this with items that `titles` lacks are an error.
        left_out: what the loader itself left out already, with how many.

    Raises:
        DataError: no interaction, too many with unknown items, or nothing left.
    """
    rows = len(table.users)
    if not rows:
        raise DataError(f"{files[0]}: no interaction in it")
    user_ids, users = _by_id(table.user_ids, table.users)
    item_ids, items = _by_id(table.item_ids, table.items)
    times = np.arange(rows) if table.times is None else table.times
    known = np.array([item in titles.of for item in item_ids], dtype=bool)[items]
    dropped = [(what, count) for what, count in left_out if count]
    if unknown := int((~known).sum()):
        example = item_ids[items[int(np.argmin(known))]]
        text = (
            f"{files[0]}: {unknown} of {rows} interactions are with items that {titles.file} lacks (such as {example})"
        )
        if unknown > max_unknown_share * rows:
            raise DataError(f"{text}; are the two files of the same data set?")
        _LOG.warning("%s; they are dropped", text)
        dropped.append((f"interactions with items that {titles.file} lacks", unknown))
        num_users = len(np.unique(users))
        users, items, times = users[known], items[known], times[known]
        if lost := num_users - len(np.unique(users)):
            dropped.append(("users of nothing but those", lost))
    users, items, times, repeats = _ordered(users, items, times)
    dropped += [("repeated interactions of a user with an item", repeats)] if repeats else []
    dropped += [(f"repeated items in {titles.file}", titles.repeated)] if titles.repeated else []
    same = (users[1:] == users[:-1]) & (times[1:] == times[:-1])
    tied = np.append(same, False) | np.insert(same, 0, False)
    kept_items, items = np.unique(items, return_inverse=True)
    kept_users, starts = np.unique(users, return_index=True)
    own_ids = tuple(item_ids[i] for i in kept_items.tolist())
    raw = [titles.of[item] for item in own_ids]
    shown = unique_titles(raw, own_ids)
    untitled = sum(not fold_title(title) for title in raw)
    if unrated := len(titles.of) - len(own_ids):
        dropped.append((f"items of {titles.file} that nobody took", unrated))
    lasts = np.append(starts[1:], len(users)) - 1
    return Dataset(
        name=name,
        titles=shown,
        sequences=tuple(tuple(part.tolist()) for part in np.split(items, starts[1:])),
        user_ids=tuple(user_ids[u] for u in kept_users.tolist()),
        item_ids=own_ids,
        reading=Reading(
            format=layout,
            files=tuple(map(str, files)),
            rows=rows,
            ordered_by="file" if table.times is None else "timestamp",
            left_out=tuple(dropped),
            tied=int(tied.sum()),
            tied_last_users=int((same[lasts[lasts > starts] - 1]).sum()),
            untitled=untitled,
            altered_titles=sum(a != b for a, b in zip(raw, shown, strict=True)) - untitled,
            latin1_lines=len(titles.latin1),
        ),
    )


def _by_id(ids: Sequence[str], numbers: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Ids in their order, and `numbers` (indices into `ids`) as indices into that."""
    order = sorted(range(len(ids)), key=lambda n: id_order(ids[n]))
    place = np.empty(len(ids), dtype=np.int64)
    place[order] = np.arange(len(ids))
    return [ids[n] for n in order], place[numbers]


def id_order(name: str) -> tuple[bool, int, str]:
    """Sorts whole numbers by their value and before all other ids."""
    number = name.removeprefix("-")
    whole = number.isascii() and number.isdigit() and len(number) < 20
    return (not whole, int(name) if whole else 0, name)


def _ordered(users: np.ndarray, items: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """All three sorted by (user, time, item), each pair's first interaction only; and how many were left out."""
    order = np.lexsort((items, times, users))
    users, items, times = users[order], items[order], times[order]
    by_pair = np.lexsort((items, users))  # stable: within a pair the earliest stays first
    later = np.zeros(len(users), dtype=bool)
    first, second = by_pair[:-1], by_pair[1:]
    later[second] = (users[first] == users[second]) & (items[first] == items[second])
    return users[~later], items[~later], times[~later], int(later.sum())


# Reading files ------------------------------------------------------------------------------------------------------


def data_path(path: str | Path, *, file_endings: tuple[str, ...] = ()) -> Path:
    """The path of a data set, which is there: a folder, or a file whose name ends in one of `file_endings`.

    Raises:
        MissingDataError: nothing is there, or another file.
    """
    path = Path(path)
    if not path.exists():
        raise MissingDataError(
            f"{path}: no such folder; `python -m coars_fast.data download` lists public data sets (MovieLens and "
            f"others), or give another --data.path"
        )
    if path.is_dir() or (file_endings and path.name.endswith(file_endings)):
        return path
    if path.name.endswith(ARCHIVES):
        raise MissingDataError(f"{path}: this is an archive; unpack it and give the folder with its files")
    raise MissingDataError(f"{path}: this is a file; give the folder that holds the data set")


def found_in(folder: Path) -> str:
    """Names of what a folder holds, for an error message."""
    names = sorted(path.name for path in folder.iterdir())
    found = ", ".join(names[:12])
    return found + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "nothing"


def text_lines(path: Path, *, latin1: list[int] | None = None, empty: bool = False) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its line break) of every line that is not empty, or of all, of a plain or a `.gz`
    file.

    Args:
        latin1: lines that are not UTF-8 are read as Latin-1, and their numbers added here; None: they are errors.

    Raises:
        DataError: not UTF-8, packed without saying so, or a `.gz` file that is broken or cut short; names the line.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, data in enumerate(file, 1):
                if number == 1:
                    if data.startswith((b"\x1f\x8b", b"PK\x03\x04")):
                        raise DataError(f"{path}: looks like a gzip or zip archive; unpack it")
                    data = data.removeprefix(b"\xef\xbb\xbf")
                data = data.rstrip(b"\r\n")
                if data or empty:
                    yield number, _decode(data, path, number, latin1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: broken or cut short after line {number} ({error}); download or copy it again"
        ) from error


def _decode(data: bytes, path: Path, number: int, latin1: list[int] | None) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if latin1 is not None:
            latin1.append(number)
            return data.decode("latin-1")
        found = data[error.start : error.start + 8]
        raise DataError(f"{path}, line {number}: not UTF-8 ({found!r}); save the file as UTF-8") from error


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line where it starts, fields) of every row of a UTF-8 file with commas; a quoted field may span lines, and a
    carriage return alone ends a line too.

    Raises:
        DataError: not UTF-8, or a stray quote.
    """
    texts = (text + "\n" for _, text in text_lines(path, empty=True))
    reader = csv.reader((part for text in texts for part in re.split(r"(?<=\r)", text)), strict=True)
    line = 1
    try:
        while True:
            line = reader.line_num + 1
            row = next(reader, None)
            if row is None:
                return
            if row:
                yield line, row
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: not readable as CSV ({error}); look for a stray quote") from error


def json_object(text: str, path: Path, line: int) -> dict[str, Any]:
    """The JSON object that a line holds.

    Raises:
        DataError: it is none, or nested too deep to read.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {line}: not JSON ({error}); found {text[:60]!r}") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}, line {line}: expected a JSON object, found {text[:60]!r}")
    return record


def find_column(header: Sequence[str], names: Sequence[str], path: Path) -> int:
    """Index of the first of `names` in a header, letter case and `_` aside; a DataError without one."""
    column = optional_column(header, names)
    if column is None:
        raise DataError(f"{path}, line 1: expected a column {' or '.join(names)}, found {','.join(header)[:80]!r}")
    return column


def optional_column(header: Sequence[str], names: Sequence[str]) -> int | None:
    """Like :func:`find_column`; None without one."""
    folded = [column.strip().casefold().replace("_", "") for column in header]
    wanted = (name.casefold().replace("_", "") for name in names)
    return next((folded.index(name) for name in wanted if name in folded), None)


def parse_time(text: str, path: Path, line: int) -> float:
    """A number in any unit, or a date such as 2024-05-01 or 2024-05-01T12:30:00 (UTC unless it says otherwise)."""
    try:
        value = float(text)
    except ValueError:
        try:
            when = datetime.fromisoformat(text.strip())
        except ValueError:
            raise DataError(
                f"{path}, line {line}: timestamp should be a number or a date like 2024-05-01, found {text[:60]!r}"
            ) from None
        value = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(value):
        raise DataError(f"{path}, line {line}: timestamp should be a finite number, found {text[:60]!r}")
    return value


def parse_id(text: str, what: str, path: Path, line: int) -> str:
    """An id without the spaces around it; an empty one is a DataError."""
    if name := text.strip():
        return name
    raise DataError(f"{path}, line {line}: {what} is empty")
