"""Leave-one-out: who is evaluated, what may be learned from, and which target comes at which training step.

    sequence   [ ....... training part ....... ] [ targets of training episodes ] [ test target ]
                 SASRec, peers, warm start          `data.train_targets` items       the last item

Nothing here has state: users and steps are drawn from keys, so a resumed run needs no saved random state. It leaves out
a validation split: settings are chosen on another world or another `eval_seed`. Where a data set brings its own test
users (LLaRA), those are evaluated instead of users drawn from all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np

from coars_fast.config import DataConfig
from coars_fast.data.records import Dataset
from coars_fast.errors import ConfigError, DataError


class Purpose(IntEnum):
    """What random numbers are for; keeps streams of the same seed apart."""

    EVAL_USERS = 1
    EVAL_TASK = 2
    TRAIN_ORDER = 3
    TRAIN_TASK = 4
    WARM_START = 5
    DISCRIMINATION = 6
    EARLIER_TASK = 7


def keyed_rng(purpose: Purpose, *key: int) -> np.random.Generator:
    """The generator of this purpose and key (numbers from 0): the same everywhere, at any time.

    Raises:
        ConfigError: a negative number (a seed, since nothing else could be).
    """
    if min(key) < 0:
        raise ConfigError(f"seed: {min(key)} must not be negative")
    return np.random.default_rng([int(purpose), *key])


@dataclass(frozen=True, kw_only=True)
class Split:
    """A data set cut into training parts, training-episode targets and test targets."""

    sequences: tuple[tuple[int, ...], ...]
    """Whole sequences, by user."""
    train_sequences: tuple[tuple[int, ...], ...]
    """Training parts, by user: all that SASRec and the peers may see. At least one item each."""
    train_targets: int
    eval_users: tuple[int, ...]
    """In the order drawn, so that the first n are a random sample too."""
    train_users: tuple[int, ...]
    """Users of training episodes, ascending; none of `eval_users` if those are held out."""

    def test_position(self, user: int) -> int:
        """Where the test target stands in the user's sequence."""
        return len(self.sequences[user]) - 1

    def train_positions(self, user: int) -> range:
        """Where the targets of training episodes stand in the user's sequence."""
        end = self.test_position(user)
        return range(end - self.train_targets, end)


def make_split(dataset: Dataset, config: DataConfig) -> Split:
    """Cut every sequence, and draw the evaluation's users by `eval_seed`.

    With `hold_out_users` at most half of all users are evaluated, and never more than there are.

    Raises:
        ConfigError: a sequence is too short for its training part to keep an item.
        DataError: fewer than 2 users to hold some out of.
    """
    shortest = config.train_targets + 2
    for user, sequence in enumerate(dataset.sequences):
        if len(sequence) < shortest:
            raise ConfigError(
                f"data.train_targets: {config.train_targets} training targets and a test target leave user "
                f"{dataset.user_ids[user]} of {dataset.name} ({len(sequence)} interactions) no training part; "
                f"raise data.min_interactions to {shortest}, or lower data.train_targets"
            )
    most = dataset.num_users // 2 if config.hold_out_users else dataset.num_users
    if most < 1:
        raise DataError(
            f"{dataset.name}: {dataset.num_users} users are too few to evaluate some and train with others; lower "
            f"data.min_interactions (now {config.min_interactions}), or give a larger data set"
        )
    pool = np.array(dataset.test_users) if dataset.test_users else np.arange(dataset.num_users)
    num_eval = min(config.num_eval_users, most, len(pool))
    drawn = keyed_rng(Purpose.EVAL_USERS, config.eval_seed).permutation(pool)[:num_eval].tolist()
    held_out = {*drawn, *dataset.test_users} if config.hold_out_users else set()
    if len(held_out) == dataset.num_users:
        raise DataError(f"{dataset.name}: all {dataset.num_users} users are set apart for evaluation; none is left")
    return Split(
        sequences=dataset.sequences,
        train_sequences=tuple(sequence[: -1 - config.train_targets] for sequence in dataset.sequences),
        train_targets=config.train_targets,
        eval_users=tuple(drawn),
        train_users=tuple(user for user in range(dataset.num_users) if user not in held_out),
    )


def other_eval_users(split: Split, drawn_with: DataConfig, config: DataConfig) -> Split:
    """The split of a run, evaluated by other settings: users that play in none of its training episodes, the run's own
    first, in another order where `eval_seed` is another; fewer than `num_eval_users` where there are no more.

    Args:
        split: of a run that holds its evaluation's users out.
        drawn_with: the run's settings.
        config: those of the evaluation.
    """
    trained = {*split.train_users, *split.eval_users}
    users = np.array([*split.eval_users, *(user for user in range(len(split.sequences)) if user not in trained)])
    if config.eval_seed != drawn_with.eval_seed:
        users = keyed_rng(Purpose.EVAL_USERS, config.eval_seed).permutation(users)
    return replace(split, eval_users=tuple(users[: config.num_eval_users].tolist()))


def train_order(split: Split, *, seed: int, step: int, n: int) -> list[tuple[int, int, int]]:
    """(epoch, user, position of the target) of the n training targets of a step (counted from 0).

    An epoch visits every training user once, in an order drawn from (seed, epoch); a user's targets take turns over the
    epochs. Steps follow each other without a gap, so a step may span epochs.
    """
    users, result = np.array(split.train_users), []
    rotation = keyed_rng(Purpose.TRAIN_ORDER, seed).integers(split.train_targets, size=len(users))
    at, end = step * n, (step + 1) * n
    while at < end:
        epoch, start = divmod(at, len(users))
        order = keyed_rng(Purpose.TRAIN_ORDER, seed, epoch).permutation(len(users))[start : start + end - at]
        for index in order.tolist():
            user = int(users[index])
            turn = (int(rotation[index]) + epoch) % split.train_targets
            result.append((epoch, user, split.train_positions(user)[turn]))
        at += len(order)
    return result
