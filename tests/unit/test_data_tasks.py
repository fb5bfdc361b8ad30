"""Splits, candidates, peers and tasks: no leak from what is held out, and the same task everywhere."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from coars_fast.config import Config, DataConfig, EvalConfig, SASRecConfig, TrainConfig, WorldConfig
from coars_fast.data.peers import Peers
from coars_fast.data.playable import can_discriminate, check_candidates, check_tasks
from coars_fast.data.records import Dataset, Task
from coars_fast.data.sasrec import SASRec, train_sasrec
from coars_fast.data.splits import make_split, other_eval_users, train_order
from coars_fast.data.tasks import TaskSource
from coars_fast.data.world import make_world
from coars_fast.errors import ConfigError, DataError

DATA = DataConfig(num_eval_users=40, train_targets=2, history_length=5)
CONFIG = Config(data=DATA, train=TrainConfig(episodes_per_step=24, group_size=2))
SASREC = SASRecConfig(hidden_size=16, num_epochs=2, batch_size=32)


@pytest.fixture(scope="module")
def world() -> Dataset:
    return make_world(WorldConfig(num_users=100, num_items=200, interactions_per_user=20))


@pytest.fixture(scope="module")
def sasrec(world: Dataset) -> SASRec:
    return train_sasrec(make_split(world, DATA).train_sequences, world.num_items, SASREC, seed=0)


def source(world: Dataset, sasrec: SASRec, seed: int = 0, group_size: int = 2, **data: object) -> TaskSource:
    train = replace(CONFIG.train, group_size=group_size)
    return TaskSource(world, replace(CONFIG, seed=seed, train=train, data=replace(DATA, **data)), sasrec)


def before(world: Dataset, task: Task) -> tuple[int, ...]:
    sequence = world.sequences[task.user]
    return sequence[: sequence.index(task.target)]


def test_split_cuts_and_holds_out(world: Dataset):
    split = make_split(world, DATA)
    assert len(split.eval_users) == 40 and len(set(split.eval_users)) == 40
    assert sorted(split.eval_users + split.train_users) == list(range(100))
    for sequence, part, user in zip(split.sequences, split.train_sequences, range(100), strict=True):
        assert sequence == part + sequence[-3:]
        assert [*split.train_positions(user), split.test_position(user)] == list(range(len(part), len(sequence)))
    assert make_split(world, DATA) == split
    assert make_split(world, replace(DATA, eval_seed=1)).eval_users != split.eval_users
    assert make_split(world, replace(DATA, num_eval_users=10)).eval_users == split.eval_users[:10]


def test_split_without_hold_out_and_with_too_many_asked_for(world: Dataset):
    split = make_split(world, replace(DATA, hold_out_users=False, num_eval_users=1000))
    assert len(split.eval_users) == len(split.train_users) == 100
    more = replace(CONFIG, data=replace(DATA, num_eval_users=51))
    split = make_split(world, more.data)
    assert len(split.eval_users) == 50 and "50 of 51" in check_tasks(world, split, more)[0]


def test_train_order_visits_every_user_once_an_epoch_and_every_target_in_turn(world: Dataset):
    split = make_split(world, DATA)
    num_users = len(split.train_users)
    drawn = [target for step in range(15) for target in train_order(split, seed=3, step=step, n=16)]  # 4 epochs of 60
    for epoch in range(4):
        block = drawn[epoch * num_users : (epoch + 1) * num_users]
        assert {e for e, _, _ in block} == {epoch}
        assert sorted(user for _, user, _ in block) == list(split.train_users)
    assert set(Counter((user, position) for _, user, position in drawn).values()) == {2}
    assert train_order(split, seed=3, step=7, n=16) == drawn[7 * 16 : 8 * 16]  # no state: step 7 alone is the same
    assert [u for _, u, _ in drawn[:60]] != [u for _, u, _ in drawn[60:120]]
    assert len(train_order(split, seed=0, step=0, n=500)) == 500  # more than there are users


@pytest.mark.parametrize("candidates", ["random9+gt", "top10", "top10+gt"])
def test_tasks_leak_nothing(world: Dataset, sasrec: SASRec, candidates: str):
    tasks = source(world, sasrec, candidates=candidates)
    split = tasks.split
    for task in [*tasks.eval_tasks, *tasks.train_tasks(0), *tasks.train_tasks(1)]:
        assert task.target not in task.history
        assert task.history == before(world, task)[-5:]
        assert len(set(task.candidates)) == len(task.candidates) == 10
        assert not set(task.candidates) & set(before(world, task))
        assert len(task.peer_counts) == 10 and max(task.peer_counts) <= task.num_peers == 5
        assert -1.0 <= task.peer_similarity <= 1.0
        if "gt" in candidates:
            assert task.target in task.candidates
    for task in tasks.eval_tasks:
        assert task.target == world.sequences[task.user][-1]
    for task in tasks.train_tasks(0):
        assert task.user in split.train_users and task.user not in split.eval_users
        assert task.target in world.sequences[task.user][-3:-1]


def test_random_candidates_were_never_taken(world: Dataset, sasrec: SASRec):
    for task in source(world, sasrec).train_tasks(0):
        assert set(task.candidates) & set(world.sequences[task.user]) == {task.target}


def test_top_candidates_are_the_best_unseen_ones(world: Dataset, sasrec: SASRec):
    plain, forced = source(world, sasrec, candidates="top10"), source(world, sasrec, candidates="top10+gt")
    for task, with_truth in zip(plain.eval_tasks, forced.eval_tasks, strict=True):
        history = before(world, task)
        scores = sasrec.score([history])[0]
        scores[list(history)] = -np.inf
        best = np.argsort(-scores)[:10].tolist()
        assert set(task.candidates) == set(best)
        if task.target in best:
            assert with_truth.candidates == task.candidates
        else:
            assert set(with_truth.candidates) == {*best[:9], task.target}
    assert plain.hit_ceiling == np.mean([t.target in t.candidates for t in plain.eval_tasks])
    assert 0.0 < plain.hit_ceiling < forced.hit_ceiling == 1.0
    for tasks in (plain, forced):
        expected = []
        for task in tasks.eval_tasks:
            scores = sasrec.score([before(world, task)])[0]
            expected.append(max(task.candidates, key=lambda item: scores[item]) == task.target)  # noqa: B023
        assert tasks.sasrec_top1_hits == expected


def test_candidates_are_shuffled(world: Dataset, sasrec: SASRec):
    places = [t.candidates.index(t.target) for s in range(20) for t in source(world, sasrec).train_tasks(s)[::2]]
    counts = np.bincount(places, minlength=10)
    assert (counts > 0.3 * len(places) / 10).all(), counts


def test_same_task_everywhere(world: Dataset, sasrec: SASRec):
    one, two = source(world, sasrec), source(world, sasrec)
    later = one.train_tasks(9)
    assert [two.train_tasks(step) for step in range(10)][9] == later
    assert one.eval_tasks == two.eval_tasks == source(world, sasrec, seed=77).eval_tasks
    assert later[0::2] == later[1::2]  # groups side by side
    assert {t.user for t in later} != {t.user for t in source(world, sasrec, seed=1).train_tasks(9)}
    alone = source(world, sasrec, group_size=1)
    assert {t.user: t for t in alone.train_tasks(0)}.items() >= {t.user: t for t in one.train_tasks(0)}.items()
    assert source(world, sasrec, eval_seed=5).eval_tasks != one.eval_tasks
    assert one.warm_start_tasks(3, 8) == two.warm_start_tasks(3, 8) != one.warm_start_tasks(4, 8)
    assert one.disc_tasks(3) == two.disc_tasks(3)


def test_another_epoch_draws_other_candidates_for_the_same_target(world: Dataset, sasrec: SASRec):
    tasks = source(world, sasrec, train_targets=1)
    by_user: dict[int, list[Task]] = {}
    for step in range(10):  # 2 epochs
        for task in tasks.train_tasks(step)[::2]:
            by_user.setdefault(task.user, []).append(task)
    first, second = next(iter(by_user.values()))
    assert first.target == second.target and first.candidates != second.candidates


def test_discrimination_tasks(world: Dataset, sasrec: SASRec):
    tasks = source(world, sasrec)
    for ratio, num_positive in ((1, 10), (3, 5), (9, 2)):
        drawn = tasks.disc_tasks(ratio)
        assert 30 < len(drawn) <= 40
        for task in drawn:
            sequence = world.sequences[task.user]
            assert len(set(task.items)) == 20 and sum(task.labels) == num_positive
            assert task.history == sequence[-6:-1] and not set(task.items) & set(task.history)
            taken = [item for item, label in zip(task.items, task.labels, strict=True) if label]
            assert sequence[-1] in taken and set(taken) <= set(sequence)
            assert not (set(task.items) - set(taken)) & set(sequence)
            assert len(task.peer_counts) == 20


def test_discrimination_skips_users_of_few_items(world: Dataset, sasrec: SASRec):
    short = replace(world, sequences=tuple(s[:12] if u % 2 else s[:16] for u, s in enumerate(world.sequences)))
    tasks = TaskSource(short, CONFIG, sasrec)
    drawn = tasks.disc_tasks(1)  # 10 positives of 16 - 5; 12 - 5 are too few
    assert [t.user for t in drawn] == [u for u in tasks.split.eval_users if u % 2 == 0]
    assert len(TaskSource(short, replace(CONFIG, eval=EvalConfig(num_disc_users=3)), sasrec).disc_tasks(9)) == 3
    with pytest.raises(ValueError, match="ratio: 2"):
        tasks.disc_tasks(2)
    long = replace(CONFIG, data=replace(DATA, history_length=9))
    assert not TaskSource(short, long, sasrec).disc_tasks(1)
    (warning,) = check_tasks(short, tasks.split, long)
    assert warning.startswith("F1-disc at 1:1 is left out: no evaluation user took 10 items beside the 9 shown")
    assert not check_tasks(short, tasks.split, replace(long, eval=EvalConfig(num_disc_users=0)))
    # Users who left too few items are no more able: of 16 items here each took 12 or 15.
    few = replace(short, titles=short.titles[:16], item_ids=short.item_ids[:16])
    assert not any(can_discriminate(few, tasks.split, user, 3, DATA) for user in tasks.split.eval_users)


def test_warm_start_stays_inside_the_training_part(world: Dataset, sasrec: SASRec):
    tasks = source(world, sasrec, candidates="top10")
    for task in [t for step in range(6) for t in tasks.warm_start_tasks(step, 50)]:
        part = tasks.split.train_sequences[task.user]
        assert task.user in tasks.split.train_users
        assert part.index(task.target) >= 3 and task.history == before(world, task)[-5:]
        assert task.target in task.candidates and len(set(task.candidates)) == 10
        assert set(task.candidates) & set(world.sequences[task.user]) == {task.target}
    assert len(tasks.warm_start_tasks(0, 500)) == 500
    tiny = replace(world, sequences=tuple(s[:6] for s in world.sequences))
    with pytest.raises(ConfigError, match="warm start needs training parts of more than 3"):
        check_tasks(tiny, make_split(tiny, DATA), replace(CONFIG, warm_start=True))
    assert not check_tasks(tiny, make_split(tiny, DATA), replace(CONFIG, eval=EvalConfig(num_disc_users=0)))


@pytest.mark.parametrize("mode", ["random{}+gt", "top{}", "top{}+gt"])
def test_candidates_are_counted_before_anything_is_trained(world: Dataset, sasrec: SASRec, mode: str):
    longest = max(map(len, world.sequences))
    most = world.num_items - longest + 1  # the test target is one of them, or untaken yet
    fits, too_many = (mode.format(size - mode.startswith("random")) for size in (most, most + 1))
    check_candidates(world, replace(DATA, candidates=fits))
    tasks = source(world, sasrec, candidates=fits)
    assert {len(set(task.candidates)) for task in tasks.eval_tasks + tasks.train_tasks(0)} == {most}
    with pytest.raises(DataError, match=rf"needs {most + 1} items .* took {longest} of .* name at most {most} cand"):
        check_candidates(world, replace(DATA, candidates=too_many))


def test_sasrec_of_another_catalogue(world: Dataset, sasrec: SASRec):
    with pytest.raises(DataError, match="SASRec knows 5 items"):
        TaskSource(world, CONFIG, SASRec(5, SASREC))


def test_peers_by_hand():
    angles = np.deg2rad([0.0, 10.0, 25.0, 90.0, 181.0])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32) * 3.0
    parts = [(0, 1), (1, 2), (1, 3), (4,), (2,)]
    peers = Peers(embeddings, parts, [0, 1, 3, 4], num_items=5, num_peers=2)
    nearest, similarity = peers.nearest(0)  # user 2 is nearer than 3, but not a training user
    assert nearest.tolist() == [1, 3]
    assert similarity == pytest.approx((np.cos(np.deg2rad(10)) + 0.0) / 2, abs=1e-6)
    assert peers.nearest(2)[0].tolist() == [1, 0]
    assert peers.counts(nearest, [0, 1, 2, 3, 4]) == (0, 1, 1, 0, 1)
    few = Peers(embeddings, parts, [0, 1], num_items=5, num_peers=5)
    assert few.num_peers == 1 and few.nearest(0)[0].tolist() == [1]
    none = Peers(embeddings, parts, [0, 1], num_items=5, num_peers=0)
    assert none.nearest(0)[1] == 0.0 and none.counts(none.nearest(0)[0], [1, 2]) == (0, 0)


def test_peer_counts_come_from_training_parts_only(world: Dataset, sasrec: SASRec):
    tasks = source(world, sasrec)
    parts = tasks.split.train_sequences
    embeddings = sasrec.user_embeddings(parts).astype(np.float64)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    for task in tasks.eval_tasks + tasks.train_tasks(0)[::2]:
        others = [u for u in tasks.split.train_users if u != task.user]
        similarity = embeddings[others] @ embeddings[task.user]
        best = np.argsort(-similarity)[:5]
        assert task.peer_similarity == pytest.approx(similarity[best].mean(), abs=1e-5)
        expected = tuple(sum(item in parts[others[b]] for b in best) for item in task.candidates)
        assert task.peer_counts == expected


def test_another_evaluation_asks_users_that_the_run_did_not_train_on(world: Dataset):
    split = make_split(world, DATA)

    def redrawn(**changes: int) -> tuple[int, ...]:
        return other_eval_users(split, DATA, replace(DATA, **changes)).eval_users

    assert redrawn() == split.eval_users and redrawn(num_eval_users=7) == split.eval_users[:7]
    assert redrawn(num_eval_users=90) == split.eval_users, "there are no more"
    other = redrawn(eval_seed=5)
    assert other != split.eval_users and sorted(other) == sorted(split.eval_users)
    # Of users that the data set itself sets apart, some may not have been drawn.
    apart = replace(world, test_users=tuple(range(60)))
    few = replace(DATA, num_eval_users=10)
    split = make_split(apart, few)
    found = other_eval_users(split, few, replace(few, num_eval_users=30)).eval_users
    assert found[:10] == split.eval_users and len(set(found)) == 30 and max(found) < 60
