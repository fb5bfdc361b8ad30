"""Twenty steps of training through the public head operation and through its reference: the same adapters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from coars_fast.learn import step as learn_step
from coars_fast.learn.step import Learner
from coars_fast.model.lora import adapter_state
from coars_kernels import FusedCreditLoss
from coars_kernels.fused_credit_loss.reference import fused_credit_loss_reference
from coars_kernels.linear_logprob.reference import linear_logprob_reference
from tests import tiny

STEPS = 20


def reference(student: Any, teacher: Any, weight: Any, target: Any, *args: Any, **options: Any) -> FusedCreditLoss:
    """The reference with what else the public operation returns."""
    loss, metrics = fused_credit_loss_reference(student, teacher, weight, target, *args, **options)
    with torch.no_grad():
        logp = linear_logprob_reference(student, weight, target)
    assert isinstance(logp, torch.Tensor)
    return FusedCreditLoss(loss, metrics, logp, None)


def train(objective: str, **loss: Any) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, float]]]:
    """Adapters and metrics after twenty steps on the same episodes, whose log-probs are off so that ratios matter."""
    decoder = tiny.random_decoder()
    config = tiny.tiny_config(objective=objective)
    config = replace(
        config,
        loss=replace(config.loss, **loss),
        train=replace(config.train, learning_rate=1e-3, warmup_steps=0, num_steps=STEPS),
    )
    learner = Learner(decoder, config)
    batches = [tiny.shifted(tiny.scripted_trajectories(decoder, 4, seed=n), 0.2, n) for n in range(4)]
    metrics = [learner.update(batches[n % len(batches)], n) for n in range(STEPS)]
    return [adapter_state(decoder, agent) for agent in (0, 1)], metrics


@pytest.mark.parametrize(
    ("objective", "loss"),
    [("clipped", {"kl_weight": 0.05, "dual_clip": 3.0}), ("faithful", {"credit_center": True}), ("gspo", {})],
)
def test_training_goes_the_same_way_with_the_reference(
    objective: str, loss: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = [adapter_state(tiny.random_decoder(), agent) for agent in (0, 1)]
    found, metrics = train(objective, **loss)
    monkeypatch.setattr(learn_step, "fused_credit_loss", reference)
    monkeypatch.setattr(learn_step, "linear_logprob", linear_logprob_reference)
    expected, expected_metrics = train(objective, **loss)
    for agent in (0, 1):
        moved = torch.cat([(expected[agent][k] - start[agent][k]).flatten() for k in start[agent]])
        apart = torch.cat([(expected[agent][k] - found[agent][k]).flatten() for k in start[agent]])
        assert moved.norm() > 0.1, "twenty steps go somewhere"
        assert apart.norm() < 1e-3 * moved.norm()
    for one, other in zip(metrics, expected_metrics, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one["credit_mean"] == pytest.approx(other["credit_mean"], abs=1e-4)
