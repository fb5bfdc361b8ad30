"""`coars_kernels::credit_policy_loss` as PyTorch sees it: registration, `torch.compile`, and life without Triton."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coars_kernels import credit_policy_loss
from coars_kernels.credit_policy_loss.op import _loss_and_gradient
from tests.kernels.credit_cases import make_case, operator_arguments

ROOT = Path(__file__).parents[2]
EVERYTHING: dict[str, Any] = {"dual_clip": 3.0, "kl_weight": 0.1, "credit_center": True}
LITTLE = ("logp", "turn_reward", "turn_offsets")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    case = make_case([3, 0, 4, 2])
    case["logp"] = case["logp"].to(dtype)
    torch.library.opcheck(_loss_and_gradient, operator_arguments(case, **EVERYTHING))
    little = {name: case[name] for name in LITTLE}
    torch.library.opcheck(_loss_and_gradient, operator_arguments(little, objective="faithful"))


def value_and_gradient(function: Any, lengths: list[int], **options: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    case = make_case(lengths)
    case["logp"].requires_grad_()
    loss, metrics = function(**case, **options)
    # An upstream gradient other than 1.
    (grad,) = torch.autograd.grad(2.0 * loss, case["logp"])
    return loss.detach(), grad, metrics


def check_compiled(backend: str, calls: list[tuple[list[int], dict[str, Any]]]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(credit_policy_loss, fullgraph=True, backend=backend)
    for lengths, options in calls:
        found = value_and_gradient(compiled, lengths, **options)
        loss, grad, metrics = value_and_gradient(credit_policy_loss, lengths, **options)
        assert torch.equal(found[0], loss) and torch.equal(found[1], grad)
        assert found[2].keys() == metrics.keys()
        assert all(torch.equal(found[2][name], metrics[name]) for name in metrics)


def test_compiles_without_a_break() -> None:
    # Other lengths and another number are compiled a second time, as dynamic ones.
    check_compiled("aot_eager", [([3, 4, 2], EVERYTHING), ([5, 1, 0, 7], EVERYTHING | {"kl_weight": 0.2})])


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiles_with_inductor() -> None:
    check_compiled("inductor", [([3, 4, 2], EVERYTHING)])


def test_no_second_derivative() -> None:
    case = make_case([3, 2])
    case["logp"].requires_grad_()
    loss, _ = credit_policy_loss(**case)
    (grad,) = torch.autograd.grad(loss, case["logp"], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), case["logp"])


def test_without_gradients() -> None:
    case = make_case([3, 2])
    expected, _ = credit_policy_loss(**case)
    case["logp"].requires_grad_()
    with torch.no_grad():
        loss, _ = credit_policy_loss(**case)
    assert torch.equal(loss, expected) and not loss.requires_grad
    with torch.inference_mode():
        loss, _ = credit_policy_loss(**{name: value.clone() for name, value in case.items()})
    assert torch.equal(loss, expected)
    case["logp"] = case["logp"].bfloat16().detach().requires_grad_()
    credit_policy_loss(**case)[0].backward()
    assert case["logp"].grad.dtype == torch.bfloat16


def test_triton_is_not_needed_to_import() -> None:
    program = "import sys, coars_kernels; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": str(ROOT / "kernels")}, check=True)
