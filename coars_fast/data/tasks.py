"""What is played: tasks of training and evaluation episodes, discrimination tests and warm-start conversations.

A task is a function of (seed, user, target position), and of the epoch in training: asking twice, elsewhere or after a
resume gives the same one. :class:`TaskMaker` makes single tasks, :class:`TaskSource` says which ones a run plays.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from coars_fast.config import Config, DataConfig, parse_candidates
from coars_fast.data.peers import Peers
from coars_fast.data.playable import DISC_ITEMS, WARM_START_POSITION, can_discriminate, num_positive
from coars_fast.data.ranking import full_ranking
from coars_fast.data.records import Dataset, DiscriminationTask, Task
from coars_fast.data.sasrec import SASRec
from coars_fast.data.splits import Purpose, Split, keyed_rng, make_split, train_order
from coars_fast.errors import DataError

_BLOCK = 256


class TaskMaker:
    """Makes tasks of a split: the shown history, the candidates by `data.candidates`, the peers."""

    def __init__(self, dataset: Dataset, split: Split, config: DataConfig, sasrec: SASRec):
        if sasrec.num_items != dataset.num_items:
            raise DataError(
                f"SASRec knows {sasrec.num_items} items, {dataset.name} has {dataset.num_items}; train it again"
            )
        self.dataset, self.split, self.sasrec, self.config = dataset, split, sasrec, config
        self.mode = parse_candidates(config.candidates)
        self._peers = Peers(
            sasrec.user_embeddings(split.train_sequences),
            split.train_sequences,
            split.train_users,
            num_items=dataset.num_items,
            num_peers=config.num_peers,
        )
        self._best: dict[tuple[int, int], np.ndarray] = {}

    def task(self, user: int, position: int, rng: np.random.Generator, *, random_candidates: bool = False) -> Task:
        """The episode whose target stands at `position` (from 1) of the user's sequence.

        Args:
            rng: draws random candidates and the order in which candidates are shown.
            random_candidates: the truth and random items, whatever `data.candidates` says (the warm start, where
                SASRec has seen the target).
        """
        sequence = self.split.sequences[user]
        target = sequence[position]
        if self.mode.source == "random" or random_candidates:
            chosen = [target, *self._never_taken(user, self.mode.size - 1, rng)]
        else:
            chosen = self._top(user, position)
            if self.mode.force_truth and target not in chosen:
                chosen[-1] = target
            chosen.sort()  # so that a tie between scores cannot change the order that is shown
        candidates = [chosen[i] for i in rng.permutation(len(chosen)).tolist()]
        peers, similarity = self._peers.nearest(user)
        return Task(
            user=user,
            history=sequence[max(0, position - self.config.history_length) : position],
            target=target,
            candidates=tuple(candidates),
            peer_counts=self._peers.counts(peers, candidates),
            num_peers=len(peers),
            peer_similarity=similarity,
        )

    def discrimination_task(self, user: int, ratio: int, rng: np.random.Generator) -> DiscriminationTask:
        """20 items: the test target, other items that the user took but that the shown history lacks, and items never
        taken, `ratio` times as many, shuffled. Only for users of whom `can_discriminate` holds."""
        sequence, position = self.split.sequences[user], self.split.test_position(user)
        start, count = max(0, position - self.config.history_length), num_positive(ratio)
        older = np.array(sequence[:start], dtype=np.int64)
        positive = [sequence[position], *rng.choice(older, count - 1, replace=False).tolist()]
        items = positive + self._never_taken(user, DISC_ITEMS - count, rng)
        order = rng.permutation(DISC_ITEMS).tolist()
        shown = [items[i] for i in order]
        peers, _ = self._peers.nearest(user)
        return DiscriminationTask(
            user=user,
            history=sequence[start:position],
            items=tuple(shown),
            labels=tuple(i < count for i in order),
            peer_counts=self._peers.counts(peers, shown),
            num_peers=len(peers),
        )

    def _never_taken(self, user: int, count: int, rng: np.random.Generator) -> list[int]:
        """`count` different items that the user took at no time, test target and training targets included."""
        free = np.ones(self.dataset.num_items, dtype=bool)
        free[list(self.split.sequences[user])] = False
        return rng.choice(np.flatnonzero(free), count, replace=False).tolist()

    def _top(self, user: int, position: int) -> list[int]:
        """SASRec's best `mode.size` items for what the user took before `position`, best first. Scored for blocks of
        users at the same distance from the end, and remembered."""
        offset = len(self.split.sequences[user]) - position
        number, row = divmod(user, _BLOCK)
        if (offset, number) not in self._best:
            self._best[offset, number] = self._best_of_block(offset, number)
        return self._best[offset, number][row].tolist()

    def _best_of_block(self, offset: int, number: int) -> np.ndarray:
        """[users of the block, mode.size] items."""
        histories = [s[:-offset] for s in self.split.sequences[number * _BLOCK : (number + 1) * _BLOCK]]
        scores = self.sasrec.score(histories)
        for row, history in enumerate(histories):
            scores[row, list(history)] = -np.inf
        return np.argsort(-scores, axis=1, kind="stable")[:, : self.mode.size]


class TaskSource:
    """The tasks of a run. `config.seed` draws the training's, `config.data.eval_seed` the evaluation's."""

    def __init__(self, dataset: Dataset, config: Config, sasrec: SASRec, split: Split | None = None):
        """`sasrec` must have been trained on the split's `train_sequences`; by default it is `make_split`'s. That all
        tasks can be made, `playable.check_tasks` has found."""
        self.config = config
        self.split = make_split(dataset, config.data) if split is None else split
        self.maker = TaskMaker(dataset, self.split, config.data, sasrec)

    def train_tasks(self, step: int) -> list[Task]:
        """`train.episodes_per_step` tasks of this step (from 0), the `group_size` copies of each side by side."""
        group_size = self.config.train.group_size
        targets = train_order(
            self.split, seed=self.config.seed, step=step, n=self.config.train.episodes_per_step // group_size
        )
        tasks = [
            self.maker.task(user, position, keyed_rng(Purpose.TRAIN_TASK, self.config.seed, user, position, epoch))
            for epoch, user, position in targets
        ]
        return [task for task in tasks for _ in range(group_size)]

    @cached_property
    def eval_tasks(self) -> list[Task]:
        """One task per evaluation user, about the test target; the first n are a random sample too."""
        tasks = []
        for user in self.split.eval_users:
            position = self.split.test_position(user)
            rng = keyed_rng(Purpose.EVAL_TASK, self.config.data.eval_seed, user, position)
            tasks.append(self.maker.task(user, position, rng))
        return tasks

    def disc_tasks(self, ratio: int) -> list[DiscriminationTask]:
        """Discrimination tasks with `ratio` negatives per positive (1: 10/10, 3: 5/15, 9: 2/18) of the first
        `eval.num_disc_users` evaluation users who took enough items and left enough."""
        dataset, data = self.maker.dataset, self.config.data
        able = [user for user in self.split.eval_users if can_discriminate(dataset, self.split, user, ratio, data)]
        return [
            self.maker.discrimination_task(user, ratio, keyed_rng(Purpose.DISCRIMINATION, data.eval_seed, user, ratio))
            for user in able[: self.config.eval.num_disc_users]
        ]

    def warm_start_tasks(self, step: int, n: int) -> list[Task]:
        """n tasks for supervised fine-tuning: training users, targets in their training parts, random candidates."""
        parts = self.split.train_sequences
        users = [user for user in self.split.train_users if len(parts[user]) > WARM_START_POSITION]
        rng = keyed_rng(Purpose.WARM_START, self.config.seed, step)
        tasks = []
        for user in rng.choice(users, n, replace=n > len(users)).tolist():
            position = int(rng.integers(WARM_START_POSITION, len(parts[user])))
            tasks.append(self.maker.task(user, position, rng, random_candidates=True))
        return tasks

    def earlier_tasks(self, task: Task, count: int) -> list[Task]:
        """Up to `count` tasks about the items that the user took right before this one's target, oldest first.

        Candidates are the truth and random items, as in the warm start: SASRec has seen most of these targets. Such a
        task is the same whichever task asks, and whatever `seed` is. Fewer where the user has no longer history.
        """
        last = self.split.sequences[task.user].index(task.target)
        seed = self.config.data.eval_seed
        return [
            self.maker.task(task.user, at, keyed_rng(Purpose.EARLIER_TASK, seed, task.user, at), random_candidates=True)
            for at in range(max(1, last - count), last)
        ]

    @cached_property
    def hit_ceiling(self) -> float:
        """HR@K of the evaluation's candidates: the share of tasks that hold the truth, and so the best Hit@1."""
        return float(np.mean([task.target in task.candidates for task in self.eval_tasks]))

    @cached_property
    def sasrec_top1_hits(self) -> list[bool]:
        """For each of the evaluation's tasks, whether SASRec's best candidate is the truth (ties: the one shown
        first)."""
        scores = self.maker.sasrec.score([self.split.sequences[task.user][:-1] for task in self.eval_tasks])
        best = [row[list(task.candidates)].argmax() for row, task in zip(scores, self.eval_tasks, strict=True)]
        return [t.candidates[b] == t.target for b, t in zip(best, self.eval_tasks, strict=True)]

    @cached_property
    def sasrec_metrics(self) -> dict[str, float]:
        """SASRec's own check: `hr@10` and `ndcg@10` of all users' test targets, ranked among all items not taken."""
        histories = [sequence[:-1] for sequence in self.split.sequences]
        return full_ranking(self.maker.sasrec, histories, [sequence[-1] for sequence in self.split.sequences])
