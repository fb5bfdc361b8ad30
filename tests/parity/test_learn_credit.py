"""An update with another form of credit, against the loss written out, and however many micro-batches it has."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from coars_fast.data.records import Trajectory
from coars_fast.game.trajectory import trajectories
from coars_fast.learn.packing import PackedBatch, pack
from coars_fast.learn.step import Learner
from coars_fast.learn.two_stream import two_stream
from coars_kernels import paired_linear_logprob
from tests import tiny
from tests.conversations import as_sampled, conversations
from tests.parity.test_learn_gradients import assert_close, settings, update, with_train
from tests.parity.test_learn_update import budget_for

FORMS = ("gated", "shuffled", "constant")


@pytest.fixture(scope="module")
def found() -> list[Trajectory]:
    return as_sampled(tiny.random_decoder(), conversations(11, 6, (2, 5)))


def credits_in_the_loss(found: list[Trajectory], config: Any, monkeypatch: pytest.MonkeyPatch) -> dict[Any, float]:
    """(episode, agent, n-th token) -> the credit that the loss was given."""
    decoder, seen = tiny.random_decoder(), {}
    original = Learner._loss

    def watched(self: Learner, batch: PackedBatch, means: Any = None) -> Any:
        result, position = original(self, batch, means), {}
        assert batch.teacher_logp is not None
        turns = torch.arange(len(batch.turn_agent)).repeat_interleave(batch.turn_offsets.diff())
        for turn, value in zip(turns.tolist(), (batch.teacher_logp - result.logp).tolist(), strict=True):
            key = batch.episodes[int(batch.branch_parent[turn])], int(batch.turn_agent[turn])
            position[key] = position.get(key, -1) + 1
            seen[*key, position[key]] = value
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "_loss", watched)
        Learner(decoder, config).update(found, 3)
    return seen


def test_the_loss_of_a_faithful_step_behind_the_gate_written_out(found: list[Trajectory]) -> None:
    decoder = tiny.random_decoder()
    gradients, _ = update(found, settings(loss={"credit_form": "gated", "credit_weight": 2.0}), copy.deepcopy(decoder))
    batch = pack(found)
    student, teacher = two_stream(decoder, batch)
    assert teacher is not None
    logp, teacher_logp = paired_linear_logprob(student, teacher, decoder.head_weight, batch.target)
    loss = torch.zeros(())
    for m, (first, last) in enumerate(
        zip(batch.turn_offsets[:-1].tolist(), batch.turn_offsets[1:].tolist(), strict=True)
    ):
        gap = (teacher_logp - logp).detach()[first:last]
        credit = gap.clamp(-1, 1) / (1 + (-gap).exp())
        advantage = batch.turn_reward[m] + 2.0 * credit
        loss = loss - batch.turn_weight[m] / 6 * (advantage * logp[first:last]).mean()
    loss.backward()
    assert_close(gradients, {n: p.grad for n, p in decoder.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("form", FORMS)
def test_one_two_and_five_micro_batches_have_the_same_gradient(found: list[Trajectory], form: str) -> None:
    moved = tiny.shifted(found, 0.1)
    # A random model finds every token unlikely: centred, a constant would leave nothing to compare.
    config = settings("clipped", loss={"credit_form": form, "credit_center": form != "constant", "credit_weight": 1.0})
    whole, metrics = update(moved, config)
    for parts in (2, 5):
        gradients, part_metrics = update(moved, with_train(config, max_tokens=budget_for(moved, parts)))
        assert_close(gradients, whole)
        part_metrics["credit_clip_fraction"] = metrics["credit_clip_fraction"]  # of what is at the clip already
        assert part_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def test_shuffled_credits_are_those_of_the_tokens_and_follow_the_step(
    found: list[Trajectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = budget_for(found, 3)
    given = {
        form: credits_in_the_loss(
            found,
            settings("clipped", loss={"credit_form": form, "credit_center": True}, train={"max_tokens": parts}),
            monkeypatch,
        )
        for form in ("token", "shuffled")
    }
    for agent in (0, 1):
        plain, moved = (
            sorted(min(1.0, max(-1.0, value)) for key, value in given[form].items() if key[1] == agent)
            for form in ("token", "shuffled")
        )
        assert moved == pytest.approx(plain, abs=1e-5)
    assert given["token"] != pytest.approx(given["shuffled"], abs=1e-2)


def test_a_teacher_of_other_weights_gives_every_form(found: list[Trajectory]) -> None:
    for form in FORMS:
        ours, _ = update(found, settings("clipped", loss={"credit_form": form, "credit_weight": 1.0}))
        initial, _ = update(
            found, settings("clipped", loss={"credit_form": form, "credit_weight": 1.0, "teacher": "initial"})
        )
        assert_close(initial, ours, 2e-5)


def test_an_empty_reference_gives_the_gradient_without_credit() -> None:
    decoder = tiny.random_decoder()
    game = replace(tiny.GAME, reference="empty")
    episodes = trajectories(tiny.scripted_episodes(decoder, 4, game=game), game)
    heavy, metrics = update(episodes, settings("clipped", loss={"credit_weight": 3.0}))
    without, _ = update(episodes, settings("clipped", loss={"credit_weight": 0.0}))
    assert metrics["credit_abs_mean"] < 1e-6
    assert_close(heavy, without)
