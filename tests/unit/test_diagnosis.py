"""Agents asked about their own replies by the model that gave them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from coars_fast.build import build
from coars_fast.diagnosis import diagnose
from coars_fast.game.episode import RECOMMENDER, USER
from coars_fast.game.trajectory import trajectories
from coars_fast.learn.step import Learner
from coars_fast.progress import Screen
from tests import tiny


def test_every_reply_is_diagnosed_in_tokens_that_fit_and_the_step_learns_from_it(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model", tiny.taught_decoder(adapters=False))
    config = tiny.tiny_config()
    config = replace(
        config, game=replace(config.game, reference="diagnosis"), model=replace(config.model, path=str(model))
    )
    parts = build(config, tmp_path, Screen())
    written = []
    for _ in range(2):
        episodes = tiny.scripted_episodes(parts.decoder, 3, game=config.game)
        before = [list(view.tokens) for episode in episodes for view in episode.views]
        diagnose(parts, episodes)
        assert [view.tokens for episode in episodes for view in episode.views] == before
        turns = [turn for episode in episodes for turn in episode.turns]
        assert all(set(turn.diagnoses) == ({RECOMMENDER, USER} if turn.user_spoke else {RECOMMENDER}) for turn in turns)
        written.append([turn.diagnoses for turn in turns])
    assert written[0] == written[1] and any(any(texts.values()) for texts in written[0])
    codec, _ = tiny.tokens()
    for text in (text for texts in written[0] for text in texts.values()):
        assert len(codec.encode(text)) <= config.rollout.max_reply_tokens + 2  # folded white space is cut otherwise
        assert "\n" not in text
    found = trajectories(episodes, config.game)
    plain = trajectories(episodes, replace(config.game, reference="template"))
    assert sum(t.num_teacher_tokens for t in found) > sum(t.num_teacher_tokens for t in plain)
    assert Learner(parts.decoder, config).update(found, 0)["credit_abs_mean"] > 0


def test_under_another_reference_nobody_is_asked(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model", tiny.taught_decoder(adapters=False))
    config = tiny.tiny_config()
    parts = build(replace(config, model=replace(config.model, path=str(model))), tmp_path, Screen())
    episodes = tiny.scripted_episodes(parts.decoder, 1, game=config.game)
    diagnose(parts, episodes)
    assert not any(turn.diagnoses for turn in episodes[0].turns)
