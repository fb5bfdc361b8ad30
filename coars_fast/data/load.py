"""The data set that a configuration names."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from coars_fast.config import Config
from coars_fast.data.records import Dataset
from coars_fast.errors import DataError


def load_dataset(config: Config) -> Dataset:
    """The synthetic world or the MovieLens folder, as `data.format` says; without users and items of too few
    interactions.

    Raises:
        MissingDataError, DataError: see :func:`coars_fast.data.movielens.load_movielens`; also if nothing is left.
    """
    data_format = config.data.format
    if data_format == "auto":
        data_format = "world" if config.data.path is None else "movielens"
    if data_format == "world":
        from coars_fast.data.world import make_world

        dataset = make_world(config.world)
    else:
        from coars_fast.data.movielens import load_movielens

        assert config.data.path is not None, "config.check refuses it"
        dataset = load_movielens(config.data.path)
    return core(dataset, users=config.data.min_interactions, items=config.data.min_item_interactions)


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
    return replace(
        dataset,
        titles=tuple(dataset.titles[i] for i in left),
        item_ids=tuple(dataset.item_ids[i] for i in left),
        sequences=tuple(tuple(number[i] for i in sequence) for sequence in sequences.values()),
        user_ids=tuple(dataset.user_ids[u] for u in sequences),
    )
