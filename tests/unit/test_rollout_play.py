"""Playing episodes: the same whatever the batch, replies that end, conversations that fit."""

from __future__ import annotations

import pytest
import torch

from coars_fast.errors import ConfigError
from coars_fast.game.episode import Episode
from coars_fast.model.decoder import Decoder
from coars_fast.rollout.play import Sampler, play
from tests import tiny


def played(decoder: Decoder, count: int, batch_size: int, *, seed: int = 4, **options) -> list[Episode]:
    episodes = [tiny.new_episode(n) for n in range(count)]
    options = {"temperature": 1.0, "max_reply_tokens": 24} | options
    play(decoder, episodes, seed=seed, batch_size=batch_size, **options)
    return episodes


def words(episodes: list[Episode]) -> list[list[list[int]]]:
    return [[view.tokens for view in episode.views] for episode in episodes]


@pytest.mark.parametrize("resample", [False, True])
def test_the_same_seed_plays_the_same_episodes_whatever_the_batch(resample: bool) -> None:
    decoder = tiny.taught_decoder()
    all_at_once = played(decoder, 7, 7, resample_invalid=resample)
    for batch_size in (1, 3, 100):
        others = played(decoder, 7, batch_size, resample_invalid=resample)
        assert words(others) == words(all_at_once)
        for one, other in zip(all_at_once, others, strict=True):
            for view, other_view in zip(one.views, other.views, strict=True):
                assert other_view.logp == pytest.approx(view.logp, abs=1e-4)


def test_another_seed_plays_other_episodes() -> None:
    decoder = tiny.taught_decoder()
    assert words(played(decoder, 4, 4, seed=4)) != words(played(decoder, 4, 4, seed=5))


def test_two_episodes_about_the_same_task_are_not_the_same() -> None:
    decoder = tiny.taught_decoder()
    twins = [tiny.new_episode(1) for _ in range(6)]
    play(decoder, twins, seed=0, temperature=1.0, max_reply_tokens=24, batch_size=6)
    assert len({tuple(episode.views[0].tokens) for episode in twins}) > 3


def test_episodes_are_over_and_progress_was_told() -> None:
    told: list[tuple[int, int]] = []
    episodes = played(tiny.taught_decoder(), 5, 2, progress=lambda done, of: told.append((done, of)))
    assert all(episode.waiting is None for episode in episodes)
    assert told[-1] == (5, 5) and [done for done, _ in told] == sorted(done for done, _ in told)


def reply_sampler(decoder: Decoder, control: frozenset[int], max_reply_tokens: int) -> Sampler:
    return Sampler(decoder, num_sequences=40, control=control, max_reply_tokens=max_reply_tokens, seed=1)


def test_a_reply_ends_at_its_first_control_token_or_at_the_limit() -> None:
    decoder = tiny.random_decoder()
    control = frozenset(range(0, 60))
    views = [list(range(10 + n, 30 + 2 * n)) for n in range(40)]
    sampler = reply_sampler(decoder, control, 9)
    replies = sampler.reply(list(range(40)), views, [n % 2 for n in range(40)], list(range(40)), 1.0)
    ended = [reply.ids[-1] in control for reply in replies]
    assert any(ended) and not all(ended)
    for reply, over in zip(replies, ended, strict=True):
        assert len(reply.ids) == len(reply.logp) and all(p <= 0 for p in reply.logp)
        assert not control.intersection(reply.ids[:-1])
        assert over or len(reply.ids) == 9
    assert len({len(reply.ids) for reply in replies}) > 3


def test_a_reply_does_not_depend_on_whose_replies_are_drawn_beside_it() -> None:
    decoder = tiny.random_decoder()
    control = frozenset(range(0, 60))
    views = [list(range(10 + n, 30 + 2 * n)) for n in range(12)]
    agents = [n % 2 for n in range(12)]
    together = reply_sampler(decoder, control, 9).reply(list(range(12)), views, agents, list(range(12)), 1.0)
    assert len({len(reply.ids) for reply in together}) > 3  # the batch shrinks while it is drawn
    for n, reply in enumerate(together):
        alone = reply_sampler(decoder, control, 9).reply([7], [views[n]], [agents[n]], [n], 1.0)[0]
        assert alone.ids == reply.ids and alone.logp == pytest.approx(reply.logp, abs=1e-4)


def test_a_reply_of_one_token_is_possible() -> None:
    decoder = tiny.random_decoder()
    replies = reply_sampler(decoder, frozenset([1]), 1).reply([3, 1], [[5, 6], [7]], [0, 1], [0, 1], 1.0)
    assert [len(reply.ids) for reply in replies] == [1, 1]


def test_the_cache_holds_all_but_the_last_sampled_token() -> None:
    decoder = tiny.random_decoder()
    sampler = reply_sampler(decoder, frozenset(range(100)), 8)
    replies = sampler.reply([2, 0], [[5, 6, 7], [8]], [0, 1], [0, 1], 1.0)
    assert sampler.cache.lengths[2] == 3 + len(replies[0].ids) - 1
    assert sampler.cache.lengths[0] == 1 + len(replies[1].ids) - 1


@pytest.mark.parametrize("positions", [40, 100])
def test_a_conversation_beyond_the_models_positions_is_a_setting_to_change(positions: int) -> None:
    decoder = tiny.random_decoder(max_position_embeddings=positions)
    with pytest.raises(ConfigError, match=rf"does not fit the model's {positions} positions.*rollout.max_reply_tokens"):
        played(decoder, 2, 2)


def test_a_conversation_that_just_fits_is_played() -> None:
    decoder = tiny.random_decoder(max_position_embeddings=30)
    sampler = reply_sampler(decoder, frozenset(), 10)
    assert len(sampler.reply([0], [list(range(20))], [0], [0], 1.0)[0].ids) == 10
    with pytest.raises(ConfigError):
        reply_sampler(decoder, frozenset(), 11).reply([0], [list(range(20))], [0], [0], 1.0)


def test_a_vocabulary_larger_than_the_tokenizers_does_not_break_a_conversation() -> None:
    decoder = tiny.random_decoder(vocab_size=len(tiny.tokenizer()) + 500)  # padded, as Qwen's checkpoints are
    episodes = played(decoder, 3, 3)
    sampled = [t for e in episodes for v in e.views for s in v.spans for t in v.tokens[s.start : s.end]]
    assert max(sampled) >= len(tiny.tokenizer())
    assert all(episode.waiting is None for episode in episodes)


def test_playing_needs_no_gradient_memory() -> None:
    decoder = tiny.taught_decoder()
    sampler = reply_sampler(decoder, frozenset([1]), 3)
    sampler.reply([0], [[5, 6]], [0], [0], 1.0)
    assert not any(memory.requires_grad for memory in sampler.cache.keys)
    assert torch.is_grad_enabled()
