"""The synthetic world and the scripted pair that `tiny_base` imitates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from coars_fast.config import GameConfig, WorldConfig
from coars_fast.data.records import Lesson
from coars_fast.data.world import GENRES, KINDS, MAX_ITEMS, NOUNS, STYLES, draw_titles, fashion, kind, make_world
from coars_fast.errors import ConfigError
from coars_fast.game import lessons, personas
from coars_fast.game.lessons import Curriculum, LessonMaker
from coars_fast.game.prompts import BRIEF, last_field, parse_judgement, parse_recommendation
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
        ("Grandstar Diary", "epic", "space", 1.0),  # the first style, and the first stem of its genre
        ("Grandstar Kitchen", "epic", "space", 1.0),  # the noun says nothing
        ("Grandgoal Castle", "epic", "sport", 2 / 3),  # 1 / (1 + .5): the second stem
        ("Sillysong House", "funny", "music", 1 / 2),  # 1 / (1 + 1): the second style
        ("Sillymoss House", "funny", "nature", 2 / 5),
        ("Grimheist Road", "dark", "crime", 1 / 3),
        ("Strangerace Club", "odd", "sport", 1 / 4),
        ("Softstar Diary", "calm", "space", 1 / 5),
        ("Softcomet Letters", "calm", "space", 2 / 11),  # 1 / (1 + 4 + .5)
    ],
)
def test_a_compound_means_a_style_and_a_genre_and_styles_and_stems_stand_in_order_of_fashion(
    title: str, style: str, genre: str, popular: float
) -> None:
    assert kind(title) == (style, genre)
    assert fashion(title) == pytest.approx(popular)


def test_every_title_that_can_be_drawn_is_named_by_itself_alone() -> None:
    titles = draw_titles(MAX_ITEMS, np.random.default_rng(0))
    assert len(set(titles)) == MAX_ITEMS == 50 * 24  # 5 styles of one stem, 5 genres of 2, 24 nouns
    assert all(parse_recommendation(f"Item: {title}", titles, BRIEF) == n for n, title in enumerate(titles))
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
    "Softstar Diary", "Softcomet Club", "Grimstar Code", "Softheist Road", "Softstar Winter", "Softcomet Papers",
]  # fmt: skip
CANDIDATES = ["Grimcomet House", "Softcomet Letters", "Softgoal Mirror", "Sillyriver Island", "Grandstar Garden"]


def test_the_scripted_recommender_knows_the_taste_and_follows_fashion_most_of_the_time() -> None:
    rng = np.random.default_rng(0)
    assert personas.taste(HISTORY) == ("calm", "space")
    replies = [personas.recommend(HISTORY, CANDIDATES, set(), rng) for _ in range(400)]
    named = [parse_recommendation(reply, CANDIDATES, BRIEF) for reply in replies]
    # Calm and about space: only "Softcomet Letters". By fashion within space: "Grandstar Garden", of the first style.
    assert set(named) == {1, 4}
    assert abs(named.count(4) / 400 - personas.POPULAR_RATE) < 0.08
    assert set(replies) == {
        "Reason: likes calm space.\nItem: Softcomet Letters", "Reason: likes popular space.\nItem: Grandstar Garden",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        (["Softstar Club", "Strangestar Diary", "Grimcomet House"], 2),  # 2/7 of fashion, not 1/5 or 1/4
        (["Grimstar Club", "Sillycomet Diary", "Grandheist House"], 1),  # 2/5, not 1/3; 1 is no space
        (["Sillystar Club", "Sillycomet Diary", "Sillystar House"], 0),  # the first stem; of equals the first
        (["Softgoal Club", "Grimheist Diary", "Grandmoss House"], 2),  # none about space: fashion alone
    ],
)
def test_what_is_popular_goes_by_style_first_and_by_stem_then(candidates: list[str], expected: int) -> None:
    assert personas.choose(candidates, personas.POPULAR, "space", set()) == expected


def test_the_scripted_recommender_avoids_what_it_tried() -> None:
    rng = np.random.default_rng(0)
    reply = personas.recommend(HISTORY, CANDIDATES, {"Softcomet Letters"}, rng, popular_rate=0.0)
    assert parse_recommendation(reply, CANDIDATES, BRIEF) not in (None, 1)


def test_the_scripted_user_judges_too_leniently() -> None:
    rng = np.random.default_rng(0)

    def accepted(title: str) -> float:
        judged = [parse_judgement(personas.judge(HISTORY, title, rng)) for _ in range(300)]
        return sum(j is not None and j.positive for j in judged) / 300

    assert accepted("Softcomet Letters") > 0.9
    assert accepted("Grimcomet House") > 0.5, "a title that fits in part is mostly accepted: the fault to unlearn"
    assert accepted("Sillyriver Island") > 0.3


@pytest.fixture(scope="module")
def maker() -> LessonMaker:
    codec = TextCodec(train_tokenizer(["Reason: likes calm space.\nItem: Softstar Diary", *HISTORY], 320))
    return LessonMaker(codec, make_template(codec), GameConfig())


@pytest.mark.parametrize(("number", "progress"), [(1, 0.0), (1, 0.3), (1, 1.0), (2, 0.0), (2, 1.0)])
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
    named = [parse_recommendation(reply, titles, BRIEF) for reply in replies]
    assert len(replies) == 6 and None not in named
    for reply, index in zip(replies, named, strict=True):
        style, genre = reply.partition("likes ")[2].partition(".")[0].split()
        assert index is not None
        fashionable = max(fashion(t) for t in titles if kind(t)[1] == genre)
        assert kind(titles[index])[1] == genre
        assert kind(titles[index])[0] == style or (style == "popular" and fashion(titles[index]) == fashionable)
    assert learned_pieces(maker, lesson) == [*(f" {titles[n]}" for n in named if n is not None), ""]


LISTED = ["Softstar Diary", "Grandheist Road", "Grimstar Club"]
# What is right for every query, by hand: the genre counts most, then the style, then fashion (epic, dark, calm).
BEST_LISTED = {
    "calm space": "Softstar Diary", "dark space": "Grimstar Club", "popular space": "Grimstar Club",
    "epic space": "Grimstar Club", "funny space": "Grimstar Club", "odd space": "Grimstar Club",
    **{f"{style} crime": "Grandheist Road" for style in (*STYLES, personas.POPULAR)},
    **{
        f"{style} {genre}": title
        for genre in ("nature", "music", "sport")
        for style, title in {
            "calm": "Softstar Diary", "dark": "Grimstar Club", "epic": "Grandheist Road", "funny": "Grandheist Road",
            "odd": "Grandheist Road", personas.POPULAR: "Grandheist Road",
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize(("absent_rate", "popular_rate"), [(0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (1.0, 0.25)])
def test_a_recommending_lesson_may_ask_for_what_is_not_listed_and_learns_the_best_that_is(
    maker: LessonMaker, monkeypatch: pytest.MonkeyPatch, absent_rate: float, popular_rate: float
) -> None:
    monkeypatch.setattr(lessons, "draw_titles", lambda num_items, rng: LISTED[:num_items])
    rng, asked = np.random.default_rng(5), []
    for _ in range(60):
        lesson = maker.recommending(rng, 3, absent_rate=absent_rate, popular_rate=popular_rate)
        replies = maker.codec.decode(lesson.tokens).partition("assistant\n")[2].rstrip().split("\nReason:")
        queries = [reply.partition("likes ")[2].partition(".")[0] for reply in replies]
        assert learned_pieces(maker, lesson) == [*(f" {BEST_LISTED[query]}" for query in queries), ""]
        assert [last_field(reply, "Item") for reply in replies] == [BEST_LISTED[query] for query in queries]
        asked += queries
    assert len(asked) == 360
    own = {"calm space", "epic crime", "dark space"}
    pairs = {f"{style} {genre}" for style in STYLES for genre in GENRES}
    popular = {f"{personas.POPULAR} {genre}" for genre in GENRES}
    if absent_rate == 0:
        assert set(asked) == own
        return
    assert set(asked) == (pairs | popular if popular_rate else pairs)
    # Of the queries drawn from all 25 kinds, 22 of 25 are not on the list.
    absent = sum(query not in own | popular for query in asked) / 360
    assert absent == pytest.approx(absent_rate * (1 - popular_rate) * 22 / 25, abs=0.08)


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


def messages(maker: LessonMaker, lesson: Lesson) -> list[tuple[str, str, bool]]:
    """Role and text of every message of a lesson, and whether it is learned: as a whole or not at all."""
    start = maker.codec.vocab["<|im_start|>"]
    starts = [i for i, token in enumerate(lesson.tokens) if token == start]
    found = []
    for first, end in zip(starts, [*starts[1:], len(lesson.tokens)], strict=True):
        role, _, text = maker.codec.decode(lesson.tokens[first:end]).partition("\n")
        header, closing = len(maker.template.headers[role]), len(maker.template.end) - 1
        flags = lesson.is_answer[first + header : end - closing]
        assert len(set(flags)) == 1 and not any(lesson.is_answer[first : first + header])
        found.append((role, text.removesuffix("\n"), flags[0]))
    return found


def split_views(maker: LessonMaker, drawn: list[Lesson]) -> tuple[list[list[tuple[str, str, bool]]], ...]:
    """A conversation's lessons as messages: of the recommender's view and of the user's, each none or one."""
    views = [messages(maker, lesson) for lesson in drawn]
    return tuple([v for v in views if v[0][1].startswith(start)] for start in ("Recommend", "Judge"))


def test_an_invalid_recommendation_is_not_learned_and_is_followed_by_what_says_so(
    maker: LessonMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lessons, "INVALID_RATE", 1.0)  # then every random recommendation is an invalid one
    answered, last, valid = 0, 0, 0
    for seed in range(40):
        rec_views, user_views = split_views(maker, maker.conversation(np.random.default_rng(seed)))
        for view in rec_views:
            listed, judged = listed_titles(view[1][1]), 0
            assert [role for role, _, _ in view] == ["system", "user", *["assistant", "user"] * 3][: len(view)]
            for n in range(2, len(view), 2):
                _, text, learned = view[n]
                item = last_field(text, "Item")
                assert item is not None and " ".join(kind(item))  # a title of the world, in the right format
                assert learned == (item in listed)
                following = view[n + 1][1] if n + 1 < len(view) else None
                if learned:
                    judged, valid = judged + 1, valid + 1
                    assert following is None or parse_judgement(following) is not None
                else:
                    assert following in (None, "Invalid reply.")
                    answered, last = answered + (following is not None), last + (following is None)
            for user_view in user_views:  # the user never hears of it, and learns every reply
                heard = [last_field(text, "Item") for role, text, _ in user_view if role == "user"]
                assert len(heard) == judged and set(heard) <= set(listed)
                assert all(learned == (role == "assistant") for role, _, learned in user_view)
    assert answered > 5 and last > 0 and valid > 40


def test_few_recommendations_of_conversation_lessons_are_invalid_and_random_ones_are_the_users_lessons_only(
    maker: LessonMaker,
) -> None:
    counts = {"invalid": 0, "random": 0, "learned": 0}
    for seed in range(200):
        rec_views, _ = split_views(maker, maker.conversation(np.random.default_rng([7, seed])))
        for view in rec_views:
            listed = listed_titles(view[1][1])
            for _, text, learned in view[2::2]:
                invalid = last_field(text, "Item") not in listed
                assert not (invalid and learned)
                counts["invalid" if invalid else "learned" if learned else "random"] += 1
    total = sum(counts.values())
    # A quarter is random, of which a fifth is invalid; views without anything to learn are left out.
    assert 0.02 < counts["invalid"] / total < 0.08
    assert 0.12 < counts["random"] / total < 0.28


def test_a_reference_lesson_shows_the_truth_before_the_reply(maker: LessonMaker) -> None:
    answered = {"Item": 0, "Action": 0}
    for lesson in [maker.reference(np.random.default_rng(seed)) for seed in range(20)]:
        note = last_line_with("Note:", maker.codec.decode(lesson.tokens))
        (answer,) = learned_pieces(maker, lesson)
        item, action = last_field(answer, "Item"), last_field(answer, "Action")
        if item is not None:
            assert note.endswith(f", the user took {item}")
        else:
            assert note.endswith(f", so {action}.")
        answered["Action" if item is None else "Item"] += 1
    assert min(answered.values()) > 0
