"""Amazon reviews of 2018 and 2023, one category: who reviewed what, when, and the products' titles.

Reads what is published, packed (`.gz`) or not: reviews as JSON lines (2018: `Musical_Instruments.json.gz` or its 5-core
`Musical_Instruments_5.json.gz`; 2023: `Musical_Instruments.jsonl.gz`) or ratings as CSV (2018: item, user, rating,
timestamp without a header; 2023: with one), and `meta_<category>` beside it for the titles. Every review counts,
whatever its rating. In 2023 an item is a `parent_asin`: colours and sizes of a product are one. Products that the
metadata lack have no title that an agent could name and are dropped; what scraping left in a title (2018: HTML, pieces
of JavaScript) is unescaped, or counts as no title.
"""

from __future__ import annotations

import html
from pathlib import Path

from coars_fast.data.records import Dataset
from coars_fast.data.table import (
    Rows,
    Titles,
    assemble,
    csv_rows,
    data_path,
    found_in,
    json_object,
    parse_id,
    parse_time,
    text_lines,
)
from coars_fast.errors import DataError, MissingDataError

_ENDINGS = (".json.gz", ".jsonl.gz", ".csv.gz", ".json", ".jsonl", ".csv")
_META = "meta_"
_SCRIPT = ("getTime", "function(", "<script", "var aPageStart")
# In some categories the metadata of 2018 lack many of the products.
_MAX_UNKNOWN_SHARE = 0.5
_KEYS = (
    ("reviewerID", "asin", "unixReviewTime"),  # 2018
    ("user_id", "parent_asin", "timestamp"),  # 2023
)


def is_amazon(path: Path) -> bool:
    """Whether a folder holds reviews with their metadata, or this is a file of reviews that has metadata beside it."""
    return bool(_pairs(path))


def load_amazon(path: str | Path) -> Dataset:
    """Read one category: the folder that holds it alone, or its file of reviews.

    Raises:
        MissingDataError: no such path, no reviews, or no metadata beside them.
        DataError: several categories in the folder, or a file is malformed; names the file and line.
    """
    path = data_path(path, file_endings=_ENDINGS)
    pairs = _pairs(path)
    if not pairs:
        folder = path if path.is_dir() else path.parent
        reviews = next(iter(_reviews(path)), Path("Musical_Instruments.jsonl.gz"))
        raise MissingDataError(
            f"{path}: expected reviews such as {reviews.name} and, beside them, {_metadata_of(reviews)}; "
            f"found {found_in(folder)}"
        )
    if len(pairs) > 1:
        names = ", ".join(reviews.name for reviews, _ in pairs)
        raise DataError(f"{path}: several categories ({names}); point --data.path at one file of reviews")
    reviews, meta = pairs[0]
    rows = _read_ratings(reviews) if ".csv" in reviews.suffixes[-2:] else _read_reviews(reviews)
    table = rows.table()
    return assemble(
        table,
        _read_meta(meta, set(table.item_ids)),
        name=_category(reviews),
        layout="amazon",
        files=(reviews, meta),
        max_unknown_share=_MAX_UNKNOWN_SHARE,
    )


def _reviews(path: Path) -> list[Path]:
    """Files that are named as reviews or ratings are."""
    found = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    return [p for p in found if p.is_file() and p.name.endswith(_ENDINGS) and not p.name.startswith(_META)]


def _pairs(path: Path) -> list[tuple[Path, Path]]:
    """(reviews, metadata) of every category; of a category with a 5-core and all reviews, both."""
    pairs = []
    for reviews in _reviews(path):
        names = (f"{_META}{_category(reviews)}{ending}" for ending in _ENDINGS if "csv" not in ending)
        meta = next((reviews.with_name(name) for name in names if reviews.with_name(name).is_file()), None)
        if meta is not None:
            pairs.append((reviews, meta))
    return pairs


def without_metadata(path: Path) -> str:
    """What to say where nothing but reviews was found, or nothing; ratings (any CSV file) say too little."""
    for reviews in _reviews(path):
        if ".csv" not in reviews.suffixes[-2:]:
            return f"if {reviews.name} holds Amazon's reviews, {_metadata_of(reviews)} is missing beside it"
    return ""


def _metadata_of(reviews: Path) -> str:
    """A name that the metadata may have; packed or not is all the same."""
    ending = ".json.gz" if ".json" in reviews.suffixes[-2:] else ".jsonl.gz"
    return f"{_META}{_category(reviews)}{ending}"


def _category(path: Path) -> str:
    """`Musical_Instruments` of `Musical_Instruments_5.json.gz`."""
    name = next(path.name.removesuffix(ending) for ending in _ENDINGS if path.name.endswith(ending))
    return name.removesuffix("_5")


def _read_reviews(path: Path) -> Rows:
    rows, keys = Rows(), None
    for line, text in text_lines(path):
        record = json_object(text, path, line)
        if keys is None:
            keys = next((known for known in _KEYS if known[0] in record), None)
        if keys is None or any(record.get(key) is None for key in keys):
            expected = " or ".join(", ".join(known) for known in ([keys] if keys else _KEYS))
            raise DataError(f"{path}, line {line}: expected a review with {expected}, found {text[:60]!r}")
        user, item, time = (str(record[key]) for key in keys)
        rows.add(parse_id(user, keys[0], path, line), parse_id(item, keys[1], path, line), parse_time(time, path, line))
    return rows


def _read_ratings(path: Path) -> Rows:
    """Ratings without text: with a header (2023), or as item, user, rating, timestamp (2018)."""
    rows, columns = Rows(), None
    for line, row in csv_rows(path):
        text = ",".join(row)
        if columns is None:
            if "user_id" in row:
                missing = [name for name in _KEYS[1] if name not in row]
                if missing:
                    raise DataError(f"{path}, line {line}: no column {', '.join(missing)} in {text[:80]!r}")
                columns = [row.index(name) for name in _KEYS[1]]
                continue
            columns = [1, 0, 3]
        if len(row) <= max(columns):
            raise DataError(f"{path}, line {line}: expected {max(columns) + 1} fields, found {text[:60]!r}")
        user, item, time = (row[column] for column in columns)
        rows.add(parse_id(user, "user", path, line), parse_id(item, "item", path, line), parse_time(time, path, line))
    return rows


def _read_meta(path: Path, wanted: set[str]) -> Titles:
    """Titles of the products that were reviewed; the others are most of the file."""
    titles = Titles(file=path.name)
    for line, text in text_lines(path):
        record = json_object(text, path, line)
        item = str(record.get("parent_asin") or record.get("asin") or "")
        if not item:
            raise DataError(f"{path}, line {line}: expected a product with asin or parent_asin, found {text[:60]!r}")
        if item in wanted:
            title = record.get("title")
            title = html.unescape(title) if isinstance(title, str) else ""
            titles.add(item, "" if any(mark in title for mark in _SCRIPT) else title)
    return titles
