"""The layouts that `data.format` names, and which of them a path holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from coars_fast.data.amazon import is_amazon, load_amazon, without_metadata
from coars_fast.data.lastfm import is_lastfm, load_lastfm
from coars_fast.data.llara import is_llara, load_llara
from coars_fast.data.movielens import is_movielens, load_movielens
from coars_fast.data.plain import is_plain, load_plain
from coars_fast.data.recbole import is_recbole, load_recbole
from coars_fast.data.records import Dataset
from coars_fast.data.table import ARCHIVES, data_path, found_in
from coars_fast.errors import DataError, MissingDataError


@dataclass(frozen=True)
class Format:
    """A layout of files."""

    files: str
    """What to look for, for people."""
    is_there: Callable[[Path], bool]
    load: Callable[[Path], Dataset]


FORMATS = {
    "movielens": Format(
        "MovieLens (movies.csv and ratings.csv, movies.dat and ratings.dat, or u.item and u.data)",
        is_movielens,
        load_movielens,
    ),
    "lastfm": Format(
        "HetRec LastFM (artists.dat and user_taggedartists-timestamps.dat)",
        is_lastfm,
        load_lastfm,
    ),
    "llara": Format("LLaRA (id2name.txt and *_data.jsonl)", is_llara, load_llara),
    "amazon": Format("Amazon reviews (NAME.json.gz or NAME.jsonl.gz, and meta_NAME beside it)", is_amazon, load_amazon),
    "recbole": Format("RecBole (NAME.inter and NAME.item)", is_recbole, load_recbole),
    "plain": Format("your own (interactions.csv and items.csv)", is_plain, load_plain),
}


def detect(path: Path) -> str:
    """Name of the layout that a folder or file holds.

    Raises:
        MissingDataError: there is nothing, or nothing that is known; says what was found and what would be.
        DataError: files of several layouts.
    """
    names = [name for name, layout in FORMATS.items() if layout.is_there(path)]
    if len(names) == 1:
        return names[0]
    if names:
        raise DataError(f"{path}: could be {' or '.join(names)}; say which with --data.format")
    hint = without_metadata(path)
    if path.is_file() and hint:
        raise MissingDataError(f"{path}: {hint}")
    inside = sorted(data_path(path).iterdir())
    nearby = [folder for folder in inside if folder.is_dir() and any(f.is_there(folder) for f in FORMATS.values())]
    if nearby:
        raise MissingDataError(f"{path}: the data set is one folder further down; use --data.path {nearby[0]}")
    packed = [file.name for file in inside if file.name.endswith(ARCHIVES)]
    if packed and not hint:
        hint = f"unpack {', '.join(packed[:3])} there"
    found = f"found {found_in(path)}" + (f"; {hint}" if hint else "")
    known = "; ".join(layout.files for layout in FORMATS.values())
    raise MissingDataError(f"{path}: no data set that is known here; {found}. Known are: {known}")


def load(path: Path, name: str = "auto") -> Dataset:
    """Read a data set of this layout; `auto`: of the layout that is there. See :func:`detect` and each loader for what
    is raised."""
    return FORMATS[detect(path) if name == "auto" else name].load(path)
