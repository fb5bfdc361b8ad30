"""The LLaRA layout (LastFM of LLaRA and AFL): `id2name.txt` and windows of ten items with the one that follows.

`id2name.txt` holds `id::name`. Each row of the train, val and test parts is one user's window: `seq`, padded to ten
with an item that has no name, its true length `len_seq`, and `next`. The published parts are pickled data frames
(`*.df`), which can run any code when they are opened: this project opens no pickle. Turn the ones that you trust into
JSON lines beside them, once:

    python -c "import pandas as pd, sys; [pd.read_pickle(f).to_json(f[:-2] + 'jsonl', orient='records', lines=True)
               for f in sys.argv[1:]]" *_data.df

A row becomes a user: its window, then `next` as the item held out. Rows of the test part are the users that are
evaluated (122 of 1,220 for LastFM, as in LLaRA's and AFL's tables); `next` of the others is theirs to learn from only
through training episodes. Rows whose `next` stands in their window already, or that have fewer than three items (as
LLaRA leaves them out), are dropped and counted.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from coars_fast.data.records import Dataset
from coars_fast.data.table import Rows, Titles, assemble, found_in, parse_id, text_lines
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
        MissingDataError: no names, or a part is missing or still a pickle.
        DataError: a file is malformed; names the file and line.
    """
    folder = Path(folder)
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
            (f"rows of fewer than {_MIN_LENGTH} items", short),
            ("rows whose next item stands in their window", seen),
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
    for line, text in text_lines(path, fallback="latin-1"):
        item, separator, name = text.partition("::")
        if not separator:
            raise DataError(f"{path}, line {line}: expected id::name, found {text[:60]!r}")
        names.add(parse_id(item, "id", path, line), name)
    return names


def _window(text: str, path: Path, line: int) -> tuple[list[str], str]:
    """(items without padding, next item) of a row."""
    try:
        row: Any = json.loads(text)
        window = [_item(item) for item in row["seq"]][: int(row["len_seq"])]
        return window, _item(row["next"])
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path}, line {line}: expected an object with seq, len_seq and next, found {text[:60]!r}"
        ) from error


def _item(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} is no item")
    return str(value)
