"""The teacher's log-probs by re-prefill, and the invariant that no reference means no credit."""

from __future__ import annotations

from dataclasses import replace

import torch

from coars_fast.data.records import Trajectory
from coars_fast.learn.packing import PackedBatch, pack, teacher_inputs
from coars_fast.learn.step import Learner
from coars_fast.model.attention import PackedAttention
from coars_fast.model.decoder import Decoder
from coars_kernels import paired_linear_logprob
from tests import tiny


def both_logp(decoder: Decoder, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """([R], [R]) log-probs of student and teacher as a training step computes them."""
    inputs = teacher_inputs(batch)
    student = decoder(batch.token_ids, batch.position_ids, PackedAttention(batch.cu_seqlens), batch.agent_ids)
    teacher = decoder(inputs.token_ids, inputs.position_ids, PackedAttention(inputs.cu_seqlens), inputs.agent_ids)
    return paired_linear_logprob(student[batch.rows], teacher[inputs.rows], decoder.head_weight, batch.target)


def without_references(found: list[Trajectory]) -> list[Trajectory]:
    """d is empty: all that a branch holds is the repeated role header."""
    header = tiny.tokens()[1].headers["assistant"]
    return [replace(t, turns=tuple(replace(turn, reference=header) for turn in t.turns)) for t in found]


@torch.no_grad()
def test_the_teacher_scores_each_reply_after_context_and_reference() -> None:
    decoder = tiny.random_decoder()
    found = tiny.scripted_trajectories(decoder, 4)
    _, logp = both_logp(decoder, pack(found))
    expected = []
    for t in found:
        for turn in t.turns:
            reply = t.tokens[turn.start : turn.end]
            whole = [*t.tokens[: turn.fork], *turn.reference, *reply]
            expected.append(tiny.sequence_logp(decoder, whole, t.agent)[-len(reply) :])
    torch.testing.assert_close(logp, torch.cat(expected), atol=2e-5, rtol=0)
    assert {t.agent for t in found} == {0, 1} and len(expected) > 8


@torch.no_grad()
def test_a_reference_matters_and_none_gives_no_credit() -> None:
    decoder = tiny.random_decoder()
    found = tiny.scripted_trajectories(decoder, 4)
    student, teacher = both_logp(decoder, pack(found))
    assert (teacher - student).abs().mean() > 1e-2
    student, teacher = both_logp(decoder, pack(without_references(found)))
    # Not bitwise: the same rows stand in batches of other shapes, and matrix products round differently.
    assert (teacher - student).abs().max() <= 5e-6
    assert (teacher - student).abs().mean() <= 1e-6


@torch.no_grad()
def test_without_a_reference_a_single_turn_has_bitwise_the_same_hidden_states_and_no_credit() -> None:
    """One sequence that ends with the reply: student and teacher then compute the same rows in the same shapes."""
    decoder = tiny.random_decoder()
    t = without_references(tiny.scripted_trajectories(decoder, 1))[0]
    turn = t.turns[0]
    alone = replace(
        t,
        tokens=t.tokens[: turn.end - 1] + t.tokens[turn.end - 1 : turn.end],
        turns=(turn,),
        behaviour_logp=t.behaviour_logp[: turn.end - turn.start],
    )
    batch = pack([alone])
    inputs = teacher_inputs(batch)
    cut = torch.tensor([0, turn.end - 1], dtype=torch.int32)  # the student without its last token, as the branch is
    student = decoder(batch.token_ids[:-1], batch.position_ids[:-1], PackedAttention(cut), batch.agent_ids[:-1])
    teacher = decoder(inputs.token_ids, inputs.position_ids, PackedAttention(inputs.cu_seqlens), inputs.agent_ids)
    assert torch.equal(student[batch.rows], teacher[inputs.rows])
    logp, teacher_logp = paired_linear_logprob(
        student[batch.rows], teacher[inputs.rows], decoder.head_weight, batch.target
    )
    # The head's product rounds by where a row stands once several threads share it.
    assert (logp - teacher_logp).abs().max() <= 8 * torch.finfo(torch.float32).eps * logp.abs().max()


def test_a_step_without_references_is_a_step_without_credit() -> None:
    gradients = []
    for weight in (5.0, 0.0):
        decoder = tiny.random_decoder()
        found = without_references(tiny.scripted_trajectories(decoder, 3))
        config = tiny.tiny_config(objective="faithful")
        config = replace(
            config,
            loss=replace(config.loss, credit_weight=weight),
            train=replace(config.train, max_grad_norm=1e9),
        )
        learner = Learner(decoder, config)
        metrics = learner.update(found, 0)
        assert metrics["credit_abs_mean"] <= 1e-6
        gradients.append({name: p.grad.clone() for name, p in learner.named_parameters().items() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)


def test_no_gradient_reaches_the_teacher() -> None:
    decoder = tiny.random_decoder()
    batch = pack(tiny.scripted_trajectories(decoder, 2))
    student, teacher = both_logp(decoder, batch)
    assert student.requires_grad and not teacher.requires_grad
