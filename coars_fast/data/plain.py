"""One's own data: `interactions.csv` and `items.csv`, UTF-8, with a header each.

`interactions.csv` has a column `user`, a column `item` and, if there is one, a column `timestamp`: numbers in any unit
or dates (2024-05-01, 2024-05-01T12:30:00+02:00). Without it the order of the rows counts. `items.csv` has a column
`item` and a column `title`. Ids are any text; `user_id`, `userId` and the like are read as well, other columns are left
out. A bare `id` is the item in `items.csv` alone: among interactions it is mostly the number of the row.
An item that `items.csv` describes twice, and differently, is an error: nobody else could say which title is meant.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from coars_fast.data.records import Dataset
from coars_fast.data.table import (
    Rows,
    Titles,
    assemble,
    csv_rows,
    data_path,
    find_column,
    found_in,
    optional_column,
    parse_id,
    parse_time,
)
from coars_fast.errors import DataError, MissingDataError

INTERACTIONS, ITEMS = "interactions.csv", "items.csv"
_USER, _ITEM = ("user", "user_id", "uid"), ("item", "item_id", "iid")
_TIME, _TITLE = ("timestamp", "time", "date", "datetime"), ("title", "name", "item_title", "item_name")


def is_plain(folder: Path) -> bool:
    """Whether both files are there."""
    return (folder / INTERACTIONS).is_file() and (folder / ITEMS).is_file()


def load_plain(folder: str | Path) -> Dataset:
    """Read a folder with both files.

    Raises:
        MissingDataError: no such folder, or a file is missing.
        DataError: a file is malformed; names the file, line and field.
    """
    folder = data_path(folder)
    if not is_plain(folder):
        raise MissingDataError(f"{folder}: expected {INTERACTIONS} and {ITEMS}; found {found_in(folder)}")
    interactions, items = folder / INTERACTIONS, folder / ITEMS
    rows, titles, lines = Rows(), Titles(file=ITEMS), {}
    for line, (user, item, time) in _named(interactions, (_USER, _ITEM), _TIME):
        names = parse_id(user, "user", interactions, line), parse_id(item, "item", interactions, line)
        rows.add(*names, *(() if time is None else (parse_time(time, interactions, line),)))
    for line, (item, title, _) in _named(items, ((*_ITEM, "id"), _TITLE), ()):
        item = parse_id(item, "item", items, line)
        if titles.of.get(item, title) != title:
            raise DataError(
                f"{items}, line {line}: item {item[:60]} stands in line {lines[item]} with another title; keep one"
            )
        lines.setdefault(item, line)
        titles.add(item, title)
    if not titles.of:
        raise DataError(f"{items}: no item in it")
    return assemble(rows.table(), titles, name=folder.resolve().name, layout="plain", files=(interactions, items))


def _named(
    path: Path, needed: tuple[tuple[str, ...], tuple[str, ...]], wanted: tuple[str, ...]
) -> Iterator[tuple[int, tuple[str, str, str | None]]]:
    """(line, (the two needed fields, the wanted one or None)) of every row."""
    columns: list[int] | None = None
    third: int | None = None
    for line, row in csv_rows(path):
        if columns is None:
            columns = [find_column(row, names, path) for names in needed]
            third = optional_column(row, wanted)
            continue
        if len(row) <= max(*columns, -1 if third is None else third):
            raise DataError(f"{path}, line {line}: fewer fields than the header has, found {','.join(row)[:60]!r}")
        yield line, (row[columns[0]], row[columns[1]], None if third is None else row[third])
    if columns is None:
        raise DataError(f"{path}: empty")
