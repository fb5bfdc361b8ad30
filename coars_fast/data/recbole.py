"""RecBole's atomic files: `<name>.inter` (who took what, when) and `<name>.item` (titles).

Tab-separated with a header of `name:type` fields. Users, items and times are `user_id` (or `session_id`), `item_id` and
`timestamp` (without it the order of the rows counts); the title is the first field of the items that has "title" in its
name, else "name". Files of prepared sequences (`item_id_list:token_seq`) hold every history many times and are refused:
use the atomic files that they were made from.
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
    optional_column,
    parse_id,
    parse_time,
    text_lines,
)
from coars_fast.errors import DataError, MissingDataError

_USERS, _ITEMS, _TIMES = ("user_id", "session_id", "user", "uid"), ("item_id", "item", "iid"), ("timestamp", "time")


def is_recbole(path: Path) -> bool:
    """Whether this is a `.inter` file, or a folder that holds one."""
    return bool(_inter_files(path))


def load_recbole(path: str | Path) -> Dataset:
    """Read the atomic files of a folder, or those of a `.inter` file.

    Raises:
        MissingDataError: no such folder, no `.inter` file, or no `.item` file beside it.
        DataError: several `.inter` files in the folder, or a malformed one; names the file, line and field.
    """
    path = data_path(path, file_endings=(".inter",))
    found = _inter_files(path)
    if not found:
        raise MissingDataError(f"{path}: expected NAME.inter and NAME.item; found {found_in(path)}")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise DataError(f"{path}: several data sets ({names}); point --data.path at one of the files")
    inter, items = found[0], found[0].with_suffix(".item")
    if not items.is_file():
        raise MissingDataError(f"{items}: no such file; the agents name items by their titles, which stand there")
    return assemble(
        _read_inter(inter).table(), _read_items(items), name=inter.stem, layout="recbole", files=(inter, items)
    )


def _inter_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.inter"))
    return [path] if path.suffix == ".inter" and path.is_file() else []


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of every row, the names of the header first; all rows have as many fields as the header."""
    width = 0
    for line, text in text_lines(path):
        row = text.split("\t")
        if not width:
            width, row = len(row), [field.partition(":")[0] for field in row]
        elif len(row) != width:
            raise DataError(f"{path}, line {line}: expected {width} fields between tabs, found {text[:60]!r}")
        yield line, row
    if not width:
        raise DataError(f"{path}: empty")


def _read_inter(path: Path) -> Rows:
    found = _rows(path)
    _, header = next(found)
    if any(name.endswith("_list") for name in header):
        raise DataError(f"{path}: holds prepared sequences ({', '.join(header)[:80]!r}); give the atomic files instead")
    user, item = find_column(header, _USERS, path), find_column(header, _ITEMS, path)
    time = optional_column(header, _TIMES)
    rows = Rows()
    for line, row in found:
        names = parse_id(row[user], header[user], path, line), parse_id(row[item], header[item], path, line)
        rows.add(*names, *(() if time is None else (parse_time(row[time], path, line),)))
    return rows


def _read_items(path: Path) -> Titles:
    found = _rows(path)
    _, header = next(found)
    item = find_column(header, _ITEMS, path)
    title = next((n for word in ("title", "name") for n, name in enumerate(header) if word in name.casefold()), None)
    if title is None:
        raise DataError(
            f"{path}, line 1: no field with title or name in its own name; found {', '.join(header)[:80]!r}"
        )
    titles = Titles(file=path.name)
    for line, row in found:
        titles.add(parse_id(row[item], header[item], path, line), row[title])
    return titles
