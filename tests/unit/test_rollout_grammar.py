"""Constrained replies: every one parses, and its log-probs are those of what was allowed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from coars_fast.config import GameConfig
from coars_fast.config_checks import check
from coars_fast.errors import ConfigError
from coars_fast.game.episode import Episode
from coars_fast.game.prompts import parse_judgement, parse_recommendation
from coars_fast.model.decoder import Decoder
from coars_fast.rollout.grammar import Grammar, episode_endings, judgement_endings, reply_grammar
from coars_fast.rollout.play import ask, play
from tests import tiny
from tests.rollout_pieces import MEMORIES, prefill

LIMIT = 40


def played(decoder: Decoder, count: int = 6, **options) -> list[Episode]:
    episodes = [tiny.new_episode(n) for n in range(count)]
    options = {"seed": 2, "temperature": 1.0, "max_reply_tokens": LIMIT, "batch_size": 4, "constrained": True} | options
    play(decoder, episodes, **options)
    return episodes


@pytest.mark.parametrize("attention", MEMORIES)
def test_a_random_model_speaks_in_the_format(attention: str) -> None:
    episodes = played(tiny.random_decoder(), attention=attention)
    turns = [turn for episode in episodes for turn in episode.turns]
    assert all(turn.item is not None and turn.judgement is not None for turn in turns)
    assert all(not turn.judgement.clamped for turn in turns if turn.judgement)
    assert len({turn.item for turn in turns}) > 3
    assert len({turn.judgement.action for turn in turns if turn.judgement}) > 2
    assert len({len(turn.rec_text) for turn in turns}) > 3
    spans = [span for episode in episodes for view in episode.views for span in view.spans]
    assert max(span.end - span.start for span in spans) <= LIMIT


def test_log_probs_are_those_under_the_mask() -> None:
    decoder = tiny.random_decoder()
    for episode in played(decoder, 3):
        replayed = tiny.new_episode(episode.task.user)
        for agent in (0, 1):
            assert episode.views[agent].tokens[: len(replayed.views[agent].tokens)] == replayed.views[agent].tokens
        said = [iter(view.logp) for view in episode.views]
        spans = [iter(view.spans) for view in episode.views]
        while replayed.waiting is not None:
            agent = replayed.waiting
            tokens, span = episode.views[agent].tokens, next(spans[agent])
            grammar = reply_grammar(replayed.codec, replayed.template, episode_endings(replayed), LIMIT)
            logits = prefill(decoder, tokens[: span.end], agent)[span.start - 1 : -1] @ decoder.head_weight.T
            ids, values = tokens[span.start : span.end], []
            for row, token in zip(logits, ids, strict=True):
                allowed = grammar.allowed()
                assert token in allowed.tolist()
                values.append(float(row[token] - row[allowed].logsumexp(0)))
                if token != replayed.template.end_of_turn:
                    grammar.take(token)
            found = tuple(next(said[agent]) for _ in ids)
            assert found == pytest.approx(values, abs=1e-5)
            replayed.receive(tiny.Reply(tuple(ids), found))


@pytest.mark.parametrize("prompts", ["brief", "full"])
def test_every_ending_parses(prompts) -> None:
    episode = Episode(tiny.make_task(3), tiny.TITLES, *tiny.tokens(), GameConfig(prompts=prompts))
    for n, text in enumerate(episode_endings(episode)):
        assert parse_recommendation(f"Reason: why not{text}", episode.candidate_titles, episode.prompts) == n
    texts = judgement_endings()
    assert len(texts) == len(set(texts)) == 101
    for text in texts:
        found = parse_judgement(f"Reason: so{text}")
        assert found is not None and not found.clamped


def test_free_text_ends_in_time() -> None:
    grammar = Grammar([9], torch.tensor([5, 6]), 2, [[1, 2, 0], [1, 3, 4, 0]])
    steps = []
    for token in (9, 5, 6, 1, 3, 4):
        steps.append(sorted(grammar.allowed().tolist()))
        grammar.take(token)
    assert [*steps, grammar.allowed().tolist()] == [[9], [1, 5, 6], [1, 5, 6], [1], [2, 3], [4], [0]]
    short = Grammar([], torch.tensor([5, 6]), 4, [[1, 0]])
    short.take(1)
    assert short.allowed().tolist() == [0], "no free text after an ending has begun"


def test_questions_can_be_constrained_too() -> None:
    codec, template = tiny.tokens()
    replies = ask(
        tiny.random_decoder(), [[3, 4, 5], [6, 7]], 1, control=template.control, is_valid=lambda reply: False, seed=1,
        temperature=0.0, max_reply_tokens=LIMIT, batch_size=2,
        constraint=lambda: reply_grammar(codec, template, judgement_endings(), LIMIT),
    )  # fmt: skip
    assert all(parse_judgement(codec.decode(reply.ids[:-1])) is not None for reply in replies)


def test_replies_too_short_for_the_format_are_a_setting_to_change() -> None:
    with pytest.raises(ConfigError, match=r"rollout.max_reply_tokens: 5 leave no room .* which needs \d+"):
        played(tiny.random_decoder(), max_reply_tokens=5)


def test_training_on_constrained_replies_is_refused() -> None:
    config = tiny.tiny_config()
    constrained = replace(config, rollout=replace(config.rollout, constrained=True))
    with pytest.raises(ConfigError, match="rollout.constrained: .* no samples of the policy that is trained"):
        check(constrained)
    check(replace(constrained, train=replace(config.train, num_steps=0)))
