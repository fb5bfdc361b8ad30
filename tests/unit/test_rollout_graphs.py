"""Decoding over pages: the step that a GPU captures runs eagerly here, with the same state and the same logic."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from coars_fast.model.decoder import Decoder
from coars_fast.rollout import graphs
from coars_fast.rollout.engine import Engine
from coars_fast.rollout.graphs import DecodeState, bucket
from coars_fast.rollout.paged import _kernels, _trial, choose_paged_attention, page_table
from coars_fast.rollout.paged_memory import PagedMemory
from coars_fast.rollout.sampling import PartialReply, Sampling
from coars_kernels import paged_decode_attention, paged_prefill_attention, sample_with_logprob
from tests import tiny
from tests.rollout_pieces import begin, finish, logp_of, make_engine, random_tokens

SAMPLING = Sampling(seed=3, control=frozenset(range(60)))


def started(decoder: Decoder, lengths: list[int], limit: int = 30) -> tuple[Engine, PagedMemory, list[PartialReply]]:
    """Replies with their first token drawn."""
    engine = make_engine(decoder, "kernels")
    engine.forward.reserve_positions(256)
    replies = begin(engine, random_tokens(lengths), [n % 2 for n in range(len(lengths))], limit)
    for reply in replies:
        engine.pool.grow(reply.sequence, reply.longest)
    memory = engine.memory
    assert isinstance(memory, PagedMemory)
    memory._begin(replies, SAMPLING)
    return engine, memory, [reply for reply in replies if not reply.over]


def test_buckets() -> None:
    sizes = [bucket(rows) for rows in range(1, 700)]
    assert sizes == sorted(sizes) and all(size >= rows for rows, size in enumerate(sizes, start=1))
    assert {bucket(1), bucket(8), bucket(9), bucket(128), bucket(129), bucket(256)} == {8, 16, 128, 192, 256}


def test_rows_without_a_reply_write_to_the_scratch_page_alone() -> None:
    engine, memory, replies = started(tiny.random_decoder(), [20, 5, 13])
    before, used = engine.pool.kv.clone(), {page for reply in replies for page in reply.sequence.pages}
    memory.replays.run(replies, SAMPLING, until=99, steps=8)
    changed = (engine.pool.kv != before).flatten(2).any(2).any(0).nonzero().flatten().tolist()
    assert set(changed) <= used | {engine.pool.scratch_page} and engine.pool.scratch_page in changed


def test_a_row_that_is_over_never_touches_what_it_has_cached() -> None:
    decoder = tiny.random_decoder()
    engine = make_engine(decoder, "kernels")
    control = frozenset(range(300))  # replies end soon
    replies = begin(engine, random_tokens([20, 5, 13, 8]), [0, 1, 0, 1], limit=24)
    engine.decode(replies, Sampling(seed=3, control=control), steps=24)
    assert all(reply.over for reply in replies) and min(len(reply.ids) for reply in replies) < 5
    for reply in replies:
        after = engine.score([reply.sequence], [[reply.ids[-1]]], [[7]], [reply.agent])[0]
        whole = [*reply.view, *reply.ids, 7]
        assert after.tolist() == pytest.approx(logp_of(decoder, whole, reply.agent, len(whole) - 1), abs=1e-5)
        assert len(reply.sequence.pages) <= engine.pool.pages_for(reply.longest)


def test_state_moves_on_as_replies_do() -> None:
    _, memory, replies = started(tiny.random_decoder(), [20, 5, 13], limit=6)
    state = memory.replays._state(len(replies))
    state.load(replies, SAMPLING)
    assert state.alive.tolist() == [1] * len(replies) + [0] * (8 - len(replies))
    temperatures = memory.replays._temperatures(state, replies)
    history = []
    for index in range(8):
        state.step(index, temperatures)
        history.append((state.position.tolist(), state.alive.tolist()))
    for row, reply in enumerate(replies):
        start, last = len(reply.view), len(reply.view) + 6 - 1
        drawn = state.tokens[:, row].tolist()
        ends = [n for n, token in enumerate(drawn) if token in SAMPLING.control]
        over = min([*(start + 1 + n for n in ends[:1]), last])  # where the closing token stands
        for index, (positions, alive) in enumerate(history):
            assert positions[row] == min(start + 1 + index, over)
            assert alive[row] == (positions[row] < over)
    assert int(state.num_alive) == sum(state.alive.tolist()) == 0


def test_what_replays_draw_is_what_replies_get() -> None:
    decoder = tiny.random_decoder()
    engine, memory, replies = started(decoder, [20, 5, 13, 30, 2, 9, 9, 9, 14, 3], limit=20)
    assert bucket(len(replies)) in (8, 16)
    finish(engine, replies, SAMPLING, until=3)
    for reply in replies:
        whole = [*reply.view, *reply.ids]
        assert reply.logp == pytest.approx(logp_of(decoder, whole, reply.agent, len(reply.view)), abs=1e-5)


def test_a_graph_of_two_temperatures_serves_whichever_rows_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A greedy evaluation draws unreadable replies again. What is captured here stands for a graph: steps that were
    recorded once, which see nothing but the state's tensors."""
    _, memory, replies = started(tiny.random_decoder(), [20, 5, 13, 30])
    replays = memory.replays
    monkeypatch.setattr(replays, "_capture", lambda state, replies, sampling, steps: SimpleNamespace(replay=steps))

    def drawn(temperatures: tuple[float, ...], *, captures: bool) -> list[Tensor]:
        replays.captures = captures
        for reply, temperature in zip(replies, temperatures, strict=True):
            reply.temperature = temperature
        return replays.run(replies, SAMPLING, until=99, steps=8)

    assert len(replies) == 4
    mixed = ((0.0, 1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 1.0), (0.0, 0.0, 1.0, 1.0))
    for temperatures in (*mixed, (0.0,) * 4, (1.0,) * 4, (0.0, 0.5, 1.0, 0.0)):
        expected = drawn(temperatures, captures=False)
        for a, b in zip(drawn(temperatures, captures=True), expected, strict=True):
            assert torch.equal(a, b)
    greedy, warm = drawn((0.0,) * 4, captures=False)[0], drawn((1.0,) * 4, captures=False)[0]
    assert not any(torch.equal(a, b) for a, b in zip(greedy, warm, strict=True)), "rows show which they have"
    assert {key[1:3] for key in replays._graphs} == {(0.0, ()), (1.0, ()), (0.0, (1.0,))}, "three are rare: no graph"


def test_a_replay_more_is_under_way_when_enough_are_over() -> None:
    engine, memory, replies = started(tiny.random_decoder(), [20, 5, 13, 30, 2, 9], limit=64)
    tokens, logp = memory.replays.run(replies, Sampling(seed=3, control=frozenset(range(640))), until=1, steps=64)
    assert tokens.shape == logp.shape == (len(replies), 2 * graphs.STEPS)


def test_a_table_wider_than_its_columns_is_caught() -> None:
    engine, _, replies = started(tiny.random_decoder(), [20])
    table = page_table(engine.pool, [replies[0].sequence], rows=4, width=9)
    count = len(replies[0].sequence.pages)
    assert table[0, :count].tolist() == replies[0].sequence.pages
    assert (table[0, count:] == engine.pool.scratch_page).all() and (table[1:] == engine.pool.scratch_page).all()
    with pytest.raises(AssertionError, match="outgrows its width"):
        page_table(engine.pool, [replies[0].sequence], rows=4, width=count - 1)


def test_groups_are_neighbours_with_common_pages() -> None:
    decoder = tiny.random_decoder()
    engine = make_engine(decoder, "kernels")
    prompts, agents = random_tokens([37, 20]), [0, 1]
    trunks = [engine.pool.new() for _ in prompts]
    engine.extend(trunks, [prompt[:-1] for prompt in prompts], agents)
    engine.forward.reserve_positions(256)
    shared = [PartialReply(engine.pool.fork(trunks[n % 2]), prompts[n % 2], n % 2, n, limit=20) for n in range(6)]
    alone = begin(engine, random_tokens([9], seed=4), [0], limit=20)
    replies = [*shared, *alone]
    for reply in replies:
        engine.pool.grow(reply.sequence, reply.longest)
    memory = engine.memory
    assert isinstance(memory, PagedMemory)
    memory._begin(replies, Sampling(seed=3, control=frozenset()))
    replies.sort(key=lambda reply: reply.sequence.pages)
    state: DecodeState = memory.replays._state(len(replies))
    state.load(replies, Sampling(seed=0, control=frozenset()))
    assert state.groups is not None
    offsets, prefixes = state.groups.row_offsets.tolist(), state.groups.prefix_length.tolist()
    assert offsets[0] == 0 and offsets[-1] == state.size and len(offsets) == state.size + 1
    for start, end, prefix in zip(offsets[:-1], offsets[1:], prefixes, strict=True):
        rows = replies[start : min(end, len(replies))]
        assert prefix % 8 == 0 and (len(rows) > 1 or prefix == 0)
        assert len({tuple(reply.sequence.pages[: prefix // 8]) for reply in rows}) <= 1
    assert sorted(prefix for prefix in prefixes if prefix) == [16, 32]
    finish(engine, replies, Sampling(seed=3, control=frozenset()))
    for reply in replies:
        whole = [*reply.view, *reply.ids]
        assert reply.logp == pytest.approx(logp_of(decoder, whole, reply.agent, len(reply.view)), abs=1e-5)
    state.load(alone, Sampling(seed=0, control=frozenset()))
    assert state.groups is None


def test_what_was_captured_lasts_until_something_moves() -> None:
    decoder = tiny.random_decoder()
    engine, memory, replies = started(decoder, [20, 5])
    replays = memory.replays
    tiny.randomise_adapters(decoder, seed=9)  # in place: a graph would read the new values where the old ones were
    engine.refresh()
    assert memory.replays is replays
    decoder.layers[0].mlp.up_proj.weight.data = decoder.layers[0].mlp.up_proj.weight.data.clone()
    engine.refresh()
    assert memory.replays is not replays


def test_the_choice_of_attention_is_explained(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cpu")
    with caplog.at_level("INFO"):
        name, reason = choose_paged_attention(device, torch.float32, 48, 24)
        choose_paged_attention(device, torch.float32, 48, 24)
    assert name == "kernels" and "flash_attn: it needs a CUDA device" in reason and "varlen_attn: it needs" in reason
    assert len([r for r in caplog.records if "attention over pages on cpu: kernels" in r.message]) <= 1


def refused(*arguments: Any) -> Any:
    raise RuntimeError("page tables need another build\nwith more to say")


def too_far(q: Tensor, k: Tensor, v: Tensor, table: Tensor, *places: Any) -> Tensor:
    """Reads behind what was written, as either function."""
    if len(places) == 1:
        return paged_decode_attention(q, k, v, table, places[0] + 1)
    return paged_prefill_attention(q, k, v, table, places[0], places[1] + 1)


def without_a_number(q: Tensor, *arguments: Any) -> Tensor:
    return torch.full_like(q, torch.nan)


def of_another_order(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """The last page first."""
    return paged_decode_attention(q, k, v, table.flip(1).contiguous(), lengths)


@pytest.mark.parametrize(
    ("prefill", "decode", "problem"),
    [
        (None, None, None),
        (refused, None, "page tables need another build$"),
        (None, refused, "page tables need another build$"),
        (too_far, None, "off by"),
        (None, too_far, "off by"),
        (without_a_number, None, "off by nan"),
        (None, of_another_order, "off by"),
    ],
)
def test_a_library_is_tried_before_it_is_chosen(prefill: Any, decode: Any, problem: str | None) -> None:
    ours = _kernels()
    where: tuple[Any, ...] = (torch.device("cpu"), torch.float32, 64, 16)
    found = _trial(prefill or ours[0], decode or ours[1], *where)
    assert found is None if problem is None else found is not None and re.search(problem, found)


@pytest.mark.parametrize("seed", [0, -5, 2**63 + 7, 2**64 - 1])
def test_a_state_draws_with_its_runs_seed(seed: int) -> None:
    """The same as with the seed as a number, and another one's on the same state."""
    _, memory, replies = started(tiny.random_decoder(), [20, 5, 13])
    state = memory.replays._state(len(replies))
    drawn = {}
    for used in (seed, 11):
        state.load(replies, Sampling(seed=used, control=frozenset()))
        state.step(0, memory.replays._temperatures(state, replies))
        drawn[used] = state.tokens[0].clone()
        generator = {"seed": used, "sequence_id": state.noise_id, "position": state.position}
        logits = state.forward.logits(state.forward(*_fed(state, replies), state.agents, state))
        assert torch.equal(drawn[used], sample_with_logprob(logits, **generator)[0])
    assert not torch.equal(drawn[seed], drawn[11])


def _fed(state: DecodeState, replies: list[PartialReply]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the state was fed at its first step: tokens and positions."""
    empty = [0] * (state.size - len(replies))
    tokens = torch.tensor([reply.ids[-1] for reply in replies] + empty)
    return tokens, torch.tensor([reply.sequence.length for reply in replies] + empty)
