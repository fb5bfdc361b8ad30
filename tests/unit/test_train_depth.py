"""Training episodes that grow from one turn to all."""

from __future__ import annotations

import pytest

from coars_fast.config import Config, GameConfig, TrainConfig
from coars_fast.config_checks import check
from coars_fast.errors import ConfigError
from coars_fast.game.episode import Episode
from coars_fast.train import episode_depth
from tests.game_pieces import TASK, TITLES, family, judge, recommend, say


def config(max_turns: int, depth_steps: int, num_steps: int = 40) -> Config:
    train = TrainConfig(depth_steps=depth_steps, num_steps=num_steps)
    return Config(game=GameConfig(max_turns=max_turns), train=train)


@pytest.mark.parametrize(
    ("max_turns", "depth_steps", "expected"),
    [
        (3, 0, [3, 3, 3, 3, 3, 3]),
        (3, 4, [1, 1, 2, 2, 3, 3]),
        (5, 2, [1, 3, 5, 5, 5, 5]),
        (2, 5, [1, 1, 1, 1, 1, 2]),
    ],
)
def test_depth_grows_evenly_and_stays(max_turns: int, depth_steps: int, expected: list[int]) -> None:
    assert [episode_depth(config(max_turns, depth_steps), step) for step in range(6)] == expected


def test_a_short_episode_ends_early_and_is_rewarded_as_the_beginning_of_a_long_one() -> None:
    episodes = [Episode(TASK, TITLES, *family("chatml"), GameConfig(max_turns=4), max_turns=n) for n in (2, None)]
    short, whole = episodes
    assert [view.tokens for view in short.views] == [view.tokens for view in whole.views]
    assert all(a < b for a, b in zip(short.longest_views(20), whole.longest_views(20), strict=True))
    for text in (recommend("Gamma"), judge("skip", "0.30"), recommend("Omega"), judge("dislike", "0.10")):
        for episode in episodes:
            episode.receive(say(episode, text))
    assert short.waiting is None and whole.waiting is not None
    assert [turn.reward for turn in short.turns] == [turn.reward for turn in whole.turns]


def test_what_cannot_grow_is_refused() -> None:
    check(config(3, 40))
    check(config(3, 50, num_steps=0))
    with pytest.raises(ConfigError, match="^train.depth_steps: episodes of game.max_turns 1"):
        check(config(1, 5))
    with pytest.raises(ConfigError, match=r"^train.depth_steps: 41 are more than all steps, train.num_steps \(40\)"):
        check(config(3, 41))
