"""The synthetic world and the scripted pair that `tiny_base` imitates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from coars_fast.config import GameConfig, WorldConfig
from coars_fast.data.world import GENRES, STYLES, fashion, kind, make_world
from coars_fast.errors import ConfigError
from coars_fast.game import personas
from coars_fast.game.lessons import Curriculum, LessonMaker
from coars_fast.game.prompts import parse_judgement, parse_recommendation
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


HISTORY = ["Gentle Galaxy", "Quiet Comet", "Grim Orbit", "Serene Heist", "Still Rocket", "Mellow Planet"]
CANDIDATES = ["Grim Comet", "Tender Nebula", "Mellow Boxer", "Silly Forest", "Mighty Galaxy"]


def test_the_scripted_recommender_knows_the_taste_and_follows_fashion_most_of_the_time() -> None:
    rng = np.random.default_rng(0)
    assert personas.taste(HISTORY) == ("calm", "space")
    replies = [personas.recommend(HISTORY, CANDIDATES, set(), rng) for _ in range(400)]
    named = [parse_recommendation(reply, CANDIDATES) for reply in replies]
    # Calm and about space: only "Tender Nebula". By fashion within space: "Mighty Galaxy", the first of both its lists.
    assert set(named) == {1, 4}
    assert abs(named.count(4) / 400 - personas.POPULAR_RATE) < 0.08


def test_the_scripted_recommender_avoids_what_it_tried() -> None:
    rng = np.random.default_rng(0)
    reply = personas.recommend(HISTORY, CANDIDATES, {"Tender Nebula"}, rng, popular_rate=0.0)
    assert parse_recommendation(reply, CANDIDATES) not in (None, 1)


def test_the_scripted_user_judges_too_leniently() -> None:
    rng = np.random.default_rng(0)

    def accepted(title: str) -> float:
        judged = [parse_judgement(personas.judge(HISTORY, title, rng)) for _ in range(300)]
        return sum(j is not None and j.positive for j in judged) / 300

    assert accepted("Tender Nebula") > 0.9
    assert accepted("Grim Comet") > 0.5, "a title that fits in part is mostly accepted: the fault to unlearn"
    assert accepted("Silly Forest") > 0.3


@pytest.fixture(scope="module")
def maker() -> LessonMaker:
    codec = TextCodec(train_tokenizer(["Reason: likes calm space.\nItem: 4. Gentle Galaxy", *HISTORY], 320))
    return LessonMaker(codec, make_template(codec), GameConfig())


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_every_kind_of_lesson_marks_answers_that_have_a_context(maker: LessonMaker, progress: float) -> None:
    rng = np.random.default_rng(1)
    for weight, draw in Curriculum(maker).kinds(progress):
        assert weight >= 0
        for lesson in draw(rng):
            assert len(lesson.tokens) == len(lesson.is_answer)
            assert any(lesson.is_answer) and not lesson.is_answer[0]


def test_lists_grow_with_success_and_conversations_begin_once_everything_is_found(maker: LessonMaker) -> None:
    curriculum = Curriculum(maker)
    talk = len(Curriculum(maker).kinds(1.0))
    for _ in range(20):
        before = curriculum.longest
        curriculum.grow(0.5, 0.0)
        assert curriculum.longest == before, "too little was found"
        assert len(curriculum.kinds(0.1)) < talk
    for _ in range(maker.num_candidates):
        curriculum.grow(0.9, 1.0)
    assert curriculum.longest == maker.num_candidates
    assert len(curriculum.kinds(0.1)) == talk


def test_a_conversation_lesson_learns_exactly_the_replies(maker: LessonMaker) -> None:
    kinds = set()
    for seed in range(8):
        for lesson in maker.conversation(np.random.default_rng(seed)):
            learned = [t for t, answer in zip(lesson.tokens, lesson.is_answer, strict=True) if answer]
            text = maker.codec.decode(learned)
            assert text.startswith("Reason:")
            assert ("Action:" in text) != ("Item:" in text), "either the user's replies or the recommender's"
            kinds.add("Item:" in text)
    assert kinds == {True, False}


def test_a_reference_lesson_shows_the_truth_before_the_reply(maker: LessonMaker) -> None:
    texts = [maker.codec.decode(maker.reference(np.random.default_rng(seed)).tokens) for seed in range(20)]
    assert all("Note:" in text for text in texts)
