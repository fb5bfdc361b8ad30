"""What agents are told of earlier sessions with the same user."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coars_fast.build import Parts, build
from coars_fast.config import GameConfig
from coars_fast.evaluate import evaluate
from coars_fast.game.episode import RECOMMENDER, USER, Episode, history_text
from coars_fast.game.memory import session_text
from coars_fast.memory import fresh_episodes
from coars_fast.progress import Screen
from tests import tiny
from tests.game_pieces import TASK, TITLES, an_episode, family, judge, recommend, say


def told(prompts: Any = "brief") -> str:
    episode = an_episode(GameConfig(max_turns=3, prompts=prompts))
    for text in ("what?", recommend("Gamma"), judge("skip", "0.30"), recommend("Delta"), "hm"):
        episode.receive(say(episode, text))
    return session_text(episode)


def test_a_session_is_told_by_its_items_its_answers_and_what_was_taken() -> None:
    assert told() == "\nBefore: no item, no answer; Gamma, skip; Delta, no answer; took Delta."
    assert told("full") == (
        "\n\nIn an earlier session: nothing was recommended, the answer was not given; Gamma was recommended, the "
        "answer was skip; Delta was recommended, the answer was not given. "
        "The item that the user then really took: Delta."
    )


@pytest.mark.parametrize("prompts", ["brief", "full"])
def test_memory_stands_behind_the_history_in_both_views_which_only_grow(prompts: Any) -> None:
    codec, template = family("chatml")
    game = GameConfig(max_turns=2, prompts=prompts)
    plain = Episode(TASK, TITLES, codec, template, game)
    episode = Episode(TASK, TITLES, codec, template, game, memory=told(prompts))
    header = len(template.headers["assistant"])
    for agent in (RECOMMENDER, USER):
        without, whole = (codec.decode(e.views[agent].tokens) for e in (plain, episode))
        history = history_text(TASK.history, TITLES, game)
        assert without.count(history) == 1 and whole == without.replace(history, history + told(prompts))
    name = "1. Gamma" if prompts == "full" else "Gamma"
    for text in (recommend(name), judge("skip", "0.30"), recommend(name), judge("skip", "0.30")):
        before = [list(view.tokens) for view in episode.views]
        episode.receive(say(episode, text))
        for old, view in zip(before, episode.views, strict=True):
            assert view.tokens[: len(old) - header] == old[: len(old) - header]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder: Path = tmp_path_factory.mktemp("memory")
    model = tiny.write_model(folder / "model", tiny.taught_decoder(adapters=False))
    config = tiny.tiny_config(game=GameConfig(max_turns=2, memory=2))
    config = replace(
        config,
        model=replace(config.model, path=str(model)),
        data=replace(config.data, train_targets=2),
    )
    return build(config, folder, Screen())


def memory_of(episode: Episode, agent: int) -> list[str]:
    lines = episode.codec.decode(episode.views[agent].tokens).split("\n")
    return [line.removeprefix("Before: ") for line in lines if line.startswith("Before: ")]


def test_earlier_sessions_are_about_what_was_taken_before_and_never_show_the_target(parts: Parts) -> None:
    sequences = parts.tasks.split.sequences
    for task in (*parts.tasks.eval_tasks, *parts.tasks.train_tasks(0)):
        at = sequences[task.user].index(task.target)
        earlier = parts.tasks.earlier_tasks(task, 2)
        assert [t.target for t in earlier] == list(sequences[task.user][at - 2 : at])
        assert parts.tasks.earlier_tasks(task, 2) == earlier
        for t in earlier:
            assert task.target not in (*t.history, *t.candidates) and t.target in t.candidates
            assert t.history == sequences[task.user][: sequences[task.user].index(t.target)][-tiny.HISTORY_LENGTH :]
        assert len(parts.tasks.earlier_tasks(task, 99)) == at - 1


def test_fresh_episodes_hold_the_sessions_in_order_and_are_the_same_again(parts: Parts) -> None:
    tasks, titles = parts.tasks.eval_tasks, parts.dataset.titles
    first, again = (fresh_episodes(parts, tasks, seed=5, temperature=1.0) for _ in range(2))
    for task, episode, twin in zip(tasks, first, again, strict=True):
        sequence = parts.tasks.split.sequences[task.user]
        at = sequence.index(task.target)
        for agent in (RECOMMENDER, USER):
            sessions = memory_of(episode, agent)
            assert [session.split("; took ")[1] for session in sessions] == [
                f"{titles[i]}." for i in sequence[at - 2 : at]
            ]
            assert episode.views[agent].tokens == twin.views[agent].tokens
        # As in any episode, nothing but the candidates names what is to be found.
        assert titles[task.target] not in episode.codec.decode(episode.views[USER].tokens)


def test_an_evaluation_with_memory_plays_its_users_with_it(parts: Parts) -> None:
    found = evaluate(parts, short=True)
    assert all(len(memory_of(episode, agent)) == 2 for episode in found.episodes for agent in (RECOMMENDER, USER))
    without = replace(parts, config=replace(parts.config, game=replace(parts.config.game, memory=0)))
    assert all(not memory_of(episode, USER) for episode in evaluate(without, short=True).episodes)
