"""One update against a plain implementation of Eq. 10 to 12: a row per turn, full contexts, full softmax, autograd.

Nothing here is packed, chunked or fused; the loss is written from the paper (and from the definition of each ratio).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from coars_fast.config import Config
from coars_fast.data.records import Trajectory
from coars_fast.learn.objective import Baseline
from coars_fast.learn.step import Learner
from coars_fast.model.decoder import Decoder
from coars_fast.model.lora import adapter_parameters
from tests import tiny

Gradients = dict[str, Tensor]
TOLERANCE = 1e-5
"""Relative error of a parameter's gradient (norm of the difference over norm), fp32."""


def settings(objective: str = "faithful", **changes: Any) -> Config:
    """Changes by section (`loss={...}`); gradients are not scaled down, so that they can be read after an update, and
    credit is not centred unless asked for."""
    config = tiny.tiny_config(objective=objective)
    config = replace(config, loss=replace(config.loss, credit_center=False))
    changes = {"train": {"max_grad_norm": 1e9, "learning_rate": 1e-3, "warmup_steps": 0}} | changes
    sections = {name: replace(getattr(config, name), **fields) for name, fields in changes.items()}
    return replace(config, **sections)


def with_train(config: Config, **fields: Any) -> Config:
    return replace(config, train=replace(config.train, **fields))


def update(found: list[Trajectory], config: Config, decoder: Decoder | None = None) -> tuple[Gradients, dict]:
    """Gradients that an update used, and its metrics."""
    learner = Learner(decoder or tiny.random_decoder(), config)
    metrics = learner.update(found, 0)
    return {n: p.grad.clone() for n, p in learner.named_parameters().items() if p.grad is not None}, metrics


Ratio = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(log-probs, behaviour log-probs, advantages) of a turn -> its terms."""


def faithful(logp: Tensor, behaviour: Tensor, advantage: Tensor) -> Tensor:
    return advantage * logp


def clipped(logp: Tensor, behaviour: Tensor, advantage: Tensor) -> Tensor:
    ratio = (logp - behaviour).exp()
    return torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def cispo(logp: Tensor, behaviour: Tensor, advantage: Tensor) -> Tensor:
    return (logp - behaviour).exp().detach().clamp(0.8, 1.2) * advantage * logp


def gspo(logp: Tensor, behaviour: Tensor, advantage: Tensor) -> Tensor:
    turn_ratio = (logp - behaviour).mean().exp().detach() * (logp - logp.detach()).exp()
    return torch.min(turn_ratio * advantage, turn_ratio.clamp(0.8, 1.2) * advantage)


PLAIN: dict[str, Ratio] = {"faithful": faithful, "clipped": clipped, "cispo": cispo, "gspo": gspo}


def plain(
    found: list[Trajectory],
    objective: str = "faithful",
    *,
    baseline: Baseline = "none",
    credit_weight: float = 0.1,
    kl_weight: float = 0.0,
) -> Gradients:
    """Gradients of -J by the simplest means."""
    decoder = tiny.random_decoder()

    def mean_reward(agent: int, number: int) -> float:
        """What is subtracted from the agent's reply of this number (from 0)."""
        if baseline == "none":
            return 0.0
        turns = [turn for t in found if t.agent == agent for turn in t.turns]
        if baseline == "turn":
            turns = [t.turns[number] for t in found if t.agent == agent and len(t.turns) > number]
        total = sum(turn.weight for turn in turns)
        return sum(turn.weight * turn.reward for turn in turns) / total if total else 0.0

    num_episodes = len({t.episode for t in found})
    loss = torch.zeros(())
    for t in found:
        behaviour = torch.tensor(t.behaviour_logp).split([turn.end - turn.start for turn in t.turns])
        for number, (turn, behaviour_n) in enumerate(zip(t.turns, behaviour, strict=True)):
            context, reply = list(t.tokens[: turn.start]), list(t.tokens[turn.start : turn.end])
            y = len(reply)
            logp = tiny.sequence_logp(decoder, context + reply, t.agent)[-y:]
            with torch.no_grad():
                teacher_context = [*t.tokens[: turn.fork], *turn.reference]
                teacher = tiny.sequence_logp(decoder, teacher_context + reply, t.agent)[-y:]
                base = tiny.sequence_logp(decoder, context + reply, None)[-y:]
            credit = (teacher - logp.detach()).clamp(-1, 1)  # Eq. 10
            advantage = turn.reward - mean_reward(t.agent, number) + credit_weight * credit  # Eq. 12
            difference = base - logp
            terms = PLAIN[objective](logp, behaviour_n, advantage) - kl_weight * (difference.exp() - difference - 1)
            loss = loss - turn.weight / num_episodes * terms.sum() / y  # Eq. 11
    loss.backward()
    named = {n: p for agent in (0, 1) for n, p in adapter_parameters(decoder, agent).items()}
    return {n: p.grad for n, p in named.items() if p.grad is not None}


def assert_close(found: Gradients, expected: Gradients, tolerance: float = TOLERANCE) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < tolerance, (name, float(error))


@pytest.fixture(scope="module")
def episodes() -> list[Trajectory]:
    """Four scripted conversations, behaviour log-probs those of the weights themselves."""
    return tiny.scripted_trajectories(tiny.random_decoder(), 4)


def test_the_fixture_has_all_kinds_of_turns(episodes: list[Trajectory]) -> None:
    turns = [(t.agent, turn) for t in episodes for turn in t.turns]
    assert {agent for agent, _ in turns} == {0, 1}
    assert any(turn.weight == 0 for _, turn in turns)
    assert len({turn.weight for agent, turn in turns if agent == 1}) > 1  # balanced
    for agent in (0, 1):  # second replies that count, beside shorter conversations: the baseline differs by reply
        assert any(len(t.turns) > 1 and t.turns[1].weight for t in episodes if t.agent == agent)
        assert any(len(t.turns) == 1 for t in episodes if t.agent == agent)


def test_faithful_is_equations_10_to_12(episodes: list[Trajectory]) -> None:
    found, _ = update(episodes, settings("faithful"))
    assert_close(found, plain(episodes))


def test_a_heavy_credit_flows_through_the_student_only(episodes: list[Trajectory]) -> None:
    found, metrics = update(episodes, settings("faithful", loss={"credit_weight": 3.0}))
    assert metrics["credit_abs_mean"] > 0.01
    assert_close(found, plain(episodes, credit_weight=3.0))


def test_without_credit_the_teacher_is_not_needed(episodes: list[Trajectory], monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the teacher ran")

    monkeypatch.setattr("coars_fast.learn.two_stream._Branches", unexpected)
    monkeypatch.setattr("coars_fast.learn.step.re_prefill", unexpected)
    found, _ = update(episodes, settings("faithful", loss={"credit_weight": 0.0}))
    assert_close(found, plain(episodes, credit_weight=0.0))


@pytest.mark.parametrize("objective", ["clipped", "cispo", "gspo"])
def test_ratio_objectives_away_from_ratio_1(episodes: list[Trajectory], objective: str) -> None:
    moved = tiny.shifted(episodes, 0.15, seed=2)
    found, metrics = update(moved, settings(objective))
    assert metrics["clip_fraction"] > 0.02
    assert metrics["logp_difference"] > 0.05
    assert_close(found, plain(moved, objective, baseline="turn"))


@pytest.mark.parametrize("objective", ["clipped", "cispo", "gspo"])
def test_at_ratio_1_every_objective_is_faithful_with_a_baseline(episodes: list[Trajectory], objective: str) -> None:
    found, metrics = update(episodes, settings(objective))
    assert metrics["clip_fraction"] == 0 and metrics["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["logp_difference_max"] < 1e-4
    assert_close(found, plain(episodes, "faithful", baseline="turn"), 2e-5)


def test_the_baseline_can_be_switched_either_way(episodes: list[Trajectory]) -> None:
    found = []
    for baseline in ("batch", "turn"):
        with_baseline, _ = update(episodes, settings("faithful", loss={"baseline": baseline}))
        assert_close(with_baseline, plain(episodes, baseline=baseline))
        found.append(with_baseline)
    assert all((found[0][name] - found[1][name]).norm() > 0.01 * found[0][name].norm() for name in found[0])
    batch, _ = update(episodes, settings("clipped", loss={"baseline": "batch"}))
    assert_close(batch, plain(episodes, "clipped", baseline="batch"), 2e-5)
    without, _ = update(episodes, settings("clipped", loss={"baseline": "none"}))
    assert_close(without, plain(episodes, "clipped"), 2e-5)


def test_the_divergence_from_the_base_is_k3(episodes: list[Trajectory]) -> None:
    found, metrics = update(episodes, settings("clipped", loss={"kl_weight": 0.5}))
    assert metrics["kl"] > 1e-3
    assert_close(found, plain(episodes, "clipped", baseline="turn", kl_weight=0.5))


@pytest.mark.parametrize("objective", ["faithful", "clipped", "cispo", "gspo"])
def test_an_update_does_not_depend_on_the_size_of_micro_batches(episodes: list[Trajectory], objective: str) -> None:
    moved = tiny.shifted(episodes, 0.15)
    config = settings(objective, loss={"kl_weight": 0.1})
    whole, metrics = update(moved, config)
    largest = max(t.num_tokens for t in moved)
    for max_tokens in (largest, 2 * largest + 7):
        parts, part_metrics = update(moved, with_train(config, max_tokens=max_tokens))
        assert_close(parts, whole)
        assert part_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("objective", ["faithful", "clipped", "gspo"])
def test_centred_credit_does_not_depend_on_the_size_of_micro_batches(
    episodes: list[Trajectory], objective: str
) -> None:
    config = settings(objective, loss={"credit_center": True, "credit_weight": 1.0})
    whole, metrics = update(episodes, config)
    parts, part_metrics = update(episodes, with_train(config, max_tokens=max(t.num_tokens for t in episodes)))
    assert_close(parts, whole)
    assert part_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    uncentred, _ = update(episodes, settings(objective, loss={"credit_weight": 1.0}))
    assert any(not torch.allclose(uncentred[name], whole[name], rtol=1e-3) for name in whole)


def test_credit_is_centred_unless_the_objective_is_faithful(episodes: list[Trajectory]) -> None:
    for objective in ("faithful", "clipped"):
        by_default, _ = update(episodes, settings(objective, loss={"credit_center": None, "credit_weight": 1.0}))
        chosen = {"credit_center": objective != "faithful", "credit_weight": 1.0}
        expected, _ = update(episodes, settings(objective, loss=chosen))
        assert all(torch.equal(by_default[name], expected[name]) for name in expected)


def test_gradient_checkpointing_changes_nothing(episodes: list[Trajectory]) -> None:
    expected, _ = update(episodes, settings("clipped"))
    decoder = tiny.random_decoder()
    decoder.gradient_checkpointing = True
    found, _ = update(episodes, settings("clipped"), decoder)
    assert_close(found, expected, 1e-6)


def test_excluded_turns_contribute_nothing(episodes: list[Trajectory]) -> None:
    def changed(t: Trajectory) -> Trajectory:
        turns = tuple(replace(turn, reward=7.0) if turn.weight == 0 else turn for turn in t.turns)
        return replace(t, turns=turns)

    others = [changed(t) for t in episodes]
    assert others != episodes
    for objective in ("faithful", "clipped"):
        expected, _ = update(episodes, settings(objective))
        found, _ = update(others, settings(objective))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_counted_turns_reward_does_matter(episodes: list[Trajectory]) -> None:
    first = next(n for n, t in enumerate(episodes) if t.turns[0].weight)
    t = episodes[first]
    other = [*episodes]
    other[first] = replace(t, turns=(replace(t.turns[0], reward=7.0), *t.turns[1:]))
    expected, _ = update(episodes, settings("faithful"))
    found, _ = update(other, settings("faithful"))
    touched = {name for name in expected if not torch.equal(found[name], expected[name])}
    assert touched == {name for name in expected if name.endswith(f".{t.agent}")}


@pytest.mark.parametrize("agent", [0, 1])
def test_an_adapter_learns_from_its_own_agents_turns_only(episodes: list[Trajectory], agent: int) -> None:
    own = [t for t in episodes if t.agent == agent]
    found, metrics = update(own, settings("faithful"))
    for name, gradient in found.items():
        assert bool(gradient.any()) == name.endswith(f".{agent}"), name
    both, _ = update(episodes, settings("faithful"))
    same = {name: g for name, g in both.items() if name.endswith(f".{agent}")}
    assert_close({name: found[name] for name in same}, same)
