"""Splits, tasks and title folding hold their promises for any sequences and texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coars_fast.config import Config, DataConfig, SASRecConfig, TrainConfig
from coars_fast.data.movielens import load_movielens
from coars_fast.data.records import Dataset
from coars_fast.data.sasrec import SASRec
from coars_fast.data.splits import make_split
from coars_fast.data.table import Rows, Titles, assemble, id_order
from coars_fast.data.tasks import TaskSource
from coars_fast.data.titles import unique_titles

NUM_ITEMS = 40
MODEL = SASRec(NUM_ITEMS, SASRecConfig(hidden_size=4, num_heads=1, num_layers=1, max_length=5))


def a_dataset(sequences: list[list[int]]) -> Dataset:
    return Dataset(
        name="random",
        titles=tuple(f"T{i}" for i in range(NUM_ITEMS)),
        sequences=tuple(map(tuple, sequences)),
        user_ids=tuple(str(u) for u in range(len(sequences))),
        item_ids=tuple(str(i) for i in range(NUM_ITEMS)),
    )


SEQUENCES = st.lists(
    st.lists(st.integers(0, NUM_ITEMS - 1), min_size=5, max_size=20, unique=True), min_size=2, max_size=12
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    sequences=SEQUENCES,
    train_targets=st.integers(1, 3),
    history_length=st.integers(1, 8),
    hold_out=st.booleans(),
    candidates=st.sampled_from(["top2", "top7+gt", "random1+gt", "random9+gt"]),
    eval_seed=st.integers(0, 2**32),
    num_peers=st.integers(0, 4),
)
def test_no_task_of_any_data_leaks(
    sequences: list[list[int]],
    train_targets: int,
    history_length: int,
    hold_out: bool,
    candidates: str,
    eval_seed: int,
    num_peers: int,
):
    dataset = a_dataset(sequences)
    data = DataConfig(
        train_targets=train_targets,
        history_length=history_length,
        hold_out_users=hold_out,
        candidates=candidates,
        eval_seed=eval_seed,
        num_peers=num_peers,
    )
    source = TaskSource(dataset, Config(data=data, train=TrainConfig(episodes_per_step=7)), MODEL)
    split = make_split(dataset, data)
    assert bool(set(split.eval_users) & set(split.train_users)) is not hold_out
    for user, part in enumerate(split.train_sequences):
        held_back = [sequences[user][p] for p in [*split.train_positions(user), split.test_position(user)]]
        assert len(held_back) == train_targets + 1 and not set(held_back) & set(part)
        assert [*part, *held_back] == sequences[user]
    for task in [*source.eval_tasks, *source.train_tasks(0), *source.train_tasks(5)]:
        at = sequences[task.user].index(task.target)
        assert list(task.history) == sequences[task.user][max(0, at - history_length) : at]
        assert len(set(task.candidates)) == len(task.candidates) == source.maker.mode.size
        assert not set(task.candidates) & set(sequences[task.user][:at])
        assert all(0 <= count <= task.num_peers for count in task.peer_counts)
        if source.maker.mode.force_truth:
            assert task.target in task.candidates


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=8), max_size=8))
def test_titles_are_never_empty_never_equal_and_one_line(texts: list[str]):
    titles = unique_titles(texts, [str(i) for i in range(len(texts))])
    assert len({title.casefold() for title in titles}) == len(texts)
    for title in titles:
        assert title == " ".join(title.split()) and len(title.splitlines()) == 1
        assert title.isprintable(), ascii(title)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=40))
def test_movielens_order_equals_a_plain_sort(tmp_path: Path, ratings: list[tuple[int, int, int]]):
    (tmp_path / "movies.dat").write_text("".join(f"{m}::Movie {m}::x\n" for m in range(1, 10)))
    (tmp_path / "ratings.dat").write_text("".join(f"{u}::{m}::3::{t}\n" for u, m, t in ratings))
    data = load_movielens(tmp_path)
    for user, sequence in zip(data.user_ids, data.sequences, strict=True):
        expected = []
        for _, movie in sorted((t, m) for u, m, t in ratings if str(u) == user):
            if movie not in expected:
                expected.append(movie)
        assert [int(data.item_ids[i]) for i in sequence] == expected
    assert np.all(np.diff([int(i) for i in data.item_ids]) > 0)


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=4) | st.integers(-3, 120).map(str)
ROWS = st.lists(st.tuples(NAMES, NAMES, st.integers(-2, 3)), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(rows=ROWS)
def test_any_rows_are_ordered_and_counted_as_a_plain_program_would(rows: list[tuple[str, str, int]]):
    collected = Rows()
    for user, item, time in rows:
        collected.add(user, item, time)
    items = sorted({item for _, item, _ in rows}, key=id_order)
    titles = Titles(file="items", of={item: item for item in items})
    data = assemble(collected.table(), titles, name="any", layout="plain", files=[Path("rows")])
    assert data.item_ids == tuple(items)
    assert data.user_ids == tuple(sorted({user for user, _, _ in rows}, key=id_order))
    assert len({title.casefold() for title in data.titles}) == len(items) and all(data.titles)
    kept = 0
    for user, sequence in zip(data.user_ids, data.sequences, strict=True):
        own = sorted((time, id_order(item), item) for name, item, time in rows if name == user)
        expected = list(dict.fromkeys(item for _, _, item in own))
        assert [data.item_ids[i] for i in sequence] == expected
        kept += len(expected)
    assert data.reading is not None and data.reading.rows == len(rows)
    assert dict(data.reading.left_out).get("repeated interactions of a user with an item", 0) == len(rows) - kept
