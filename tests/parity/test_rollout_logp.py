"""What the rollout records is what the training forward computes, and the same whoever plays at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from coars_fast.game.episode import Episode
from coars_fast.game.trajectory import trajectories
from coars_fast.learn.packing import pack
from coars_fast.model.attention import PackedAttention
from coars_fast.model.decoder import Decoder
from coars_fast.rollout.play import play
from tests import tiny
from tests.rollout_pieces import MEMORIES, logp_of, make_engine

BOUND = 1e-5
"""Log-prob when sampled against the training forward, fp32."""


def played(decoder: Decoder, count: int = 6, **options) -> list[Episode]:
    episodes = [tiny.new_episode(n) for n in range(count)]
    options = {"seed": 11, "temperature": 1.0, "max_reply_tokens": 24, "batch_size": count} | options
    play(decoder, episodes, **options)
    return episodes


@torch.no_grad()
def differences(decoder: Decoder, episodes: Sequence[Episode], *, swap_agents: bool = False) -> torch.Tensor:
    """[R] of all sampled tokens: recorded log-prob minus the packed training forward's."""
    batch = pack(trajectories(episodes, tiny.GAME))
    agents = 1 - batch.agent_ids if swap_agents else batch.agent_ids
    hidden = decoder(batch.token_ids, batch.position_ids, PackedAttention(batch.cu_seqlens), agents)[batch.rows]
    logp = (hidden.float() @ decoder.head_weight.T.float()).log_softmax(-1)
    recorded = sum(len(view.logp) for episode in episodes for view in episode.views)
    assert len(batch.behaviour_logp) == recorded == len(batch.target)
    return batch.behaviour_logp - logp.gather(1, batch.target[:, None])[:, 0]


@lru_cache(maxsize=1)
def many() -> tuple[Decoder, list[Episode]]:
    """200 episodes of a model that speaks, at 64 a time."""
    decoder = tiny.taught_decoder()
    return decoder, played(decoder, 200, batch_size=64)


def test_every_sampled_token_has_the_log_prob_of_the_training_forward() -> None:
    decoder, episodes = many()
    assert sum(len(episode.turns) > 1 for episode in episodes) >= 40  # later turns go on from what is cached
    assert sum(len(episode.views[1].spans) > 1 for episode in episodes) >= 20
    assert differences(decoder, episodes).abs().max() < BOUND
    assert differences(decoder, episodes[:20], swap_agents=True).abs().max() > 100 * BOUND  # to each its own adapter


@pytest.mark.parametrize(("count", "batch_size"), [(64, 64), (64, 7), (24, 1)])
def test_the_same_episodes_whoever_plays_at_the_same_time(count: int, batch_size: int) -> None:
    decoder, episodes = many()
    others = played(decoder, count, batch_size=batch_size)
    # All of them here. A model with two nearly equal candidates for a token may decide otherwise when a matrix product
    # of another size rounds otherwise: one token in a thousand may do so before this is a fault.
    tokens = [(a, b) for e, o in zip(episodes, others, strict=False) for v, w in zip(e.views, o.views, strict=True)
              for a, b in zip(v.tokens, w.tokens, strict=False)]  # fmt: skip
    assert sum(a == b for a, b in tokens) >= 0.999 * len(tokens)
    for episode, other in zip(episodes, others, strict=False):
        for view, same in zip(episode.views, other.views, strict=True):
            if view.tokens == same.tokens:
                assert same.logp == pytest.approx(view.logp, abs=BOUND)


def test_pages_in_place_play_the_same_episodes() -> None:
    decoder, episodes = many()
    others = played(decoder, 12, attention="kernels")
    assert [v.tokens for e in others for v in e.views] == [v.tokens for e in episodes[:12] for v in e.views]
    assert differences(decoder, others).abs().max() < BOUND


@pytest.mark.parametrize("attention", MEMORIES)
def test_replies_that_were_cut_or_make_no_sense_agree_too(attention: str) -> None:
    decoder = tiny.random_decoder()
    episodes = played(decoder, attention=attention)
    assert all(len(episode.turns) == tiny.GAME.max_turns for episode in episodes)
    assert differences(decoder, episodes).abs().max() < BOUND


@pytest.mark.parametrize("attention", MEMORIES)
def test_other_shapes_agree_too(attention: str) -> None:
    for changes in ({"family": "llama", "tie_word_embeddings": False}, {"family": "qwen2", "attention_bias": True}):
        decoder = tiny.random_decoder(seed=2, **changes)
        assert differences(decoder, played(decoder, 3, attention=attention)).abs().max() < BOUND


def test_a_reply_that_is_drawn_again_leaves_no_trace_in_the_cache() -> None:
    decoder = tiny.random_decoder()
    once = played(decoder)
    again = played(decoder, resample_invalid=True)
    # The random model's replies are all invalid: each is the second draw, in later turns on top of a rolled-back cache.
    assert all(a.views[0].tokens != b.views[0].tokens for a, b in zip(once, again, strict=True))
    assert differences(decoder, again).abs().max() < BOUND


def test_valid_replies_are_kept_when_others_are_drawn_again() -> None:
    decoder = tiny.taught_decoder()
    tiny.randomise_adapters(decoder, scale=0.12)  # enough to spoil some replies
    once, again = played(decoder, 60), played(decoder, 60, resample_invalid=True)
    firsts = [(a.turns[0], b.turns[0]) for a, b in zip(once, again, strict=True)]
    valid = [a.item is not None for a, _ in firsts]
    assert any(valid) and not all(valid)
    assert all(a.rec_text == b.rec_text for (a, b), kept in zip(firsts, valid, strict=True) if kept)
    assert all(a.rec_text != b.rec_text for (a, b), kept in zip(firsts, valid, strict=True) if not kept)
    assert differences(decoder, again).abs().max() < BOUND


def test_greedy_replies_are_the_most_likely_tokens() -> None:
    decoder = tiny.taught_decoder()
    episodes = played(decoder, 4, temperature=0.0)
    assert differences(decoder, episodes).abs().max() < BOUND
    view = episodes[0].views[0]
    with torch.no_grad():
        hidden = decoder(
            torch.tensor(view.tokens),
            torch.arange(len(view.tokens)),
            PackedAttention(torch.tensor([0, len(view.tokens)], dtype=torch.int32)),
            torch.zeros(len(view.tokens), dtype=torch.int8),
        )
    best = (hidden @ decoder.head_weight.T).argmax(-1).tolist()
    for span in view.spans:
        assert view.tokens[span.start : span.end] == best[span.start - 1 : span.end - 1]


def test_sampled_log_probs_move_with_the_adapters() -> None:
    decoder = tiny.random_decoder()
    before = [episode.views[0].logp[0] for episode in played(decoder)]
    tiny.randomise_adapters(decoder, seed=5)  # what an update does: in place
    episodes = played(decoder)
    after = [episode.views[0].logp[0] for episode in episodes]
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 1e-2
    assert differences(decoder, episodes).abs().max() < BOUND


def test_the_episodes_of_a_group_share_their_prompt_and_nothing_else() -> None:
    decoder = tiny.taught_decoder()
    twins = [tiny.new_episode(n // 4) for n in range(12)]
    figures = play(decoder, twins, seed=3, temperature=1.0, max_reply_tokens=24, batch_size=12)
    assert figures.shared_tokens >= 9 * (len(tiny.new_episode(0).views[0].tokens) - 1)
    assert differences(decoder, twins).abs().max() < BOUND
    assert len({tuple(episode.views[0].tokens) for episode in twins}) > 9


@pytest.mark.parametrize("attention", MEMORIES)
def test_scoring_gives_the_teachers_log_probs(attention: str) -> None:
    """The teacher reads the student's cached context, then the reference, then what was said."""
    decoder = tiny.taught_decoder()
    engine = make_engine(decoder, attention, num_pages=400)
    for found in trajectories(played(decoder, 5), tiny.GAME):
        cached = engine.pool.new()
        engine.extend([cached], [found.tokens], [found.agent])
        forks = [engine.pool.fork(cached, turn.fork) for turn in found.turns]
        said = [found.tokens[turn.start : turn.end] for turn in found.turns]
        agents = [found.agent] * len(forks)
        logp = engine.score(forks, [turn.reference for turn in found.turns], said, agents)
        for turn, part, values in zip(found.turns, said, logp, strict=True):
            whole = [*found.tokens[: turn.fork], *turn.reference, *part]
            expected = logp_of(decoder, whole, found.agent, len(whole) - len(part))
            assert values.tolist() == pytest.approx(expected, abs=BOUND)
        for sequence in (cached, *forks):
            engine.pool.release(sequence)


def test_trajectories_carry_what_was_sampled() -> None:
    episodes = played(tiny.taught_decoder(), 6)
    for found in trajectories(episodes, replace(tiny.GAME, balance_user_turns=False)):
        view = episodes[found.episode].views[found.agent]
        assert found.tokens == tuple(view.tokens) and found.behaviour_logp == tuple(view.logp)
        assert [(t.fork, t.start, t.end) for t in found.turns] == [(s.fork, s.start, s.end) for s in view.spans]
        header = tiny.tokens()[1].headers["assistant"]
        for turn in found.turns:
            assert found.tokens[turn.fork : turn.start] == header == turn.reference[-len(header) :]
