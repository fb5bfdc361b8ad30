"""The synthetic world and the scripted pair that `tiny_base` imitates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from coars_fast.config import GameConfig, WorldConfig
from coars_fast.data.records import Lesson
from coars_fast.data.world import GENRES, KINDS, MAX_ITEMS, NOUNS, STYLES, draw_titles, fashion, kind, make_world
from coars_fast.errors import ConfigError
from coars_fast.game import personas
from coars_fast.game.lessons import Curriculum, LessonMaker
from coars_fast.game.prompts import last_field, parse_judgement, parse_recommendation
from coars_fast.game.template import TextCodec, make_template
from coars_fast.model.tokenizer import train_tokenizer

SMALL = WorldConfig(num_items=300, num_users=60, interactions_per_user=16, seed=3)


def test_a_seed_makes_a_world_and_another_seed_another_one() -> None:
    assert make_world(SMALL) == make_world(SMALL)
    other = make_world(replace(SMALL, seed=4))
    assert other.sequences != make_world(SMALL).sequences
    assert set(other.titles) != set(make_world(SMALL).titles)


def test_titles_are_unique_and_show_style_and_genre() -> None:
    world = make_world(SMALL)
    assert len(set(world.titles)) == SMALL.num_items
    for title in world.titles:
        style, genre = kind(title)
        assert style in STYLES and genre in GENRES
        assert 0 < fashion(title) <= 1
        compound, noun = title.split(" ")
        assert compound in KINDS and noun in NOUNS


@pytest.mark.parametrize(
    ("title", "style", "genre", "popular"),
    [
        ("Softstar Diary", "calm", "space", 1.0),  # the first stem of each kind
        ("Softstar Mirror", "calm", "space", 1.0),  # the noun says nothing
        ("Hushcomet Letters", "calm", "space", 0.25),  # 1 / (1 + 2 + 1)
        ("Bleakheist Road", "dark", "crime", 0.5),
        ("Sillymoss House", "funny", "nature", 0.5),
        ("Crookgoal Club", "odd", "sport", 0.25),
        ("Titansong Code", "epic", "music", 1 / 3),
    ],
)
def test_a_compound_means_a_style_and_a_genre_and_its_stems_stand_in_order_of_fashion(
    title: str, style: str, genre: str, popular: float
) -> None:
    assert kind(title) == (style, genre)
    assert fashion(title) == pytest.approx(popular)


def test_every_title_that_can_be_drawn_is_named_by_itself_alone() -> None:
    titles = draw_titles(MAX_ITEMS, np.random.default_rng(0))
    assert len(set(titles)) == MAX_ITEMS == 150 * 12  # 5 styles of 3 stems, 5 genres of 2, 12 nouns
    assert all(parse_recommendation(f"Item: {title}", titles) == n for n, title in enumerate(titles))
    assert not any(";" in title or any(c.isdigit() for c in title) for title in titles)


def test_histories_follow_a_taste_and_take_nothing_twice() -> None:
    world = make_world(SMALL)
    shares = []
    for sequence in world.sequences:
        assert len(set(sequence)) == SMALL.interactions_per_user
        kinds = [kind(world.titles[i]) for i in sequence]
        shares.append(max(kinds.count(k) for k in kinds) / len(kinds))
    # MATCH_RATES[0] = .76 of a user's items are of the user's own kind, as far as the catalogue lasts.
    assert 0.55 < float(np.mean(shares)) < 0.85


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_items": 9}, "num_items"),
        ({"interactions_per_user": 200}, "interactions"),
        ({"num_users": 1}, "num_users"),
    ],
)
def test_a_world_that_cannot_be_is_an_error_that_names_the_setting(change: dict[str, int], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        make_world(replace(SMALL, **change))


HISTORY = [
    "Softstar Diary", "Stillcomet Club", "Grimstar Code", "Hushheist Road", "Stillstar Winter", "Softcomet Papers",
]  # fmt: skip
CANDIDATES = ["Grimcomet House", "Hushcomet Letters", "Softgoal Mirror", "Sillyriver Island", "Grandstar Garden"]


def test_the_scripted_recommender_knows_the_taste_and_follows_fashion_most_of_the_time() -> None:
    rng = np.random.default_rng(0)
    assert personas.taste(HISTORY) == ("calm", "space")
    replies = [personas.recommend(HISTORY, CANDIDATES, set(), rng) for _ in range(400)]
    named = [parse_recommendation(reply, CANDIDATES) for reply in replies]
    # Calm and about space: only "Hushcomet Letters". By fashion within space: "Grandstar Garden", of two first stems.
    assert set(named) == {1, 4}
    assert abs(named.count(4) / 400 - personas.POPULAR_RATE) < 0.08
    assert set(replies) == {
        "Reason: likes calm space.\nItem: Hushcomet Letters", "Reason: likes popular space.\nItem: Grandstar Garden",
    }  # fmt: skip


def test_the_scripted_recommender_avoids_what_it_tried() -> None:
    rng = np.random.default_rng(0)
    reply = personas.recommend(HISTORY, CANDIDATES, {"Hushcomet Letters"}, rng, popular_rate=0.0)
    assert parse_recommendation(reply, CANDIDATES) not in (None, 1)


def test_the_scripted_user_judges_too_leniently() -> None:
    rng = np.random.default_rng(0)

    def accepted(title: str) -> float:
        judged = [parse_judgement(personas.judge(HISTORY, title, rng)) for _ in range(300)]
        return sum(j is not None and j.positive for j in judged) / 300

    assert accepted("Hushcomet Letters") > 0.9
    assert accepted("Grimcomet House") > 0.5, "a title that fits in part is mostly accepted: the fault to unlearn"
    assert accepted("Sillyriver Island") > 0.3


@pytest.fixture(scope="module")
def maker() -> LessonMaker:
    codec = TextCodec(train_tokenizer(["Reason: likes calm space.\nItem: Softstar Diary", *HISTORY], 320))
    return LessonMaker(codec, make_template(codec), GameConfig())


@pytest.mark.parametrize(("number", "progress"), [(1, 0.0), (1, 0.3), (1, 1.0), (2, 0.5), (3, 0.5)])
def test_every_kind_of_lesson_marks_answers_that_have_a_context(
    maker: LessonMaker, number: int, progress: float
) -> None:
    rng = np.random.default_rng(1)
    kinds = Curriculum(maker).lessons(number, progress)
    assert sum(weight for weight, _ in kinds) == pytest.approx(1.0)
    for weight, draw in kinds:
        assert weight >= 0
        for lesson in draw(rng):
            assert len(lesson.tokens) == len(lesson.is_answer)
            assert any(lesson.is_answer) and not lesson.is_answer[0]


def test_lists_grow_with_success_and_conversations_begin_once_everything_is_found(maker: LessonMaker) -> None:
    curriculum = Curriculum(maker)
    talk = len(Curriculum(maker).first_round(1.0))
    for _ in range(20):
        before = curriculum.longest
        curriculum.grow(0.5)
        assert curriculum.longest == before, "too little was found"
        assert len(curriculum.first_round(0.1)) < talk
    assert len(curriculum.first_round(0.9)) == talk, "late enough, they begin all the same"
    for longest in range(4, maker.num_candidates + 1):
        curriculum.grow(0.9)
        assert curriculum.longest == longest
        assert len(curriculum.first_round(0.1)) < talk
    curriculum.grow(0.9)
    assert curriculum.longest == maker.num_candidates
    assert len(curriculum.first_round(0.1)) == talk


def learned_pieces(maker: LessonMaker, lesson: Lesson) -> list[str]:
    """The runs of tokens that a lesson teaches, as text."""
    runs: list[list[int]] = [[]]
    for token, answer in zip(lesson.tokens, lesson.is_answer, strict=True):
        if answer:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [maker.codec.decode(run) for run in runs if run]


def last_line_with(start: str, text: str) -> str:
    return [line for line in text.split("\n") if line.startswith(start)][-1]


def listed_titles(text: str) -> list[str]:
    return text.partition("Candidates: ")[2].partition("\n")[0].split("; ")


@pytest.mark.parametrize("seed", range(4))
def test_a_list_lesson_learns_the_first_listed_title_that_fits(maker: LessonMaker, seed: int) -> None:
    lesson = maker.retrieval(np.random.default_rng(seed), 7)
    text = maker.codec.decode(lesson.tokens)
    titles = listed_titles(text)
    assert len(titles) == len(set(titles)) == 7
    answers = text.partition("assistant\n")[2].removesuffix(";").split(";")
    assert len(answers) == 10
    for answer in answers:
        query, _, title = answer.partition(":")
        assert title.strip() == next(t for t in titles if set(query.split()) <= set(kind(t)))
    assert learned_pieces(maker, lesson) == [*(answer.partition(":")[2] for answer in answers), ""]


@pytest.mark.parametrize("seed", range(4))
def test_a_recommending_lesson_learns_titles_in_the_words_of_a_reply(maker: LessonMaker, seed: int) -> None:
    lesson = maker.recommending(np.random.default_rng(seed), 7)
    text = maker.codec.decode(lesson.tokens)
    titles = listed_titles(text)
    replies = text.partition("assistant\n")[2].rstrip().split("\nReason:")
    named = [parse_recommendation(reply, titles) for reply in replies]
    assert len(replies) == 6 and None not in named
    for reply, index in zip(replies, named, strict=True):
        style, genre = reply.partition("likes ")[2].partition(".")[0].split()
        assert index is not None
        fashionable = max(fashion(t) for t in titles if kind(t)[1] == genre)
        assert kind(titles[index])[1] == genre
        assert kind(titles[index])[0] == style or (style == "popular" and fashion(titles[index]) == fashionable)
    assert learned_pieces(maker, lesson) == [*(f" {titles[n]}" for n in named if n is not None), ""]


def test_a_conversation_lesson_learns_exactly_the_replies(maker: LessonMaker) -> None:
    kinds = set()
    for seed in range(8):
        for lesson in maker.conversation(np.random.default_rng(seed)):
            learned = [t for t, answer in zip(lesson.tokens, lesson.is_answer, strict=True) if answer]
            text = maker.codec.decode(learned)
            assert text.startswith("Reason:")
            assert ("Action:" in text) != ("Item:" in text), "either the user's replies or the recommender's"
            kinds.add("Item:" in text)
            if "Item:" in text:
                titles = listed_titles(maker.codec.decode(lesson.tokens))
                assert len(titles) == maker.num_candidates
                replies = ["Reason:" + reply for reply in text.split("Reason:")[1:]]
                assert all(last_field(reply, "Item") in titles for reply in replies)
    assert kinds == {True, False}


def test_a_reference_lesson_shows_the_truth_before_the_reply(maker: LessonMaker) -> None:
    lessons = [maker.reference(np.random.default_rng(seed)) for seed in range(20)]
    answered = {"Item": 0, "Action": 0}
    for lesson in lessons:
        note = last_line_with("Note:", maker.codec.decode(lesson.tokens))
        (answer,) = learned_pieces(maker, lesson)
        item, action = last_field(answer, "Item"), last_field(answer, "Action")
        if item is not None:
            assert note.endswith(f", the user took {item}")
        else:
            assert note.endswith(f", so {action}.")
        answered["Action" if item is None else "Item"] += 1
    assert min(answered.values()) > 0
