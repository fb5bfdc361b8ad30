"""The head's registered operations: schema, fake tensors, `torch.compile` without a graph break, loud entropy."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from coars_kernels import fused_credit_loss, linear_logprob, paired_linear_logprob
from coars_kernels.linear_logprob.autograd import head_gradients, head_sweep, refuse_entropy_gradient

R, H, V = 5, 8, 11


def inputs(trainable: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(R, H, generator=generator).requires_grad_()
    weight = torch.randn(V, H, generator=generator).requires_grad_(trainable)
    return states, weight, torch.randint(V, (R,), generator=generator), torch.randn(R, H, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("everything", [False, True])
def test_opcheck(dtype: torch.dtype, everything: bool) -> None:
    states, weight, target, teacher = (t.detach().to(dtype) if t.is_floating_point() else t for t in inputs())
    bias, temperature = torch.randn(V), torch.rand(R) + 0.5
    options = (teacher, weight, bias, target, temperature) if everything else (None, weight, None, target, None)
    torch.library.opcheck(head_sweep, (states, *options, 0.7, 2, not everything, everything, False, "auto"))
    torch.library.opcheck(head_sweep, (states, *options, 0.7, 0, False, everything, True, "auto"))
    given = (torch.randn(R), states, *options[1:], 0.7, 2, True, everything, everything)
    torch.library.opcheck(head_gradients, (*given, None, None))
    torch.library.opcheck(head_gradients, (*given, torch.rand(R, V), torch.rand(R)))
    torch.library.opcheck(refuse_entropy_gradient, (torch.zeros(R), states))


def _single(states: Tensor, weight: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
    return (linear_logprob(states, weight, target, temperature=0.8) ** 2).sum()


def _paired(states: Tensor, weight: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
    logp, teacher_logp = paired_linear_logprob(states, teacher, weight, target)
    return ((logp - teacher_logp) ** 2).sum()


def _fused(states: Tensor, weight: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
    reward, offsets = torch.tensor([1.0, -1.0]), torch.tensor([0, 2, R])
    return fused_credit_loss(states, teacher, weight, target, torch.full((R,), -2.0), reward, offsets).loss


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("function", [_single, _paired, _fused])
def test_compile_without_a_graph_break(function: Callable[..., Tensor], trainable: bool) -> None:
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = []
    for call in (function, compiled):
        states, weight, target, teacher = inputs(trainable)
        loss = call(states, weight, target, teacher)
        loss.backward()
        found.append((loss.detach(), states.grad, weight.grad))
    for eager, other in zip(*found, strict=True):
        assert (eager is None) == (other is None)
        assert eager is None or torch.equal(eager, other)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_entropy_in_a_loss_is_refused_and_a_detached_one_is_not(compiled: bool) -> None:
    def loss(states: Tensor, detach: bool) -> Tensor:
        logp, entropy = linear_logprob(states, weight, target, return_entropy=True)
        return (logp - (entropy.detach() if detach else entropy)).sum()

    states, weight, target, _ = inputs()
    call = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    call(states, True).backward()
    assert states.grad is not None and states.grad.any()
    with pytest.raises(RuntimeError, match="entropy has no gradient"):
        call(states, False).backward()


def test_a_second_derivative_is_refused() -> None:
    states, weight, target, _ = inputs()
    (grad,) = torch.autograd.grad(linear_logprob(states, weight, target).sum(), states, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()
