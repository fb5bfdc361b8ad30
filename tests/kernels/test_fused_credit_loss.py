"""`fused_credit_loss` against eager float64 from hidden states to loss, and the package's own surface."""

import inspect
from typing import Any

import pytest
import torch

import coars_kernels
from coars_kernels import credit_policy_loss, fused_credit_loss, linear_logprob
from coars_kernels.credit_policy_loss.reference import OBJECTIVES
from coars_kernels.fused_credit_loss.reference import fused_credit_loss_reference


def case(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    student = torch.randn(20, 16, generator=generator)
    weight = torch.randn(53, 16, generator=generator) / 4
    target = torch.randint(53, (20,), generator=generator)
    behaviour = linear_logprob(student, weight, target) + 0.2 * torch.randn(20, generator=generator)
    return {
        "student": student.to(dtype),
        "teacher": (student + 0.3 * torch.randn(20, 16, generator=generator)).to(dtype),
        "weight": weight.to(dtype),
        "target": target,
        "behaviour_logp": behaviour.to(torch.promote_types(dtype, torch.float32)),
        "turn_reward": torch.randn(4, generator=generator),
        "turn_offsets": torch.tensor([0, 6, 6, 11, 20], dtype=torch.int32),
        "turn_agent": torch.tensor([0, 1, 0, 1]),
    }


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_against_float64(objective: str, with_teacher: bool, trainable: bool) -> None:
    results = []
    options: dict[str, Any] = {"objective": objective, "temperature": 0.8, "credit_center": True, "credit_weight": 0.5}
    for dtype, function in ((torch.float32, fused_credit_loss), (torch.float64, fused_credit_loss_reference)):
        arguments = case(dtype)
        arguments["student"].requires_grad_()
        arguments["weight"].requires_grad_(trainable)
        if not with_teacher:
            arguments["teacher"] = None
        result = function(**arguments, **options)
        result[0].backward()
        assert with_teacher or result[1]["credit_abs_mean"] == 0
        results.append((result[0], arguments["student"].grad, arguments["weight"].grad, result[1]))
    (loss, grad, weight_grad, metrics), (expected, expected_grad, expected_weight_grad, expected_metrics) = results
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-6)
    if trainable:
        torch.testing.assert_close(weight_grad.double(), expected_weight_grad, rtol=1e-5, atol=1e-6)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        assert float(value) == pytest.approx(float(expected_metrics[name]), rel=1e-4, abs=1e-5), name


def test_is_its_two_halves() -> None:
    arguments = case()
    arguments["student"].requires_grad_()
    result = fused_credit_loss(**arguments, chunk_rows=3)
    assert result.teacher_logp is not None
    turns: dict[str, Any] = {name: arguments[name] for name in ("turn_reward", "turn_offsets", "turn_agent")}
    loss, _ = credit_policy_loss(result.logp, result.teacher_logp, arguments["behaviour_logp"], **turns)
    assert torch.equal(loss, result.loss.detach())
    assert not result.logp.requires_grad and not result.teacher_logp.requires_grad
    arguments["teacher"] = arguments["teacher"][:3]
    with pytest.raises(ValueError, match="^teacher: "):
        fused_credit_loss(**arguments)
    arguments["teacher"] = None
    assert fused_credit_loss(**arguments).teacher_logp is None


def test_public_names() -> None:
    assert coars_kernels.__version__ == "0.1.0"
    assert all(hasattr(coars_kernels, name) for name in coars_kernels.__all__)


def test_options_are_exactly_the_keywords_of_the_loss() -> None:
    parameters = inspect.signature(credit_policy_loss).parameters.values()
    keywords = {parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
    assert set(coars_kernels.CreditOptions.__annotations__) == keywords
