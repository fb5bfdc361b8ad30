"""What a data set holds, in figures that a person checks before training on it. No torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from coars_fast.config import Config, DataConfig
from coars_fast.data.load import describe_left_out
from coars_fast.data.playable import check_tasks
from coars_fast.data.records import Dataset
from coars_fast.data.splits import make_split
from coars_fast.errors import DataError


def inspection(dataset: Dataset, data: DataConfig) -> list[tuple[str, str]]:
    """(what, figure) of a data set from which users and items of too few interactions were left out already.

    Raises:
        ConfigError, DataError: its split fails (see :func:`coars_fast.data.splits.make_split`).
    """
    interactions = sum(map(len, dataset.sequences))
    taken = np.bincount(np.concatenate([np.array(s) for s in dataset.sequences]), minlength=dataset.num_items)
    lengths = np.array([len(sequence) for sequence in dataset.sequences])
    popular = np.sort(taken)[::-1][: max(1, dataset.num_items // 100)].sum()
    rows = [
        ("users", f"{dataset.num_users:,}"),
        ("items", f"{dataset.num_items:,}"),
        ("interactions", f"{interactions:,}"),
        ("density", f"{interactions / (dataset.num_users * dataset.num_items):.3%}"),
        ("interactions of a user", _spread(lengths)),
        ("interactions with an item", _spread(taken)),
        ("the 1% most popular items have", f"{popular / interactions:.1%} of all interactions"),
    ]
    reading = dataset.reading
    if reading is not None:
        titled = sum(not title.startswith("Untitled [") for title in dataset.titles)
        files = ", ".join(file.rpartition("/")[2] for file in reading.files)
        rows = [("layout", f"{reading.format}: {files}"), ("interactions read", f"{reading.rows:,}"), *rows]
        rows += [
            ("left out", describe_left_out(dataset)),
            ("items with a title", f"{titled:,} of {dataset.num_items:,} ({titled / dataset.num_items:.1%})"),
            ("titles folded, cut or told apart", f"{reading.altered_titles:,} in the files"),
            ("ordered by", "timestamp, then item id" if reading.ordered_by == "timestamp" else "rows of the file"),
            ("tied interactions", f"{reading.tied:,} in the files"),
            ("users whose last two are tied", f"{reading.tied_last_users:,} in the files"),
        ]
        if reading.latin1_lines:
            rows.append(("lines read as Latin-1, not UTF-8", f"{reading.latin1_lines:,} in the items' file"))
    return rows + _split(dataset, data)


def _split(dataset: Dataset, data: DataConfig) -> list[tuple[str, str]]:
    split = make_split(dataset, data)
    parts = sum(map(len, split.train_sequences))
    own = " (set apart by the data set)" if dataset.test_users else ""
    rows = [
        ("training parts", f"{parts:,} interactions of {dataset.num_users:,} users"),
        ("targets of training episodes", f"{data.train_targets * len(split.train_users):,}"),
        ("users of training episodes", f"{len(split.train_users):,}"),
        ("users evaluated", f"{len(split.eval_users):,}{own}"),
    ]
    try:
        # How many are evaluated stands above.
        notes = check_tasks(dataset, split, Config(data=replace(data, num_eval_users=len(split.eval_users))))
    except DataError as error:
        notes = [str(error)]
    return rows + [("note", note) for note in notes]


def _spread(counts: np.ndarray) -> str:
    low, middle, high = np.quantile(counts, [0.0, 0.5, 1.0])
    return f"{low:,.0f} to {high:,.0f}, median {middle:,.0f}, mean {counts.mean():,.1f}"
