"""The warm start's lessons: copying titles from lists first where that is asked for, then conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from coars_fast import warm_start
from coars_fast.config import SFTConfig
from coars_fast.data.records import Lesson, Task
from coars_fast.data.tasks import TaskSource
from coars_fast.game.episode import Episode
from coars_fast.progress import Screen
from tests import tiny

# A compound and a noun are one token each in the tiny tokenizer, so is ";".
TITLES = (
    "Softstar Diary", "Grimheist Club", "Grandsong Papers", "Softstar Road", "Sillymoss House", "Strangegoal Winter",
    "Grimheist Mirror", "Grandrace Castle", "Sillydrum Tower", "Softriver Window", "Grimcomet Code",
)  # fmt: skip


class Tasks:
    """Hands out tasks with ten candidates, and notes what was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def warm_start_tasks(self, step: int, n: int) -> list[Task]:
        self.asked.append((step, n))
        return [
            Task(
                user=0, history=(0,), target=1 + (step + i) % 10, peer_counts=(0,) * 10, num_peers=5,
                peer_similarity=0.0, candidates=tuple(np.random.default_rng([step, i]).permutation(10) + 1),
            )
            for i in range(n)
        ]  # fmt: skip


def new_episode(task: Task, titles: Sequence[str] = TITLES) -> Episode:
    return Episode(task, titles, *tiny.tokens(), tiny.GAME)


def copying(
    seed: int = 0, titles: Sequence[str] = TITLES, batch_size: int = 3, in_order: bool = False
) -> tuple[list[Lesson], list[list[str]]]:
    """Lessons of a batch, and each one's candidates in order."""
    tasks, shown = Tasks(), []

    def listed(task: Task) -> Episode:
        shown.append([titles[i] for i in task.candidates])
        return new_episode(task, titles)

    config = tiny.tiny_config(sft=SFTConfig(num_steps=4, copying_steps=2, batch_size=batch_size))
    found = warm_start.copying_lessons(
        cast(TaskSource, tasks), listed, config, np.random.default_rng(seed), in_order=in_order
    )
    assert [n for _, n in tasks.asked] == [batch_size]
    return found, shown


def parts(lesson: Lesson) -> tuple[str, str, int]:
    """Question and answer as text, and the position at which the answer starts."""
    codec, template = tiny.tokens()
    header = list(template.headers["assistant"])
    (start,) = [i + len(header) for i in range(len(lesson.tokens)) if lesson.tokens[i : i + len(header)] == header]
    return codec.decode(lesson.tokens[: start - len(header)]), codec.decode(lesson.tokens[start:]), start


def test_a_copying_lesson_lists_the_candidates_and_names_each_once_in_another_order() -> None:
    found, shown = copying()
    codec = tiny.tokens()[0]
    assert len(found) == len(shown) == 3
    for lesson, titles in zip(found, shown, strict=True):
        question, answer, start = parts(lesson)
        assert question == "user\nCandidates:" + "".join(f" {title};" for title in titles) + "\n"
        named = [line.removeprefix("Item: ") for line in answer.splitlines()]
        assert sorted(named) == sorted(titles) and named != titles
        assert not any(lesson.is_answer[:start])
        learned = [t for t, answer in zip(lesson.tokens, lesson.is_answer, strict=True) if answer]
        assert codec.decode(learned) == "".join(f" {title}" for title in named)


def test_the_first_copying_lessons_repeat_the_list_word_for_word() -> None:
    for lesson, titles in zip(*copying(in_order=True), strict=True):
        _, answer, start = parts(lesson)
        assert answer == "".join(f" {title};" for title in titles)
        assert lesson.is_answer == [False] * start + [True, True, False] * 10


def test_copying_lessons_come_from_the_generator_alone() -> None:
    assert copying(3) == copying(3)
    assert copying(3)[1] != copying(4)[1], "other tasks"
    assert len(copying(3, batch_size=5)[0]) == 5


@pytest.mark.parametrize(
    ("num_steps", "copying_steps", "trainable", "kinds"),
    [
        (4, 2, "all", ["copying", "copying", "talk", "talk"]),
        (2, 0, "all", ["talk", "talk"]),
        (2, 2, "all", ["copying", "copying"]),
        (3, 2, "adapters", ["talk", "talk", "talk"]),
    ],
)
def test_copying_comes_first_and_only_where_the_base_is_trained(
    num_steps: int, copying_steps: int, trainable: Any, kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[tuple[list[Lesson], list[int] | None]] = []

    def fine_tune(decoder: Any, given: Any, **settings: Any) -> None:
        assert settings["num_steps"] == num_steps
        batches.extend(given)

    monkeypatch.setattr(warm_start, "fine_tune", fine_tune)
    config = tiny.tiny_config(
        sft=SFTConfig(num_steps=num_steps, copying_steps=copying_steps, batch_size=2, trainable=trainable)
    )
    tasks = cast(TaskSource, Tasks())
    warm_start.warm_start(tiny.random_decoder(), tasks, new_episode, config, Screen())
    codec = tiny.tokens()[0]
    texts = [[codec.decode(lesson.tokens) for lesson in lessons] for lessons, _ in batches]
    assert ["copying" if all(t.startswith("user\nCandidates:") for t in batch) else "talk" for batch in texts] == kinds
    for kind, batch, (_, agents) in zip(kinds, texts, batches, strict=True):
        if kind == "copying":
            assert len(batch) == 2 and agents is None
        else:  # both agents' views of two conversations
            assert [t.startswith("system\nRecommend") for t in batch] == [True, False] * 2
            assert agents == ([0, 1, 0, 1] if trainable == "adapters" else None)
    assert len({tuple(batch) for batch in texts}) == num_steps, "every step has lessons of its own"
