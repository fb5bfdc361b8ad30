"""The warm start's lessons: items to find in lists that grow with success, then conversations about the truth."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from coars_fast import warm_start
from coars_fast.config import DataConfig, GameConfig, SFTConfig
from coars_fast.data.records import Dataset, Lesson, Task
from coars_fast.data.sasrec import ItemSpace, SASRec
from coars_fast.data.tasks import TaskSource
from coars_fast.data.world import make_world
from coars_fast.game.episode import RECOMMENDER, USER, Episode
from coars_fast.game.prompts import parse_judgement
from coars_fast.progress import Screen
from coars_fast.warm_start import ALIKE, FOUND, GROW_EVERY, LISTS_PER_CONVERSATION, QUERIES, WarmStart, conversation
from tests import tiny

CONFIG = tiny.tiny_config()
GREETING = "system\nRecommend one item.\nuser\n"


@lru_cache(maxsize=1)
def world() -> tuple[Dataset, SASRec]:
    """60 items and a SASRec with vectors in all directions around a mean that is not zero."""
    dataset = make_world(CONFIG.world)
    sasrec = SASRec(dataset.num_items, CONFIG.sasrec).eval()
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(dataset.num_items, CONFIG.sasrec.hidden_size)) + 2.0
    with torch.no_grad():
        sasrec.item_embedding.weight.copy_(torch.tensor(drawn))
    return dataset, sasrec


@lru_cache(maxsize=1)
def alike() -> np.ndarray:
    """[60, 60] cosine similarity of the items around their mean."""
    vectors = world()[1].item_embedding.weight.detach().double().numpy()
    vectors = vectors - vectors.mean(0)
    lengths = np.sqrt((vectors**2).sum(1))
    return vectors @ vectors.T / np.outer(lengths, lengths)


def number(title: str) -> int:
    return world()[0].titles.index(title)


def new_episode(task: Task, **game: Any) -> Episode:
    settings: dict[str, Any] = {"max_turns": 2} | game
    return Episode(task, world()[0].titles, *tiny.tokens(), GameConfig(**settings))


def teacher(candidates: str = "random4+gt", **sft: Any) -> WarmStart:
    data = DataConfig(candidates=candidates, history_length=4, num_eval_users=4)
    settings: dict[str, Any] = {"num_steps": 60, "finding_steps": 50} | sft
    config = tiny.tiny_config(data=data, sft=SFTConfig(**settings))
    dataset, sasrec = world()
    return WarmStart(TaskSource(dataset, config, sasrec), new_episode, config)


def found_lists(size: int = 10, count: int = 40, longest: int | None = None) -> list[Lesson]:
    teaching = teacher(f"random{size - 1}+gt")
    return [teaching.finding(np.random.default_rng([1, n]), longest or size) for n in range(count)]


def text(lesson: Lesson) -> str:
    return tiny.tokens()[0].decode(lesson.tokens)


def learned(lesson: Lesson) -> str:
    """The words to be predicted."""
    pairs = zip(lesson.tokens, lesson.is_answer, strict=True)
    return tiny.tokens()[0].decode([token for token, answer in pairs if answer])


def parts(lesson: Lesson) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """History and candidates that a list shows, and (item of the history, named candidate) of each reply."""
    shown = re.fullmatch(
        GREETING + r"History: (.+)\nCandidates: (.+)\nassistant\n((?:Reason: likes .+\.\nItem: .+\n)+)", text(lesson)
    )
    assert shown, text(lesson)
    replies = re.findall(r"Reason: likes (.+)\.\nItem: (.+)\n", shown[3])
    return shown[1].split("; "), shown[2].split("; "), replies


def is_list(lesson: Lesson) -> bool:
    """In a conversation whole replies are learned."""
    return "Reason:" not in learned(lesson)


# --------------------------------------------------------------------------------------------------------------- lists


def test_a_list_asks_for_each_item_of_its_history_once() -> None:
    shuffled = 0
    for lesson in found_lists():
        history, candidates, replies = parts(lesson)
        because = [item for item, _ in replies]
        assert sorted(because) == sorted(history) and 1 <= len(history) <= QUERIES
        assert len(set(history)) == len(history) and len(set(candidates)) == len(candidates)
        assert not set(history) & set(candidates)
        shuffled += because != history
    assert shuffled > 20, "the history does not say in which order"


def test_what_is_learned_of_a_list_are_candidates_alone() -> None:
    codec, template = tiny.tokens()
    for lesson in found_lists():
        history, candidates, replies = parts(lesson)
        assert learned(lesson) == "".join(f" {named}" for _, named in replies)
        assert {named for _, named in replies} <= set(candidates) and not set(candidates) & set(history)
        # Token for token what a recommender writes, and nothing of it but the named titles is an answer.
        tokens = list(codec.encode(f"{GREETING.splitlines()[1]}"))
        tokens = [*template.message("system", tokens), *template.headers["user"]]
        tokens += codec.encode(f"History: {'; '.join(history)}\nCandidates: {'; '.join(candidates)}")
        tokens += [*template.end, *template.headers["assistant"]]
        answers = [False] * len(tokens)
        for item, named in replies:
            for piece, answer in ((f"Reason: likes {item}.\nItem:", False), (f" {named}", True), ("\n", False)):
                tokens += codec.encode(piece)
                answers += [answer] * len(codec.encode(piece))
        assert (lesson.tokens, lesson.is_answer) == (tokens, answers)
        said = codec.encode("".join(f"Reason: likes {item}.\nItem: {named}\n" for item, named in replies))
        assert lesson.tokens[-len(said) :] == said, "the pieces read as the whole does"


def test_the_answer_is_the_candidate_most_like_the_item() -> None:
    for lesson in found_lists():
        _, candidates, replies = parts(lesson)
        for item, named in replies:
            like = {title: alike()[number(item), number(title)] for title in candidates}
            assert named == max(like, key=like.__getitem__)


def test_items_are_looked_for_by_their_neighbours() -> None:
    nearest = np.argsort(-(alike() - 9.0 * np.eye(60)), axis=1)[:, :ALIKE]
    for lesson in found_lists(size=3):
        history, candidates, _ = parts(lesson)
        near = {int(item) for title in candidates for item in nearest[number(title)]}
        assert {number(title) for title in history} <= near


@pytest.mark.parametrize("longest", [2, 3, 6])
def test_lists_are_never_longer_than_asked_for(longest: int) -> None:
    lengths = Counter(len(parts(lesson)[1]) for lesson in found_lists(count=60, longest=longest))
    assert set(lengths) == set(range(2, longest + 1))


def test_popular_items_are_shown_more_often() -> None:
    teaching = teacher()
    taken = Counter(item for part in teaching.tasks.split.train_sequences for item in part)
    assert taken.most_common(1)[0][1] > 8 and len(taken) < 60, "the world has fashions"
    expected = np.array([taken[item] + 1 for item in range(60)])
    assert teaching.popularity == pytest.approx(expected / expected.sum())
    shown: Counter[int] = Counter()
    for lesson in found_lists(count=150):
        shown.update(number(title) for title in parts(lesson)[1])
    often, seldom = expected >= np.sort(expected)[-15], expected <= np.sort(expected)[14]
    mean = np.array([shown[item] for item in range(60)])
    assert mean[often].mean() > 2 * mean[seldom].mean()


def test_a_list_comes_from_its_generator_alone() -> None:
    assert found_lists(count=3) == found_lists(count=3)
    one, other = found_lists(count=2)
    assert one != other


def test_a_list_that_nothing_is_like_is_drawn_again() -> None:
    """Nine of ten items shown leave one to ask by; lists of all ten leave none, and are never taught."""
    dataset, _ = world()
    small = Dataset(
        name="small", titles=dataset.titles[:10], item_ids=dataset.item_ids[:10], user_ids=("a", "b", "c"),
        sequences=((0, 1, 2, 3, 4), (3, 4, 5, 6, 7), (9, 8, 7, 6, 5)),
    )  # fmt: skip
    config = tiny.tiny_config(data=DataConfig(candidates="random4+gt", num_eval_users=1))
    teaching = WarmStart(TaskSource(small, config, SASRec(10, CONFIG.sasrec).eval()), new_episode, config)
    lengths = set()
    for seed in range(40):
        history, candidates, _ = parts(teaching.finding(np.random.default_rng(seed), 10))
        assert 1 <= len(history) <= 10 - len(candidates)
        lengths.add(len(candidates))
    assert max(lengths) == 9


def test_lists_are_numbered_where_the_prompts_number_them() -> None:
    dataset, sasrec = world()
    tasks = TaskSource(dataset, CONFIG, sasrec)
    teaching = WarmStart(tasks, lambda task: new_episode(task, prompts="full"), CONFIG)
    for seed in range(5):
        lesson = teaching.finding(np.random.default_rng(seed), 5)
        found = re.search(r"Candidates:\n((?:\d\. .+\n)+)assistant\n", text(lesson))
        assert found
        candidates = found[1].splitlines()
        assert candidates == [f"{n}. {title.partition(' ')[2]}" for n, title in enumerate(candidates, start=1)]
        named = []
        for item in re.findall(r"Reason: likes (.+)\.\n", text(lesson)):
            like = [alike()[number(item), number(title.partition(" ")[2])] for title in candidates]
            named.append(candidates[int(np.argmax(like))])
        assert named and learned(lesson) == "".join(f" {item}" for item in named)


# --------------------------------------------------------------------------------------------------------------- growth


def note(teaching: WarmStart, *losses: float) -> int:
    for step, loss in enumerate(losses):
        teaching.note(step, loss)
    return teaching.longest


def test_lists_grow_by_one_when_the_mean_loss_of_some_steps_is_low() -> None:
    teaching = teacher("random9+gt")
    assert teaching.longest == 3
    low, high = FOUND - 0.3, FOUND + 0.2
    assert note(teaching, *[low] * (GROW_EVERY - 1)) == 3
    assert note(teaching, low) == 4
    assert note(teaching, *[low] * (GROW_EVERY - 1)) == 4, "every length gets its steps"
    assert note(teaching, low) == 5
    assert note(teaching, *[high] * GROW_EVERY) == 5
    assert note(teaching, *[low] * (GROW_EVERY // 2), *[high] * (GROW_EVERY // 2)) == 6, "their mean is low"
    assert note(teaching, *[high] * GROW_EVERY, *[low] * (GROW_EVERY - 1)) == 6, "high losses do not linger"
    assert note(teaching, low) == 7
    assert note(teaching, *[FOUND + 0.01] * GROW_EVERY) == 7
    assert note(teaching, *[low] * (GROW_EVERY - 1), 100.0) == 7


def test_lists_never_grow_beyond_the_candidates() -> None:
    for candidates, size in (("random4+gt", 5), ("top20", 20), ("top3", 3), ("random1+gt", 2)):
        teaching = teacher(candidates)
        assert teaching.longest == min(3, size)
        found = [note(teaching, *[0.0] * GROW_EVERY) for _ in range(25)]
        assert found == [min(min(3, size) + n, size) for n in range(1, 26)]


def test_losses_of_conversations_do_not_count() -> None:
    teaching = teacher(num_steps=100, finding_steps=7)
    assert note(teaching, *[0.0] * 100) == 3
    assert note(teacher(finding_steps=0), *[0.0] * 100) == 3


def test_batches_follow_the_growth() -> None:
    teaching = teacher(num_steps=30, finding_steps=30, batch_size=8)
    longest: list[set[int]] = [set(), set(), set()]
    for step, (lessons, agents) in enumerate(teaching.batches()):
        assert agents is None and len(lessons) == 8
        longest[step // 10] |= {len(parts(lesson)[1]) for lesson in lessons}
        teaching.note(step, 0.1)
    assert longest == [{2, 3}, {2, 3, 4}, {2, 3, 4, 5}]


# -------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("num_steps", "finding_steps", "trainable", "kinds"),
    [
        (4, 2, "all", ["lists", "lists", "both", "both"]),
        (2, 0, "all", ["talk", "talk"]),
        (2, 2, "all", ["lists", "lists"]),
        (3, 0, "adapters", ["talk", "talk", "talk"]),
    ],
)
def test_lists_come_first_and_some_stay_among_the_conversations(
    num_steps: int, finding_steps: int, trainable: Any, kinds: list[str]
) -> None:
    teaching = teacher(
        "random9+gt", num_steps=num_steps, finding_steps=finding_steps, batch_size=8, trainable=trainable
    )
    batches = list(teaching.batches())
    assert len(batches) == len(kinds) and LISTS_PER_CONVERSATION * 8 == 2
    mixed = []
    for kind, (lessons, agents) in zip(kinds, batches, strict=True):
        talk = 0 if kind == "lists" else 16  # both agents' views of eight conversations
        single = talk // 2  # and as many single items to judge
        lists = {"lists": 8, "both": 2, "talk": 0}[kind]
        assert [is_list(lesson) for lesson in lessons] == [False] * (talk + single) + [True] * lists
        mixed += [len(parts(lesson)[1]) for lesson in lessons[talk + single :] if kind == "both"]
        opened = [text(lesson).startswith(GREETING) for lesson in lessons[: talk + single]]
        assert opened == [True, False] * (talk // 2) + [False] * single
        assert agents == ([RECOMMENDER, USER] * 8 + [USER] * 8 if trainable == "adapters" else None)
    assert not mixed or max(mixed) > teaching.longest == 3, "lists among conversations are of any length"
    texts = {tuple(text(lesson) for lesson in lessons) for lessons, _ in batches}
    assert len(texts) == num_steps, "every step has lessons of its own"


def test_single_items_are_judged_as_the_discrimination_test_asks() -> None:
    rng, rights = np.random.default_rng(5), 0
    for n in range(60):
        episode = tiny.new_episode(n)
        lesson, task = warm_start.judging(episode, rng), episode.task
        words = text(lesson)
        right = "Action: click" in words
        asked = [item for item in task.candidates if f"Reason: try this.\nItem: {episode.titles[item]}" in words]
        assert asked and (asked == [task.target]) == right
        assert learned(lesson).startswith("Reason: that is what" if right else "Reason: not what")
        rights += right
    assert 20 < rights < 40


def test_batches_are_the_same_in_every_run_of_a_seed() -> None:
    settings: dict[str, Any] = {"num_steps": 3, "finding_steps": 1, "batch_size": 4}
    assert list(teacher(**settings).batches()) == list(teacher(**settings).batches())


def test_the_whole_warm_start_trains_grows_its_lists_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random model has a loss of 6 nats; a bound above that lets its lists grow all the same."""
    monkeypatch.setattr(warm_start, "FOUND", 100.0)
    monkeypatch.setattr("coars_fast.progress.QUIET_SECONDS", -1.0)  # a line for every step
    dataset, sasrec = world()
    config = tiny.tiny_config(sft=SFTConfig(num_steps=24, finding_steps=22, batch_size=2, learning_rate=3e-2))
    decoder = tiny.random_decoder(adapters=False)
    before = decoder.head_weight.detach().clone()
    warm_start.warm_start(decoder, TaskSource(dataset, config, sasrec), new_episode, config, Screen())
    lines = capsys.readouterr().out.splitlines()
    expected = ["lists of 3"] * 9 + ["lists of 4"] * 10 + ["lists of 5"] * 3 + ["conversations"] * 2
    assert [re.sub(r", loss \d+\.\d{3}$", "", line) for line in lines] == [
        f"warm start {n}/24 {stage}" for n, stage in enumerate(expected, start=1)
    ]
    losses = [float(line.rpartition(" ")[2]) for line in lines]
    assert np.mean(losses[17:22]) < np.mean(losses[:5]) and not torch.equal(decoder.head_weight, before)


# -------------------------------------------------------------------------------------------------------- conversations


def conversations(count: int = 80, **game: Any) -> list[tuple[Episode, list[tuple[int, Lesson]]]]:
    """Scripted episodes with their lessons."""
    teaching, space, found = teacher(), ItemSpace(world()[1]), []
    for n, task in enumerate(teaching.tasks.warm_start_tasks(0, count)):
        episode = new_episode(task, **game)
        found.append((episode, conversation(episode, space, np.random.default_rng([2, n]))))
    return found


def test_a_conversation_ends_with_the_truth() -> None:
    turns: Counter[int] = Counter()
    for episode, lessons in conversations():
        assert episode.waiting is None and [agent for agent, _ in lessons] == [RECOMMENDER, USER]
        assert [turn.hit for turn in episode.turns] == [False] * (len(episode.turns) - 1) + [True]
        assert all(turn.item in episode.task.candidates for turn in episode.turns)
        turns[len(episode.turns)] += 1
    assert set(turns) == {1, 2} and 25 < turns[2] < 55, "a wrong item first in half of them"
    assert {len(episode.turns) for episode, _ in conversations(30, max_turns=1)} == {1}


def test_a_recommender_names_an_item_because_of_the_one_most_like_it_in_the_history() -> None:
    places: Counter[int] = Counter()
    for episode, _ in conversations():
        history = episode.task.history
        for turn in episode.turns:
            said = re.fullmatch(r"Reason: likes (.+)\.\nItem: (.+)", turn.rec_text)
            assert said and turn.item is not None and episode.titles[turn.item] == said[2]
            like = [alike()[turn.item, item] for item in history]
            assert number(said[1]) == history[int(np.argmax(like))]
            places[int(np.argmax(like))] += 1
    assert set(places) == {0, 1, 2, 3}, "not always the latest"


def test_the_user_takes_the_truth_and_turns_others_down() -> None:
    actions: Counter[str] = Counter()
    for episode, _ in conversations():
        for turn in episode.turns:
            judgement = parse_judgement(turn.user_text)
            assert judgement is not None and not judgement.clamped
            assert turn.user_text.startswith("Reason: that is what I want." if turn.hit else "Reason: not what I want.")
            assert judgement.positive == turn.hit
            assert (judgement.action == "click") == turn.hit and judgement.action != "star"
            actions[judgement.action] += 1
    assert actions["click"] == 80 and min(actions["skip"], actions["dislike"]) > 8


def test_judgements_by_hand() -> None:
    rng = np.random.default_rng(0)
    right = Counter(warm_start.judgement_text(True, rng) for _ in range(200))
    assert set(right) == {f"Reason: that is what I want.\nAction: click\nScore: {s}" for s in ("0.85", "0.90", "0.95")}
    wrong = Counter(warm_start.judgement_text(False, rng) for _ in range(400))
    assert set(wrong) == {
        f"Reason: not what I want.\nAction: {action}\nScore: {score}"
        for action, scores in (("skip", ("0.30", "0.35", "0.40")), ("dislike", ("0.05", "0.10", "0.15")))
        for score in scores
    }
    assert sum(n for reply, n in wrong.items() if "skip" in reply) == pytest.approx(200, abs=40)


def test_a_view_teaches_all_of_the_users_replies_and_the_recommenders_right_one() -> None:
    after_reference = 0
    for episode, ((_, recommender), (_, user)) in conversations():
        last = episode.turns[-1]
        if recommender.tokens != episode.views[RECOMMENDER].tokens:
            # The last replies alone, after what hindsight says.
            after_reference += 1
            assert "Note: " in text(recommender) and "Note: " in text(user)
            assert (learned(recommender), learned(user)) == (last.rec_text, last.user_text)
            continue
        assert user.tokens == episode.views[USER].tokens
        assert learned(recommender) == last.rec_text, "a wrong recommendation is not learned"
        assert learned(user) == "".join(turn.user_text for turn in episode.turns)
        end = tiny.tokens()[1].end_of_turn
        closed = [token for token, answer in zip(user.tokens, user.is_answer, strict=True) if answer].count(end)
        assert closed == len(episode.turns), "where a reply ends is learned too"
    assert 5 < after_reference < 30, "one in five"


def popular_conversations(count: int = 120) -> list[tuple[Episode, list[tuple[int, Lesson]], int]]:
    """Conversations in which the fourth candidate counts as popular."""
    space, found = ItemSpace(world()[1]), []
    for n, task in enumerate(teacher().tasks.warm_start_tasks(0, count)):
        episode = new_episode(task)
        found.append((episode, conversation(episode, space, np.random.default_rng([2, n]), 3), 3))
    return found


def test_a_recommender_that_follows_fashion_says_so_and_learns_it() -> None:
    after_reference = 0
    for episode, lessons, popular in popular_conversations():
        last = episode.turns[-1]
        (_, recommender), (_, user) = lessons
        if text(recommender).count(warm_start.POPULAR) == 0:  # the last reply follows a reference: the truth is named
            assert last.hit
            after_reference += 1
            continue
        assert last.item == episode.task.candidates[popular] and last.rec_text.startswith("Reason: likes what is pop")
        assert warm_start.POPULAR in learned(recommender) and learned(recommender).count("Reason:") == 1
        assert learned(user).count("Action:") == len(episode.turns)
        assert ("click" in learned(user)) == last.hit
    assert 10 < after_reference < 40


def test_how_often_the_recommender_follows_fashion_is_a_setting() -> None:
    said = {}
    for rate in (0.0, 0.7, 1.0):
        teaching = teacher(num_steps=1, finding_steps=0, batch_size=64, popular_rate=rate)
        (lessons, _), *_ = teaching.batches()
        said[rate] = sum(warm_start.POPULAR in text(lesson) for lesson in lessons[::2]) / 64
    assert said[0.0] == 0.0 and 0.4 < said[0.7] < 0.7 < said[1.0] < 1.0, "one in five follows a reference"


def test_what_is_popular_was_taken_most_often_in_the_training_part() -> None:
    teaching = teacher(popular_rate=1.0)
    counts = Counter(item for part in teaching.tasks.split.train_sequences for item in part)
    for task in teaching.tasks.warm_start_tasks(0, 20):
        choice = teaching._popular_choice(task, np.random.default_rng(0))
        assert choice is not None
        assert counts[task.candidates[choice]] == max(counts[item] for item in task.candidates)
