"""Whether all tasks of a run can be made of a data set: asked before anything is trained. No torch."""

from __future__ import annotations

from coars_fast.config import Config, DataConfig, parse_candidates
from coars_fast.data.records import Dataset
from coars_fast.data.splits import Split
from coars_fast.errors import ConfigError, DataError

DISC_ITEMS = 20
"""Items of a discrimination task."""
DISC_RATIOS = (1, 3, 9)
"""Negatives per positive in an evaluation's discrimination tasks."""
WARM_START_POSITION = 3
"""Where the first target of the warm start stands: a conversation about a shorter history teaches little."""


def check_tasks(dataset: Dataset, split: Split, config: Config) -> list[str]:
    """What a person should know before a run with these settings begins: warnings, a line each.

    Raises:
        DataError: a user leaves too few items for `data.candidates`.
        ConfigError: the warm start finds no training part that is long enough.
    """
    check_candidates(dataset, config.data)
    if config.warm_start and not any(len(split.train_sequences[u]) > WARM_START_POSITION for u in split.train_users):
        raise ConfigError(
            f"data.min_interactions: the warm start needs training parts of more than {WARM_START_POSITION} items, "
            f"{dataset.name} has none at data.train_targets = {split.train_targets}; lower that, or do without "
            "--warm-start"
        )
    found, wanted = len(split.eval_users), config.data.num_eval_users
    warnings = [f"data.num_eval_users: {found} of {wanted} users asked for are evaluated"] if found < wanted else []
    if config.eval.num_disc_users:
        for ratio in DISC_RATIOS:
            if not any(can_discriminate(dataset, split, user, ratio, config.data) for user in split.eval_users):
                warnings.append(
                    f"F1-disc at 1:{ratio} is left out: no evaluation user took {num_positive(ratio)} items beside the "
                    f"{config.data.history_length} shown and left {DISC_ITEMS - num_positive(ratio)} others; a shorter "
                    "data.history_length or a larger data.min_interactions may find some"
                )
    return warnings


def check_candidates(dataset: Dataset, data: DataConfig) -> None:
    """Raise :class:`DataError` if a user took so many items that the candidates of `data.candidates` are not there:
    the truth, or SASRec's best ones, and others that the user did not take before."""
    size = parse_candidates(data.candidates).size
    left = [dataset.num_items - len(sequence) + 1 for sequence in dataset.sequences]
    few = sum(count < size for count in left)
    if few:
        least = min(left)
        user = left.index(least)
        raise DataError(
            f"{dataset.name}: data.candidates: {data.candidates} needs {size} items that a user did not take before; "
            f"{few:,} of {dataset.num_users:,} users took too many (user {dataset.user_ids[user]} took "
            f"{len(dataset.sequences[user])} of {dataset.num_items}); "
            + (f"name at most {least} candidates" if least > 1 else "give a larger catalogue")
        )


def num_positive(ratio: int) -> int:
    """Items of a discrimination task that the user took, at `ratio` negatives per positive.

    Raises:
        ValueError: they do not split `DISC_ITEMS`.
    """
    if ratio < 1 or DISC_ITEMS % (1 + ratio):
        raise ValueError(f"ratio: {ratio} must be 1, 3, 4, 9 or 19 to split {DISC_ITEMS} items")
    return DISC_ITEMS // (1 + ratio)


def can_discriminate(dataset: Dataset, split: Split, user: int, ratio: int, data: DataConfig) -> bool:
    """Whether the user took enough items before the shown history, and left enough."""
    positive = num_positive(ratio)
    older = max(0, split.test_position(user) - data.history_length)
    return older >= positive - 1 and dataset.num_items - len(split.sequences[user]) >= DISC_ITEMS - positive
