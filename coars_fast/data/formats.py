"""The layouts that `data.format` names, and which of them a path holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from coars_fast.data.amazon import is_amazon, load_amazon
from coars_fast.data.lastfm import is_lastfm, load_lastfm
from coars_fast.data.llara import is_llara, load_llara
from coars_fast.data.movielens import is_movielens, load_movielens
from coars_fast.data.plain import is_plain, load_plain
from coars_fast.data.recbole import is_recbole, load_recbole
from coars_fast.data.records import Dataset
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
    if not path.exists():
        raise MissingDataError(
            f"{path}: no such folder; `python -m coars_fast.data download` lists public data sets (MovieLens and "
            f"others), or give another --data.path"
        )
    names = [name for name, layout in FORMATS.items() if layout.is_there(path)]
    if len(names) == 1:
        return names[0]
    if names:
        raise DataError(f"{path}: could be {' or '.join(names)}; say which with --data.format")
    inside = sorted(path.iterdir()) if path.is_dir() else []
    nearby = [folder for folder in inside if folder.is_dir() and any(f.is_there(folder) for f in FORMATS.values())]
    if nearby:
        raise MissingDataError(f"{path}: the data set is one folder further down; use --data.path {nearby[0]}")
    found = ", ".join(p.name for p in inside[:12]) + (f" and {len(inside) - 12} more" if len(inside) > 12 else "")
    known = "; ".join(layout.files for layout in FORMATS.values())
    raise MissingDataError(f"{path}: no data set that is known here; found {found or 'nothing'}. Known are: {known}")


def load(path: Path, name: str = "auto") -> Dataset:
    """Read a data set of this layout; `auto`: of the layout that is there. See :func:`detect` and each loader for what
    is raised."""
    return FORMATS[detect(path) if name == "auto" else name].load(path)
