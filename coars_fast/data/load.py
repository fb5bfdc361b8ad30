"""The data set that a configuration names."""

from __future__ import annotations

from dataclasses import replace

from coars_fast.config import Config
from coars_fast.data.records import Dataset
from coars_fast.errors import DataError


def load_dataset(config: Config) -> Dataset:
    """The synthetic world or the MovieLens folder, as `data.format` says; without users of too few interactions.

    Raises:
        MissingDataError, DataError: see :func:`coars_fast.data.movielens.load_movielens`; also if no user is left.
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
    kept = [u for u, sequence in enumerate(dataset.sequences) if len(sequence) >= config.data.min_interactions]
    if not kept:
        longest = max((len(sequence) for sequence in dataset.sequences), default=0)
        raise DataError(
            f"{dataset.name}: no user has data.min_interactions = {config.data.min_interactions} interactions "
            f"(the most are {longest}); lower it"
        )
    return replace(
        dataset,
        sequences=tuple(dataset.sequences[u] for u in kept),
        user_ids=tuple(dataset.user_ids[u] for u in kept),
    )
