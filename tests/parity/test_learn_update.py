"""Updates that a plain implementation checks in parts: micro-batches, truncated importance weights, other teachers."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import replace

import pytest
import torch

from coars_fast.config_checks import check
from coars_fast.data.records import Trajectory
from coars_fast.errors import ConfigError, NonFiniteError, RunFolderError
from coars_fast.learn.packing import pack, split
from coars_fast.learn.step import Learner
from coars_fast.learn.two_stream import two_stream
from coars_kernels import linear_logprob, paired_linear_logprob
from tests import tiny
from tests.conversations import VOCAB, as_sampled, conversations
from tests.parity.test_learn_gradients import assert_close, settings, update, with_train


@pytest.fixture(scope="module")
def found() -> list[Trajectory]:
    return as_sampled(tiny.random_decoder(), conversations(11, 6, (2, 5)))


def budget_for(found: list[Trajectory], parts: int) -> int:
    """A budget that makes so many micro-batches."""
    for budget in range(max(t.num_tokens for t in found), 10**5):
        if len(split(found, budget)) == parts:
            return budget
    raise AssertionError(parts)


@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("objective", ["clipped", "gspo", "faithful"])
def test_one_two_and_five_micro_batches_have_the_same_gradient(
    found: list[Trajectory], objective: str, parts: int
) -> None:
    moved = tiny.shifted(found, 0.1)
    config = settings(objective, loss={"credit_center": True, "credit_weight": 1.0})
    whole, metrics = update(moved, config)
    gradients, part_metrics = update(moved, with_train(config, max_tokens=budget_for(moved, parts)))
    assert_close(gradients, whole)
    assert part_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def test_computed_tokens_are_counted_once_however_many_micro_batches(found: list[Trajectory]) -> None:
    for parts in (1, 3):
        _, metrics = update(found, with_train(settings("clipped"), max_tokens=budget_for(found, parts)))
        assert metrics["tokens_student"] == sum(len(t.tokens) for t in found)
        assert metrics["tokens_teacher"] == sum(t.num_teacher_tokens for t in found)


def test_differences_from_the_sampler_are_measured_by_agent(found: list[Trajectory]) -> None:
    moved = [replace(t, behaviour_logp=tuple(p + 0.25 for p in t.behaviour_logp)) if t.agent else t for t in found]
    _, metrics = update(moved, settings("clipped"))
    assert metrics["logp_difference_user"] == pytest.approx(0.25, abs=1e-4)
    assert metrics["logp_difference_rec"] < 1e-5 and metrics["logp_difference_max"] == pytest.approx(0.25, abs=1e-4)


# --------------------------------------------------------------------------------------------------- importance weights


def test_a_truncated_importance_weight_multiplies_each_tokens_term(found: list[Trajectory]) -> None:
    """The loss of a faithful step, token by token, with weights of min(exp(now - sampled), cap)."""
    moved, cap = tiny.shifted(found, 0.4, 3), 1.1
    decoder = tiny.random_decoder()
    config = settings("clipped", loss={"importance_cap": cap, "baseline": "none"})
    gradients, metrics = update(moved, config, copy.deepcopy(decoder))
    assert metrics["clip_fraction"] == 0 and metrics["ratio_mean"] == pytest.approx(1, abs=1e-5)
    batch = pack(moved)
    student, teacher = two_stream(decoder, batch)
    assert teacher is not None
    logp, teacher_logp = paired_linear_logprob(student, teacher, decoder.head_weight, batch.target)
    weight = (logp.detach() - batch.behaviour_logp).exp()
    assert (weight > cap).any() and (weight < 1).any()
    lengths = batch.turn_offsets.diff()
    per_turn = torch.stack([batch.turn_weight / lengths / len({t.episode for t in moved}), batch.turn_reward])
    coefficient, reward = per_turn.repeat_interleave(lengths, 1)
    credit = (teacher_logp - logp.detach()).clamp(-1, 1)
    loss = -(coefficient * weight.clamp(max=cap) * (reward + 0.1 * credit) * logp).sum()
    loss.backward()
    expected = {n: p.grad for n, p in decoder.named_parameters() if p.grad is not None}
    assert_close(gradients, expected)


def test_an_importance_weight_where_sampler_and_trainer_agree_changes_nothing(found: list[Trajectory]) -> None:
    without, _ = update(found, settings("clipped"))
    weighted, _ = update(found, settings("clipped", loss={"importance_cap": 2.0}))
    assert_close(weighted, without, 2e-5)


def test_minibatches_clip_against_the_trainers_own_log_probs_at_the_updates_beginning(
    found: list[Trajectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = tiny.random_decoder()
    config = settings("clipped", loss={"importance_cap": 1.5}, train={"minibatches": 2, "learning_rate": 1e-3})
    learner, seen = Learner(decoder, config), []
    original = Learner._loss

    def watched(self: Learner, batch: object, means: object = None) -> object:
        seen.append(batch)
        return original(self, batch, means)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Learner, "_loss", watched)
    before = copy.deepcopy(decoder)
    learner.update(tiny.shifted(found, 0.2), 0)
    assert len(seen) == 2
    for batch in seen:
        with torch.no_grad():
            student, _ = two_stream(before, batch, teacher=False)
            logp = linear_logprob(student, before.head_weight, batch.target)
        torch.testing.assert_close(batch.old_logp, logp, atol=1e-5, rtol=0)


def test_faithful_takes_no_importance_weight() -> None:
    with pytest.raises(ConfigError, match="loss.importance_cap"):
        check(settings("faithful", loss={"importance_cap": 2.0}))


# ------------------------------------------------------------------------------------------------------- other teachers


def test_at_the_initial_weights_every_teacher_is_the_same(
    found: list[Trajectory], caplog: pytest.LogCaptureFixture
) -> None:
    expected, metrics = update(found, settings("clipped"))
    for kind in ("initial", "ema"):
        with caplog.at_level(logging.INFO, logger="coars_fast.learn.teacher"):
            gradients, other = update(found, settings("clipped", loss={"teacher": kind}))
        assert_close(gradients, expected)
        assert other == pytest.approx(metrics, rel=1e-3, abs=1e-5)
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2 and all("context is computed again" in message for message in messages)


@pytest.mark.parametrize("kind", ["initial", "ema"])
def test_another_teacher_scores_with_its_own_weights(found: list[Trajectory], kind: str) -> None:
    decoder = tiny.random_decoder()
    config = settings("clipped", loss={"teacher": kind, "teacher_decay": 0.5}, train={"learning_rate": 2e-2})
    learner, start = Learner(decoder, config), copy.deepcopy(decoder)
    learner.update(found, 0)
    middle = copy.deepcopy(decoder)
    assert learner.teacher is not None
    names = dict(start.named_parameters())
    now = dict(middle.named_parameters())
    for name, adapter in learner.teacher.adapters.items():
        mean = names[name] if kind == "initial" else (names[name] + now[name]) / 2
        torch.testing.assert_close(adapter, mean.detach(), atol=1e-6, rtol=1e-5)
    scored = learner._with_other_teacher(pack(found))
    assert scored.teacher_logp is not None
    for name, parameter in decoder.named_parameters():  # it left the student's weights as they were
        assert torch.equal(parameter, now[name])
    with torch.no_grad():
        for name, parameter in start.named_parameters():
            if name in learner.teacher.adapters:
                parameter.copy_(learner.teacher.adapters[name])
        _, hidden = two_stream(start, pack(found))
        assert hidden is not None
        logp = linear_logprob(hidden, start.head_weight, scored.target)
    torch.testing.assert_close(scored.teacher_logp, logp, atol=1e-5, rtol=0)


def test_micro_batches_with_another_teacher(found: list[Trajectory]) -> None:
    config = settings("clipped", loss={"teacher": "ema", "credit_center": True, "credit_weight": 1.0})
    whole, _ = update(found, config)
    parts, _ = update(found, with_train(config, max_tokens=budget_for(found, 3)))
    assert_close(parts, whole)


def test_a_teacher_of_another_model_is_not_loaded() -> None:
    learner = Learner(tiny.random_decoder(), settings("clipped", loss={"teacher": "initial"}))
    assert learner.teacher is not None
    good = {name: torch.full_like(t, 0.5) for name, t in learner.teacher.adapters.items()}
    learner.teacher.load(good, "there")
    assert all(bool((t == 0.5).all()) for t in learner.teacher.adapters.values())
    for bad in (None, {}, {name: t[:1] for name, t in good.items()}):
        with pytest.raises(RunFolderError, match="there: no teacher of this model"):
            learner.teacher.load(bad, "there")


def test_log_probs_of_a_teacher_that_came_with_the_trajectories_are_taken(
    found: list[Trajectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, batch = tiny.random_decoder(), pack(found)
    with torch.no_grad():
        _, hidden = two_stream(decoder, batch)
        assert hidden is not None
        values = linear_logprob(hidden, decoder.head_weight, batch.target).tolist()
    ready, first = [], 0
    for t in found:
        last = first + len(t.behaviour_logp)
        ready.append(replace(t, teacher_logp=tuple(values[first:last])))
        first = last
    expected, metrics = update(found, settings("clipped"))
    monkeypatch.setattr("coars_fast.learn.two_stream._Branches", None)  # nobody may make one
    gradients, other = update(ready, settings("clipped"))
    assert_close(gradients, expected)
    assert other == pytest.approx(metrics, rel=1e-4, abs=1e-6)


# --------------------------------------------------------------------------------------------------------------- faults


def test_episodes_over_the_budget_are_left_out_and_counted(found: list[Trajectory]) -> None:
    largest = max(found, key=lambda t: t.num_tokens)
    config = with_train(settings("clipped"), max_tokens=largest.num_tokens - 1)
    with pytest.raises(ConfigError, match=f"episode {largest.episode}, which needs {largest.num_tokens}"):
        update(found, config)
    gradients, metrics = update(found, with_train(config, over_budget="drop"))
    assert metrics["episodes_dropped"] == 1
    expected, _ = update([t for t in found if t.episode != largest.episode], config)
    assert_close(gradients, expected)


def test_an_episode_whose_log_probs_are_not_finite_is_named(found: list[Trajectory]) -> None:
    decoder = tiny.random_decoder(tie_word_embeddings=False)
    bad = replace(found[4], tokens=(VOCAB, *found[4].tokens[1:]))
    with torch.no_grad():
        decoder.model.embed_tokens.weight[VOCAB] = math.nan  # a token that nobody else has
    learner = Learner(decoder, settings("clipped"))
    before = {name: p.detach().clone() for name, p in learner.named_parameters().items()}
    with pytest.raises(NonFiniteError, match=rf"log-probs of episodes {bad.episode} are not finite"):
        learner.update([*found[:4], bad, *found[5:]], 0)
    assert all(torch.equal(p, before[name]) for name, p in learner.named_parameters().items())


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        # The gradient's norm overflows, though the loss does not; then the loss does.
        (1e35, "gradient of the rec adapter has norm inf; it comes from episodes 3; no weight"),
        (1e38, "the loss is inf; .* largest weighted reward is .* in episode 3; no weight"),
    ],
)
def test_an_episode_whose_gradient_is_not_finite_is_named(found: list[Trajectory], reward: float, message: str) -> None:
    decoder = tiny.random_decoder()
    learner = Learner(decoder, settings("faithful", train={"max_grad_norm": 1.0}))
    before = {name: p.detach().clone() for name, p in learner.named_parameters().items()}
    t = found[6]
    assert (t.episode, t.agent) == (3, 0)
    huge = replace(t, turns=tuple(replace(turn, reward=reward, weight=1.0) for turn in t.turns))
    with pytest.raises(NonFiniteError, match=message):
        learner.update([*found[:6], huge, *found[7:]], 0)
    assert all(torch.equal(p, before[name]) for name, p in learner.named_parameters().items())
    assert not learner.optimizer.state


def test_nothing_to_learn_from_is_an_error(found: list[Trajectory]) -> None:
    learner = Learner(tiny.random_decoder(), settings("clipped"))
    for nothing in ([], [replace(found[0], turns=(), behaviour_logp=())]):
        with pytest.raises(ValueError, match="no turn to learn from"):
            learner.update(nothing, 0)


def test_a_turn_without_tokens_is_an_error_before_any_weight_changes() -> None:
    found = conversations(0, 2)
    turn = replace(found[0].turns[0], end=found[0].turns[0].start)
    found[0] = replace(found[0], turns=(turn, *found[0].turns[1:]))
    learner = Learner(tiny.random_decoder(), settings("clipped"))
    with pytest.raises(ValueError, match="bad bounds"):
        learner.update(found, 0)
    assert not learner.optimizer.state
