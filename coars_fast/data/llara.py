"""The LLaRA layout (LastFM of LLaRA and AFL): `id2name.txt` and windows of ten items with the one that follows.

`id2name.txt` holds `id::name`. Each row of the train, val and test parts is one user's window: `seq`, padded to ten
with an item that has no name, its true length `len_seq`, and `next`. The published parts are pickled data frames
(`*.df`), which can run any code when they are opened: this project opens no pickle. Turn the ones that you trust into
JSON lines beside them, once:

    python -c "import pandas as pd, sys; [pd.read_pickle(f).to_json(f[:-2] + 'jsonl', orient='records', lines=True)
               for f in sys.argv[1:]]" *_data.df

A row becomes a user: its window, then `next` as the item held out. Rows of the test part are the users that are
evaluated (122 of 1,220 for LastFM, as in LLaRA's and AFL's tables); `next` of the others is theirs to learn from only
through training episodes. Windows that hold their `next` already, or fewer than three items (as LLaRA leaves them out),
are dropped and counted. `len_seq` counts items of `seq`, so one below zero or beyond its end is an error.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from coars_fast.data.records import Dataset
from coars_fast.data.table import Rows, Titles, assemble, data_path, found_in, json_object, parse_id, text_lines
from coars_fast.errors import DataError, MissingDataError

NAMES = "id2name.txt"
PARTS = ("train", "val", "test")
_MIN_LENGTH = 3


def is_llara(folder: Path) -> bool:
    """Whether the names are there; parts that are still pickles too, so that the error can say what to do."""
    return (folder / NAMES).is_file()


def load_llara(folder: str | Path) -> Dataset:
    """Read the folder of a LLaRA data set whose parts were turned into JSON lines.

    Raises:
        MissingDataError: no such folder, no names, or a part is missing or still a pickle.
        DataError: a file is malformed; names the file and line.
    """
    folder = data_path(folder)
    if not is_llara(folder):
        raise MissingDataError(f"{folder}: expected {NAMES} and *_data.jsonl; found {found_in(folder)}")
    names = _read_names(folder / NAMES)
    rows, test_rows, short, seen = Rows(), set(), 0, 0
    parts = [_part(folder, part) for part in PARTS]
    number = 0
    for part, path in zip(PARTS, parts, strict=True):
        for line, text in text_lines(path):
            window, target = _window(text, path, line)
            number += 1
            if len(window) < _MIN_LENGTH:
                short += 1
            elif target in window:
                seen += 1
            else:
                for item in (*window, target):
                    rows.add(str(number), item)
                if part == "test":
                    test_rows.add(str(number))
    dataset = assemble(
        rows.table(),
        names,
        name=folder.resolve().name,
        layout="llara",
        files=(*parts, folder / NAMES),
        left_out=[
            (f"windows of fewer than {_MIN_LENGTH} items", short),
            ("windows that hold their next item", seen),
        ],
    )
    return replace(dataset, test_users=tuple(u for u, name in enumerate(dataset.user_ids) if name in test_rows))


def _part(folder: Path, part: str) -> Path:
    for stem in (f"{part}_data", f"{part.capitalize()}_data"):
        if (folder / f"{stem}.jsonl").is_file():
            return folder / f"{stem}.jsonl"
    pickles = sorted(path.name for path in folder.glob("*_data.df"))
    if pickles:
        raise MissingDataError(
            f"{folder}: {', '.join(pickles)} are pickles, which can run any code and are not opened here; if you trust "
            f"where they are from, turn each into JSON lines: pandas.read_pickle(FILE).to_json(FILE with .jsonl for "
            f".df, orient='records', lines=True)"
        )
    raise MissingDataError(f"{folder}: {part}_data.jsonl is missing; found {found_in(folder)}")


def _read_names(path: Path) -> Titles:
    names = Titles(file=path.name)
    for line, text in text_lines(path, latin1=names.latin1):
        item, separator, name = text.partition("::")
        if not separator:
            raise DataError(f"{path}, line {line}: expected id::name, found {text[:60]!r}")
        names.add(parse_id(item, "id", path, line), name)
    return names


def _window(text: str, path: Path, line: int) -> tuple[list[str], str]:
    """(items without padding, next item) of a row."""
    row = json_object(text, path, line)
    seq, length, target = (row.get(key) for key in ("seq", "len_seq", "next"))
    if not (isinstance(seq, list) and all(map(_is_item, [*seq, target])) and type(length) is int):
        raise DataError(
            f"{path}, line {line}: expected seq (a list of items), len_seq (a whole number) and next (an item), found "
            f"{text[:60]!r}"
        )
    if not 0 <= length <= len(seq):
        raise DataError(
            f"{path}, line {line}: len_seq should be from 0 to {len(seq)}, the length of seq, found {length}"
        )
    return [str(item) for item in seq[:length]], str(target)


def _is_item(value: Any) -> bool:
    return type(value) in (int, str)
