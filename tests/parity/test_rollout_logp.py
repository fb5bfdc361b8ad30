"""What the rollout records is what the training forward computes; what is cached is what a re-prefill would give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from coars_fast.game.episode import Episode
from coars_fast.game.trajectory import trajectories
from coars_fast.learn.packing import pack
from coars_fast.model.attention import PackedAttention
from coars_fast.model.decoder import Decoder
from coars_fast.rollout.cache import CachedAttention, KVCache
from coars_fast.rollout.play import play
from tests import tiny

BOUND = 1e-4
"""The issue's: log-prob when sampled against the training forward, fp32."""


def played(decoder: Decoder, count: int = 6, *, temperature: float = 1.0, **options) -> list[Episode]:
    episodes = [tiny.new_episode(n) for n in range(count)]
    options = {"seed": 11, "temperature": temperature, "max_reply_tokens": 24, "batch_size": count} | options
    play(decoder, episodes, **options)
    return episodes


@torch.no_grad()
def differences(decoder: Decoder, episodes: list[Episode], *, swap_agents: bool = False) -> torch.Tensor:
    """[R] of all sampled tokens: recorded log-prob minus the packed training forward's."""
    batch = pack(trajectories(episodes, tiny.GAME))
    agents = 1 - batch.agent_ids if swap_agents else batch.agent_ids
    hidden = decoder(batch.token_ids, batch.position_ids, PackedAttention(batch.cu_seqlens), agents)[batch.rows]
    logp = (hidden.float() @ decoder.head_weight.T.float()).log_softmax(-1)
    recorded = sum(len(view.logp) for episode in episodes for view in episode.views)
    assert len(batch.behaviour_logp) == recorded == len(batch.target)
    return batch.behaviour_logp - logp.gather(1, batch.target[:, None])[:, 0]


def test_every_sampled_token_has_the_log_prob_of_the_training_forward() -> None:
    decoder = tiny.taught_decoder()
    episodes = played(decoder, 12)
    assert sum(len(episode.turns) > 1 for episode in episodes) >= 3  # later turns extend a cache
    assert sum(len(episode.views[1].spans) > 1 for episode in episodes) >= 2
    assert differences(decoder, episodes).abs().max() < BOUND
    assert differences(decoder, episodes, swap_agents=True).abs().max() > 100 * BOUND  # each agent has its own adapter


def test_replies_that_were_cut_or_make_no_sense_agree_too() -> None:
    decoder = tiny.random_decoder()
    episodes = played(decoder)
    assert all(len(episode.turns) == tiny.GAME.max_turns for episode in episodes)
    assert differences(decoder, episodes).abs().max() < BOUND


def test_other_shapes_agree_too() -> None:
    for changes in ({"family": "llama", "tie_word_embeddings": False}, {"family": "qwen2", "attention_bias": True}):
        decoder = tiny.random_decoder(seed=2, **changes)
        assert differences(decoder, played(decoder, 3)).abs().max() < BOUND


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


# --------------------------------------------------------------------------------------------------------------- cache


def empty_cache(decoder: Decoder, num_sequences: int) -> KVCache:
    shape = decoder.config
    return KVCache(
        num_sequences=num_sequences, num_layers=shape.num_layers, num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim, dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip


@torch.no_grad()
def extend(decoder: Decoder, cache: KVCache, rows: list[int], parts: list[list[int]], agents: list[int]):
    """Hidden states of the new tokens, one tensor per row."""
    lengths = [len(part) for part in parts]
    cache.reserve(max(cache.lengths[row] + n for row, n in zip(rows, lengths, strict=True)))
    attend = CachedAttention(cache, rows, lengths)
    agent_ids = torch.tensor(agents, dtype=torch.int8).repeat_interleave(torch.tensor(lengths))
    hidden = decoder(torch.tensor(sum(parts, [])), attend.position_ids, attend, agent_ids)
    attend.commit()
    torch.testing.assert_close(hidden[attend.last], torch.stack([h[-1] for h in hidden.split(lengths)]))
    return hidden.split(lengths)


@torch.no_grad()
def prefill(decoder: Decoder, tokens: list[int], agent: int) -> torch.Tensor:
    attend = PackedAttention(torch.tensor([0, len(tokens)], dtype=torch.int32))
    agents = torch.full((len(tokens),), agent, dtype=torch.int8)
    return decoder(torch.tensor(tokens), torch.arange(len(tokens)), attend, agents)


@pytest.mark.parametrize("seed", range(4))
def test_extending_a_cache_in_pieces_equals_one_prefill(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    decoder = tiny.random_decoder(seed)
    lengths = [3, 90, 140, 65, 17]  # past the growth of the cache
    sequences = [torch.randint(0, 400, (n,), generator=generator).tolist() for n in lengths]
    agents = [0, 1, 0, 1, 1]
    whole = [prefill(decoder, tokens, agent) for tokens, agent in zip(sequences, agents, strict=True)]
    cache = empty_cache(decoder, len(sequences))
    while any(cache.lengths[row] < n for row, n in enumerate(lengths)):
        order = torch.randperm(len(sequences), generator=generator).tolist()
        rows = [row for row in order[: 1 + seed] if cache.lengths[row] < lengths[row]]
        if not rows:
            continue
        parts = []
        for row in rows:
            start = cache.lengths[row]
            count = int(torch.randint(1, 30, (1,), generator=generator))
            parts.append(sequences[row][start : start + count])
        starts = [cache.lengths[row] for row in rows]
        found = extend(decoder, cache, rows, parts, [agents[row] for row in rows])
        for row, start, hidden in zip(rows, starts, found, strict=True):
            torch.testing.assert_close(hidden, whole[row][start : start + len(hidden)], atol=2e-5, rtol=0)


def test_a_shortened_sequence_forgets_what_came_after() -> None:
    decoder = tiny.random_decoder()
    first, second = list(range(20, 60)), [*range(20, 45), *range(100, 108)]
    cache = empty_cache(decoder, 2)
    extend(decoder, cache, [0, 1], [first, first[:7]], [0, 1])
    cache.lengths[0] = 24
    found = extend(decoder, cache, [0], [second[24:]], [0])[0]
    torch.testing.assert_close(found, prefill(decoder, second, 0)[24:], atol=2e-5, rtol=0)
    kept = extend(decoder, cache, [1], [first[7:12]], [1])[0]
    torch.testing.assert_close(kept, prefill(decoder, first[:12], 1)[7:], atol=2e-5, rtol=0)


def test_what_lies_beyond_a_sequence_in_memory_is_never_read() -> None:
    decoder = tiny.random_decoder()
    tokens = list(range(30, 50))
    cache = empty_cache(decoder, 2)
    cache.reserve(64)
    for memory in (*cache.keys, *cache.values):
        memory[0, :, 20:] = 1e30  # NaN would spread through weight 0; large values show a mask that lets them in
        memory[1] = 1e30
    found = extend(decoder, cache, [0], [tokens], [0])[0]
    torch.testing.assert_close(found, prefill(decoder, tokens, 0), atol=2e-5, rtol=0)


def test_the_same_decoder_in_bfloat16_agrees_within_its_rounding() -> None:
    decoder = tiny.taught_decoder().to(torch.bfloat16)
    for parameter in decoder.parameters():
        parameter.requires_grad_(False)
    assert differences(decoder, played(decoder, 6)).abs().max() < 0.15


def test_trajectories_hold_what_the_views_hold() -> None:
    episodes = played(tiny.taught_decoder(), 6)
    for found in trajectories(episodes, replace(tiny.GAME, balance_user_turns=False)):
        view = episodes[found.episode].views[found.agent]
        assert found.tokens == tuple(view.tokens) and found.behaviour_logp == tuple(view.logp)
        assert [(t.fork, t.start, t.end) for t in found.turns] == [(s.fork, s.start, s.end) for s in view.spans]
        header = tiny.tokens()[1].headers["assistant"]
        for turn in found.turns:
            assert found.tokens[turn.fork : turn.start] == header == turn.reference[-len(header) :]
