"""The truth stays out of what a student or an evaluation sees; a reference stays out of every view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from coars_fast.config import GameConfig
from coars_fast.game.episode import RECOMMENDER, USER, Episode, judgement_prompt
from coars_fast.game.reference import branch, write_reference
from coars_fast.game.trajectory import trajectories
from tests.game_pieces import TASK, TITLES, an_episode, family, judge, recommend, say

TRUTH = TITLES[TASK.target]
PROMPTS: Any = pytest.mark.parametrize("prompts", ["brief", "full"])


def never_found(prompts: Any, task: Any = TASK) -> Episode:
    """Two turns in which nobody says the held-out item."""
    episode = an_episode(GameConfig(max_turns=2, prompts=prompts), task=task)
    first, second = ("1. Gamma", "3. Omega") if prompts == "full" else ("Gamma", "Omega")
    for text in (recommend(first), judge("star", "0.60"), recommend(second), judge("dislike", "0.10")):
        episode.receive(say(episode, text))
    assert [turn.item for turn in episode.turns] == [2, 4]
    return episode


def holds(tokens: Sequence[int], part: Sequence[int]) -> bool:
    return any(list(tokens[i : i + len(part)]) == list(part) for i in range(len(tokens) - len(part) + 1))


@PROMPTS
def test_the_held_out_title_is_one_candidate_among_others_and_nothing_else(prompts: Any) -> None:
    episode = never_found(prompts)
    rec, user = (episode.codec.decode(view.tokens) for view in episode.views)
    listed = {"brief": "Gamma; Delta; Omega", "full": "1. Gamma\n2. Delta\n3. Omega"}[prompts]
    assert rec.count(TRUTH) == 1 and f"{listed}\nassistant\n" in rec
    assert TRUTH not in user


@PROMPTS
def test_a_held_out_item_that_is_no_candidate_is_shown_to_nobody(prompts: Any) -> None:
    episode = never_found(prompts, replace(TASK, candidates=(2, 1, 4)))
    assert all(TRUTH not in episode.codec.decode(view.tokens) for view in episode.views)


@PROMPTS
def test_views_do_not_depend_on_which_candidate_is_the_truth(prompts: Any) -> None:
    episodes = [never_found(prompts, replace(TASK, target=target)) for target in (2, 3, 4)]
    for agent in (RECOMMENDER, USER):
        first, second, third = (episode.views[agent].tokens for episode in episodes)
        assert first == second == third


@PROMPTS
def test_references_hold_the_truth_and_are_in_no_view(prompts: Any) -> None:
    episode = never_found(prompts)
    for turn in episode.turns:
        assert TRUTH in write_reference(episode, turn, RECOMMENDER)
        for agent in (RECOMMENDER, USER):
            text = write_reference(episode, turn, agent)
            hint = episode.codec.encode(text.split("\n")[0])
            for view in episode.views:
                assert text not in episode.codec.decode(view.tokens)
                assert not holds(view.tokens, hint)
    for trajectory in trajectories([episode], episode.config):
        for turn in trajectory.turns:
            assert not holds(trajectory.tokens, turn.reference)


@PROMPTS
def test_a_question_about_one_item_does_not_say_whether_the_user_took_it(prompts: Any) -> None:
    codec, template = family("chatml")
    game = GameConfig(prompts=prompts)
    text = codec.decode(judgement_prompt(TASK.history, 4, TITLES, 2, 5, codec, template, game))
    assert "Omega" in text
    assert not any(title in text for title in ("Gamma", "Delta"))


def test_the_user_reference_says_what_the_right_answer_was() -> None:
    episode = an_episode(GameConfig(max_turns=2))
    for text in (recommend("Gamma"), judge("star", "0.60"), recommend("Delta"), judge("skip", "0.30")):
        episode.receive(say(episode, text))
    first, second = (write_reference(episode, turn, USER) for turn in episode.turns)
    assert first == "Note: the user did not take Gamma, so dislike."
    assert second == "Note: the user took Delta, so click."


def test_a_truth_that_is_no_candidate_is_named_without_a_number() -> None:
    task = replace(TASK, candidates=(2, 1, 4))
    episode = never_found("full", task)
    text = write_reference(episode, episode.turns[0], RECOMMENDER)
    assert text.endswith("the user took next is Delta. A correct answer ends with:\nItem: Delta")
    episode = never_found("brief", task)
    assert write_reference(episode, episode.turns[0], RECOMMENDER) == "Note: wrong, the user took Delta"


def test_a_truth_among_the_candidates_is_named_as_the_prompts_name_items() -> None:
    episode = never_found("brief")
    assert write_reference(episode, episode.turns[0], RECOMMENDER) == "Note: wrong, the user took Delta"
    episode = never_found("full")
    text = write_reference(episode, episode.turns[0], RECOMMENDER)
    assert text.endswith(
        "It was wrong: the item that the user took next is 2. Delta. A correct answer ends with:\nItem: 2. Delta"
    )


def test_the_full_reference_holds_the_transcript() -> None:
    episode = never_found("full")
    assert recommend("1. Gamma") in write_reference(episode, episode.turns[0], RECOMMENDER)
    assert judge("star", "0.60") in write_reference(episode, episode.turns[0], USER)


@pytest.mark.parametrize("of_family", ["chatml", "qwen3", "llama3", "plain"])
def test_an_empty_reference_leaves_the_teacher_with_what_the_student_saw(of_family: str) -> None:
    episode = an_episode(GameConfig(max_turns=1), of_family=of_family)
    for text in (recommend("Gamma"), judge("star", "0.60")):
        episode.receive(say(episode, text))
    assert branch(episode, episode.turns[0], RECOMMENDER) != list(episode.template.headers["assistant"])
    episode.prompts = replace(episode.prompts, reference_rec="", reference_user="")
    for agent in (RECOMMENDER, USER):
        (span,) = episode.views[agent].spans
        tokens = episode.views[agent].tokens
        assert branch(episode, episode.turns[0], agent) == list(episode.template.headers["assistant"])
        assert tokens[: span.fork] + branch(episode, episode.turns[0], agent) == tokens[: span.start]


def test_a_branch_is_a_system_message_and_the_header_of_the_reply() -> None:
    episode = never_found("brief")
    template, text = episode.template, write_reference(episode, episode.turns[0], USER)
    assert branch(episode, episode.turns[0], USER) == [
        *template.headers["system"], *episode.codec.encode(text), *template.end, *template.headers["assistant"],
    ]  # fmt: skip
