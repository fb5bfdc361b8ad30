"""The truth stays out of what a student or an evaluation sees; a reference stays out of every view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from coars_fast.config import Config, GameConfig, LossConfig, TrainConfig
from coars_fast.config_checks import check
from coars_fast.errors import ConfigError
from coars_fast.game.episode import RECOMMENDER, USER, Episode, judgement_prompt
from coars_fast.game.reference import branch, diagnosis_prompts, reference_text, write_reference
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


# ---------------------------------------------------------------------------------------------------- other references


def test_the_truth_alone_says_neither_verdict_nor_answer() -> None:
    brief, full = never_found("brief"), never_found("full")
    texts = [
        [reference_text([episode], 0, episode.turns[0], agent, "truth") for agent in (RECOMMENDER, USER)]
        for episode in (brief, full)
    ]
    assert texts[0] == ["Note: the user took Delta", "Note: dislike."]
    assert texts[1] == [
        "Hindsight, for this answer only. The item that the user took next is 2. Delta.",
        "Hindsight, for this answer only. The right action is dislike.",
    ]


def of_user(user: int, target: int, *replies: str) -> Episode:
    episode = an_episode(GameConfig(max_turns=2), task=replace(TASK, user=user, target=target))
    for text in replies:
        episode.receive(say(episode, text))
    assert episode.waiting is None
    return episode


def test_another_users_reference_is_that_of_the_same_turn_of_the_next_one_who_has_it() -> None:
    accepted = (recommend("Gamma"), judge("click", "0.90"))
    silent = ("no item", "no item")
    turned_down = (recommend("Omega"), judge("skip", "0.30"), recommend("Gamma"), judge("skip", "0.30"))
    episodes = [of_user(0, 2, *accepted), of_user(0, 3, *turned_down), of_user(1, 3, *silent), of_user(2, 4, *accepted)]
    found = [
        [reference_text(episodes, number, turn, agent, "other_user") for turn in episodes[number].turns]
        for number, agent in ((0, RECOMMENDER), (0, USER), (1, RECOMMENDER), (1, USER), (3, USER))
    ]
    assert found == [
        ["Note: wrong, the user took Delta"],  # of user 1: episode 1 is about user 0 as well
        ["Note: the user did not take Gamma, so dislike."],  # of user 2: nobody asked user 1
        ["Note: wrong, the user took Delta"] * 2,
        ["Note: the user did not take Gamma, so dislike."] * 2,  # the only turn there is
        ["Note: the user took Gamma, so click."],
    ]
    assert reference_text(episodes[:2], 0, episodes[0].turns[0], USER, "other_user") == ""


def test_trajectories_take_the_reference_that_is_set() -> None:
    def references(kind: Any) -> list[str]:
        episodes = [
            of_user(0, 3, recommend("Delta"), judge("click", "0.90")),
            never_found("brief", replace(TASK, user=1)),
        ]
        header = len(episodes[0].template.headers["assistant"])
        found = trajectories(episodes, GameConfig(max_turns=2, reference=kind))
        return [episodes[0].codec.decode(turn.reference[:-header]) for t in found for turn in t.turns]

    assert references("empty") == [""] * 6
    assert [text.count("Note: the user took Delta") for text in references("truth")] == [1, 0, 1, 1, 0, 0]
    own, other = references("template"), references("other_user")
    assert "Note: right" in own[0] and "Note: wrong" in other[0]
    assert "Note: wrong" in own[2] and "Note: right" in other[2]


def test_references_that_could_do_nothing_are_refused() -> None:
    for game, loss, train in (
        (GameConfig(reference="truth"), LossConfig(credit_weight=0.0), TrainConfig()),
        (GameConfig(reference="other_user"), LossConfig(), TrainConfig(episodes_per_step=8, group_size=8)),
        (GameConfig(reference="empty"), LossConfig(credit_form="gated"), TrainConfig()),
        (GameConfig(reference="empty", rewards="none"), LossConfig(), TrainConfig()),
    ):
        with pytest.raises(ConfigError, match="^game.reference: "):
            check(Config(game=game, loss=loss, train=train))


@PROMPTS
def test_a_diagnosis_is_asked_about_a_reply_with_the_template_after_it(prompts: Any) -> None:
    episode = never_found(prompts)
    for agent in (RECOMMENDER, USER):
        found = diagnosis_prompts(episode, agent)
        assert [turn.number for turn, _ in found] == [1, 2]
        for (turn, prompt), span in zip(found, episode.views[agent].spans, strict=True):
            said = episode.views[agent].tokens[: span.end]
            assert prompt[: len(said)] == said and prompt[-len(HEADER) :] == HEADER
            asked = episode.codec.decode(prompt[len(said) : -len(HEADER)])
            assert write_reference(episode, turn, agent) in asked
    unclosed = an_episode(GameConfig(max_turns=1))
    unclosed.receive(say(unclosed, recommend("Gamma"), ended=False))
    ((_, prompt),) = diagnosis_prompts(unclosed, RECOMMENDER)
    end = list(unclosed.template.end)
    assert prompt[unclosed.views[RECOMMENDER].spans[0].end :][: len(end)] == end
    assert diagnosis_prompts(unclosed, USER) == []


HEADER = list(never_found("brief").template.headers["assistant"])


def test_a_diagnosis_joins_the_template_and_no_view() -> None:
    episode = never_found("brief")
    first, second = episode.turns
    first.diagnoses[RECOMMENDER] = "I overlooked Alpha."
    texts = [reference_text([episode], 0, turn, RECOMMENDER, "diagnosis") for turn in (first, second)]
    assert texts == ["Note: wrong, the user took Delta\nI overlooked Alpha.", "Note: wrong, the user took Delta"]
    full = never_found("full")
    full.turns[0].diagnoses[USER] = "Too kind."
    text = reference_text([full], 0, full.turns[0], USER, "diagnosis")
    assert text.endswith("Action: dislike\n\nWhat was wrong or right about the answer given: Too kind.")
    (trajectory, _) = trajectories([episode], GameConfig(max_turns=2, reference="diagnosis"))
    references = [episode.codec.decode(turn.reference) for turn in trajectory.turns]
    assert ["I overlooked Alpha." in text for text in references] == [True, False]
    assert "overlooked" not in episode.codec.decode(trajectory.tokens)
