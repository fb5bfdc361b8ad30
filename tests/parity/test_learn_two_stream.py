"""The two-stream forward against whole contexts: the same log-probs and gradients, from far fewer tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from coars_fast.data.records import Trajectory
from coars_fast.learn import two_stream as module
from coars_fast.learn.packing import PackedBatch, pack
from coars_fast.learn.two_stream import re_prefill, two_stream
from coars_fast.model.attention import PackedAttention
from coars_fast.model.decoder import Decoder
from coars_fast.model.lora import adapter_parameters
from coars_kernels import paired_linear_logprob
from tests import tiny
from tests.conversations import as_sampled, conversations
from tests.parity.test_learn_gradients import assert_close, plain, settings, update

SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one kv head": {"num_kv_heads": 1},
    "ungrouped": {"num_kv_heads": 4},
    "qwen2, four layers": {"family": "qwen2", "attention_bias": True, "num_layers": 4},
    "llama": {"family": "llama", "tie_word_embeddings": False},
}


def teacher_by_turn(decoder: Decoder, found: list[Trajectory]) -> Tensor:
    """[R] log-probs of each reply after [context, reference], one sequence and one full softmax at a time."""
    values = []
    for t in found:
        for turn in t.turns:
            reply = t.tokens[turn.start : turn.end]
            whole = [*t.tokens[: turn.fork], *turn.reference, *reply]
            values.append(tiny.sequence_logp(decoder, whole, t.agent)[-len(reply) :])
    return torch.cat(values)


def both(decoder: Decoder, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    student, teacher = two_stream(decoder, batch)
    assert teacher is not None
    return paired_linear_logprob(student, teacher, decoder.head_weight, batch.target)


@contextmanager
def counted_rows(decoder: Decoder) -> Iterator[list[tuple[int, bool]]]:
    """(rows, whether gradients are on) of every call of the first layer."""
    calls: list[tuple[int, bool]] = []
    hook = decoder.layers[0].register_forward_pre_hook(
        lambda layer, inputs: calls.append((len(inputs[0]), torch.is_grad_enabled()))
    )
    try:
        yield calls
    finally:
        hook.remove()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_the_teacher_is_that_of_a_full_re_prefill(shape: str, seed: int) -> None:
    decoder = tiny.random_decoder(seed, **SHAPES[shape])
    found = conversations(seed)
    assert {t.agent for t in found} == {0, 1}
    batch = pack(found)
    student, teacher = both(decoder, batch)
    torch.testing.assert_close(teacher, teacher_by_turn(decoder, found), atol=1e-5, rtol=0)
    spoken = torch.tensor([p for t in as_sampled(decoder, found) for p in t.behaviour_logp])
    torch.testing.assert_close(student, spoken, atol=1e-5, rtol=0)
    assert (teacher - student).abs().max() > 1e-2


@pytest.mark.parametrize("turns", [2, 3, 4, 5, 6, 7, 8])
@torch.no_grad()
def test_any_number_of_turns_in_double_precision(turns: int) -> None:
    decoder = tiny.random_decoder().double()
    batch = pack(conversations(turns, 2, (turns, turns)))
    _, teacher = two_stream(decoder, batch)
    assert teacher is not None
    torch.testing.assert_close(teacher, re_prefill(decoder, batch), atol=1e-11, rtol=0)


def test_the_teacher_computes_reference_and_reply_and_nothing_else() -> None:
    decoder, found = tiny.random_decoder(), conversations(5)
    # A reply's last token predicts nothing that is trained, so it is no input.
    inputs = sum(len(turn.reference) + turn.end - turn.start - 1 for t in found for turn in t.turns)
    with counted_rows(decoder) as calls:
        both(decoder, pack(found))
    assert calls == [(sum(len(t.tokens) for t in found), True), (inputs, False)]
    assert inputs == sum(t.num_teacher_tokens for t in found)
    again = sum(turn.fork + len(turn.reference) + turn.end - turn.start - 1 for t in found for turn in t.turns)
    assert again > 2.5 * inputs  # what a re-prefill would be


def test_checkpointing_computes_the_trunk_again_and_no_branch() -> None:
    gradients = []
    for again in (False, True):
        decoder = tiny.random_decoder()
        decoder.gradient_checkpointing = again
        batch = pack(conversations(5))
        with counted_rows(decoder) as calls:
            student, teacher = two_stream(decoder, batch)
            student.square().sum().backward()
        rows = [len(batch.token_ids), len(batch.branch_tokens)]
        assert [count for count, _ in calls] == rows + rows[:1] * again
        assert teacher is not None and not teacher.requires_grad
        gradients.append({n: p.grad for n, p in adapter_parameters(decoder, 0).items()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_nothing_of_the_trunk_is_kept_for_the_branches() -> None:
    kept = []

    class Watched(module.TrunkAttention):
        def __init__(self, inner: Any) -> None:
            super().__init__(inner)
            kept.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TrunkAttention", Watched)
        decoder = tiny.random_decoder()
        decoder.gradient_checkpointing = True
        student, _ = two_stream(decoder, pack(conversations(1)))
        student.sum().backward()
    assert [attend.kept for attend in kept] == [None]


def test_no_gradient_reaches_the_teacher_nor_goes_through_the_trunks_keys() -> None:
    decoder, found = tiny.random_decoder(), conversations(2)
    student, teacher = both(decoder, pack(found))
    assert student.requires_grad and not teacher.requires_grad


@torch.no_grad()
def test_a_branch_reads_its_own_sequence_up_to_the_fork_only() -> None:
    decoder, found = tiny.random_decoder(), conversations(3)
    _, before = both(decoder, pack(found))
    batch = pack(found)
    last = int(batch.cu_seqlens[1])
    fork = int(batch.branch_start[batch.branch_parent == 0].max())
    batch.token_ids[fork:last] = 1  # what follows the last fork of the first sequence
    _, after = both(decoder, batch)
    assert torch.equal(before, after)


@torch.no_grad()
def test_gathered_keys_give_the_same() -> None:
    """What a GPU without Triton does."""
    decoder, batch = tiny.random_decoder(), pack(conversations(4))
    trunk = module.TrunkAttention(PackedAttention(batch.cu_seqlens))
    decoder(batch.token_ids, batch.position_ids, trunk, batch.agent_ids)
    q, k, v = torch.randn(len(batch.branch_tokens), 4, 8), *torch.randn(2, len(batch.branch_tokens), 2, 8)
    attend = module.BranchAttention(batch, trunk)
    expected = attend(0, q, k, v)
    attend.gather = module._Gather(attend.cu_branch, attend.start, attend.length, len(batch.token_ids))
    torch.testing.assert_close(attend(0, q, k, v), expected, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_a_re_prefill_in_pieces_is_the_whole_one() -> None:
    decoder, batch = tiny.random_decoder(), pack(conversations(6))
    expected = re_prefill(decoder, batch)
    for max_tokens in (1, 70, 200):
        torch.testing.assert_close(re_prefill(decoder, batch, max_tokens=max_tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("seed", "turns"), [(0, (2, 4)), (1, (5, 8))])
def test_gradients_of_long_conversations_are_those_of_plain_equations(seed: int, turns: tuple[int, int]) -> None:
    found = as_sampled(tiny.random_decoder(), conversations(seed, 2, turns))
    gradients, metrics = update(found, settings("faithful", loss={"credit_weight": 1.0}))
    assert metrics["credit_abs_mean"] > 0.01
    assert_close(gradients, plain(found, credit_weight=1.0))
    moved = tiny.shifted(found, 0.15, seed)
    gradients, metrics = update(moved, settings("clipped"))
    assert metrics["clip_fraction"] > 0
    assert_close(gradients, plain(moved, "clipped", baseline="turn"))


def test_a_reference_longer_than_the_context_and_a_single_agent() -> None:
    import numpy as np

    from tests.conversations import conversation

    rng = np.random.default_rng(0)
    found = [conversation(rng, 1, 2, episode, longest_reference=80) for episode in range(3)]
    assert any(len(turn.reference) > turn.fork for t in found for turn in t.turns)
    decoder = tiny.random_decoder()
    found = as_sampled(decoder, found)
    gradients, metrics = update(found, settings("faithful"), copy.deepcopy(decoder))
    assert metrics["loss_rec"] == 0 and metrics["logp_difference_user"] < 1e-5
    assert_close({n: g for n, g in gradients.items() if n.endswith(".1")},
                 {n: g for n, g in plain(found).items() if n.endswith(".1")})  # fmt: skip
    assert not any(bool(g.any()) for n, g in gradients.items() if n.endswith(".0"))
