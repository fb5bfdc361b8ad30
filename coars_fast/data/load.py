"""The data set that a configuration names."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

from coars_fast.config import Config
from coars_fast.data.records import Dataset
from coars_fast.errors import DataError

_LOG = logging.getLogger(__name__)


def load_dataset(config: Config) -> Dataset:
    """The synthetic world or what `data.path` holds, as `data.format` says; without users and items of too few
    interactions. What was left out of files is logged (:func:`notes`).

    Raises:
        MissingDataError, DataError: see :func:`coars_fast.data.formats.load`; also if nothing is left.
    """
    if config.data.format == "world" or config.data.path is None:
        from coars_fast.data.world import make_world

        dataset = make_world(config.world)
    else:
        from coars_fast.data.formats import load

        dataset = load(Path(config.data.path), config.data.format)
    dataset = core(dataset, users=config.data.min_interactions, items=config.data.min_item_interactions)
    for note in notes(dataset):
        _LOG.info("%s: %s", dataset.name, note)
    return dataset


def notes(dataset: Dataset) -> list[str]:
    """What a run says once about how its files were read: what was left out, and what was read in another way."""
    reading, said = dataset.reading, []
    if reading is not None and reading.left_out:
        said.append(f"left out: {describe_left_out(dataset)}")
    if reading is not None and reading.latin1_lines:
        said.append(f"read as Latin-1: {reading.latin1_lines:,} lines of the items' file that are not UTF-8")
    return said


def describe_left_out(dataset: Dataset) -> str:
    """`3 users of fewer than 5 interactions, 2 repeated interactions`: all that is not there any more."""
    left_out = dataset.reading.left_out if dataset.reading else ()
    return ", ".join(f"{count:,} {what}" for what, count in left_out) or "nothing"


def core(dataset: Dataset, *, users: int, items: int) -> Dataset:
    """The largest part in which every user has `users` and every item has `items` interactions or more: leaving out
    one can bring another below its bound, so this goes on until both hold. Items that nobody took stay if `items` is 0.

    Raises:
        DataError: nothing is left.
    """
    sequences = dict(enumerate(dataset.sequences))
    while True:
        taken = Counter(item for sequence in sequences.values() for item in sequence)
        kept = {u: tuple(i for i in sequence if taken[i] >= items) for u, sequence in sequences.items()}
        kept = {u: sequence for u, sequence in kept.items() if len(sequence) >= users}
        if kept == sequences:
            break
        sequences = kept
    if not sequences:
        longest = max((len(sequence) for sequence in dataset.sequences), default=0)
        raise DataError(
            f"{dataset.name}: no user has data.min_interactions = {users} interactions with items of "
            f"data.min_item_interactions = {items} (the most interactions of a user are {longest}); lower one of them"
        )
    left = [i for i in range(dataset.num_items) if taken[i] >= items]
    number = {item: n for n, item in enumerate(left)}
    test_users = set(dataset.test_users)
    result = replace(
        dataset,
        titles=tuple(dataset.titles[i] for i in left),
        item_ids=tuple(dataset.item_ids[i] for i in left),
        sequences=tuple(tuple(number[i] for i in sequence) for sequence in sequences.values()),
        user_ids=tuple(dataset.user_ids[u] for u in sequences),
        test_users=tuple(n for n, u in enumerate(sequences) if u in test_users),
    )
    return _counted(dataset, result, users, items)


def _counted(before: Dataset, after: Dataset, users: int, items: int) -> Dataset:
    """`after`, its reading with what :func:`core` left out of `before`."""
    if before.reading is None:
        return after
    lost = sum(map(len, before.sequences)) - sum(map(len, after.sequences))
    counts = (
        (f"users of fewer than {users} interactions", before.num_users - after.num_users),
        (f"items of fewer than {items} interactions", before.num_items - after.num_items),
        ("interactions with those users and items", lost),
    )
    left_out = before.reading.left_out + tuple((what, count) for what, count in counts if count)
    return replace(after, reading=replace(before.reading, left_out=left_out))
