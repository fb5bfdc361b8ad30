"""Playing episodes: the same whatever the batch and the memory, replies that end, conversations that fit."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch

from coars_fast.errors import ConfigError
from coars_fast.game.episode import USER, Episode, Reply
from coars_fast.model.decoder import Decoder
from coars_fast.rollout import play as play_module
from coars_fast.rollout.engine import Engine
from coars_fast.rollout.pages import PagePool
from coars_fast.rollout.play import ask, play
from coars_fast.rollout.statistics import Statistics
from tests import tiny
from tests.rollout_pieces import MEMORIES, random_tokens


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


@pytest.mark.parametrize("positions", [40, 100])
def test_a_conversation_beyond_the_models_positions_is_a_setting_to_change(positions: int) -> None:
    decoder = tiny.random_decoder(max_position_embeddings=positions)
    episodes = [tiny.new_episode(n) for n in range(2)]
    before = words(episodes)
    with pytest.raises(
        ConfigError, match=rf"up to \d+ tokens does not fit the model's {positions} positions.*rollout.max_reply_tokens"
    ):
        play(decoder, episodes, seed=1, temperature=1.0, max_reply_tokens=24, batch_size=2)
    assert words(episodes) == before, "refused before any work"


@pytest.mark.parametrize("attention", MEMORIES)
def test_no_view_outgrows_what_was_foreseen(attention: str) -> None:
    for decoder in (tiny.taught_decoder(), tiny.random_decoder()):
        for limit in (9, 24):
            episodes = [tiny.new_episode(n) for n in range(12)]
            longest = [episode.longest_views(limit) for episode in episodes]
            play(decoder, episodes, seed=2, temperature=1.0, max_reply_tokens=limit, batch_size=12, attention=attention)
            for episode, foreseen in zip(episodes, longest, strict=True):
                for view, length in zip(episode.views, foreseen, strict=True):
                    assert len(view.tokens) <= length


def test_a_memory_for_one_turn_is_enough() -> None:
    decoder = tiny.taught_decoder()
    plenty = played(decoder, 8, 8)
    longest = max(max(tiny.new_episode(n).longest_views(24)) for n in range(8))
    page = 16 * 2 * 2 * 2 * 8 * 4  # tokens, layers, keys and values, heads, head size, bytes
    gib = page * -(-longest // 16) / 2**30
    figures: list[Statistics] = []
    scarce = played(decoder, 8, 8, kv_gib=gib, watch=figures.append)
    assert words(scarce) == words(plenty)
    assert figures[-1].num_pages == -(-longest // 16) and figures[-1].repeated_tokens > 0
    with pytest.raises(ConfigError, match=rf"up to {longest} tokens does not fit the K/V memory .*rollout.kv_gib"):
        played(decoder, 8, 8, kv_gib=gib - 1e-9)


@pytest.mark.parametrize("attention", MEMORIES)
def test_a_scarce_memory_is_made_once(attention: str) -> None:
    """Half of what all need: the next calls play with it, and take nothing anew."""
    decoder, page = tiny.taught_decoder(), 16 * 2 * 2 * 2 * 8 * 4
    needs = sum(2 + n // 16 for episode in range(8) for n in tiny.new_episode(episode).longest_views(24))
    engines = set()
    for _ in range(3):
        played(decoder, 8, 8, kv_gib=page * (needs // 2) / 2**30, attention=attention)
        engines.add(id(vars(decoder)["_rollout_engines"][attention]))
    assert len(engines) == 1 and vars(decoder)["_rollout_engines"][attention].pool.num_pages == needs // 2


@pytest.mark.parametrize("attention", MEMORIES)
def test_a_memory_that_is_replaced_is_given_back_first(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny.taught_decoder()
    held: list[weakref.ref[PagePool]] = []
    make = play_module.Engine

    def count(*arguments: Any, **options: Any) -> Engine:
        assert not any(pool() is not None for pool in held), "the old pages are there beside the new ones"
        made = make(*arguments, **options)
        held.append(weakref.ref(made.pool))
        return made

    monkeypatch.setattr(play_module, "Engine", count)
    for episodes in (2, 8, 40):
        played(decoder, episodes, episodes, attention=attention)
    assert len(held) == 3


def test_an_adapter_that_is_not_loaded_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no adapter, the decoder has 0"):
        played(tiny.random_decoder(adapters=False), 2, 2)


def test_the_figures_add_up() -> None:
    seen: list[tuple[int, float]] = []
    decoder = tiny.taught_decoder()
    episodes = [tiny.new_episode(n) for n in range(9)]
    figures = play(
        decoder, episodes, seed=4, temperature=1.0, max_reply_tokens=24, batch_size=4,
        watch=lambda f: seen.append((f.done, f.fill)),
    )  # fmt: skip
    said = sum(len(view.logp) for episode in episodes for view in episode.views)
    assert figures.sampled_tokens == said and figures.done == figures.conversations == 9
    assert 0 < figures.fill <= 1 and figures.steps >= figures.blocks > 0
    assert 0 < figures.most_pages_in_use <= figures.num_pages and figures.pages_in_use == 0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and seen[-1][0] == 9
    assert "9/9 episodes" in figures.line() and "pages 0/" in figures.line()


def test_what_was_played_before_does_not_change_a_bit() -> None:
    first, second = tiny.taught_decoder(), tiny.taught_decoder()
    played(second, 60, 60, seed=9)  # more memory, other rows, and replies to guess from
    a, b = played(first, 40, 40), played(second, 40, 40)
    assert words(a) == words(b)
    assert all(v.logp == w.logp for e, o in zip(a, b, strict=True) for v, w in zip(e.views, o.views, strict=True))


def test_no_episodes_are_no_work() -> None:
    assert played(tiny.random_decoder(), 0, 4) == []


def test_a_decoder_keeps_its_engine_and_its_copies_do_not() -> None:
    decoder = tiny.taught_decoder()
    played(decoder, 3, 3)
    engine = vars(decoder)["_rollout_engines"]["auto"]
    played(decoder, 3, 2)
    assert vars(decoder)["_rollout_engines"]["auto"] is engine
    assert engine.pool.num_used == 0
    played(decoder, 40, 40)
    larger = vars(decoder)["_rollout_engines"]["auto"]
    assert larger is not engine and larger.pool.num_pages > engine.pool.num_pages
    assert not vars(copy.deepcopy(decoder)).get("_rollout_engines")
    gone = weakref.ref(decoder)
    del decoder, engine, larger
    gc.collect()
    assert gone() is None


def test_a_vocabulary_larger_than_the_tokenizers_does_not_break_a_conversation() -> None:
    decoder = tiny.random_decoder(vocab_size=len(tiny.tokenizer()) + 500)  # padded, as Qwen's checkpoints are
    episodes = played(decoder, 3, 3)
    sampled = [t for e in episodes for v in e.views for s in v.spans for t in v.tokens[s.start : s.end]]
    assert max(sampled) >= len(tiny.tokenizer())
    assert all(episode.waiting is None for episode in episodes)


# ----------------------------------------------------------------------------------------------------------- questions


def answers(decoder: Decoder, prompts: list[list[int]], batch_size: int, **options) -> list[Reply]:
    fields = {"seed": 1, "temperature": 1.0, "max_reply_tokens": 9, "is_valid": lambda reply: True} | options
    return ask(decoder, prompts, USER, control=frozenset(range(60)), batch_size=batch_size, **fields)


def test_an_answer_does_not_depend_on_whose_answers_are_drawn_beside_it() -> None:
    decoder = tiny.random_decoder()
    prompts = [[*range(100, 120), *prompt] for prompt in random_tokens(range(3, 43))]
    together = answers(decoder, prompts, 40)
    assert len({len(reply.ids) for reply in together}) > 3
    for batch_size in (1, 7):
        for reply, other in zip(together, answers(decoder, prompts, batch_size), strict=True):
            assert other.ids == reply.ids and other.logp == pytest.approx(reply.logp, abs=1e-5)


def test_an_answer_ends_at_its_first_control_token_or_at_the_limit() -> None:
    replies = answers(tiny.random_decoder(), random_tokens([20] * 40), 40)
    ended = [reply.ids[-1] < 60 for reply in replies]
    assert any(ended) and not all(ended)
    for reply, over in zip(replies, ended, strict=True):
        assert len(reply.ids) == len(reply.logp) and all(p <= 0 for p in reply.logp)
        assert all(token >= 60 for token in reply.ids[:-1])
        assert over or len(reply.ids) == 9


def test_answers_that_are_not_valid_are_drawn_once_more() -> None:
    decoder = tiny.random_decoder()
    prompts = random_tokens([12] * 20)
    first = answers(decoder, prompts, 20, temperature=0.0)
    odd = {reply.ids for reply in first if sum(reply.ids) % 2}
    assert odd and len(odd) < len({reply.ids for reply in first})
    again = answers(decoder, prompts, 20, temperature=0.0, is_valid=lambda reply: reply.ids not in odd)
    assert all((a.ids == b.ids) == (a.ids not in odd) for a, b in zip(first, again, strict=True))
    refused = answers(decoder, prompts, 20, temperature=0.0, is_valid=lambda reply: False)
    assert all(a.ids != b.ids for a, b in zip(first, refused, strict=True)), "kept, valid or not"


def test_a_reply_of_one_token_is_possible() -> None:
    assert [len(r.ids) for r in answers(tiny.random_decoder(), [[5, 6], [7]], 2, max_reply_tokens=1)] == [1, 1]


def test_playing_needs_no_gradient_memory() -> None:
    answers(tiny.taught_decoder(), [[5, 6]], 1)
    assert torch.is_grad_enabled()
