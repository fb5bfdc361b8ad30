"""The public head operations on a GPU, on both paths: values, gradients, chunks, memory, no waiting for the device."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

import coars_kernels  # noqa: E402
from coars_kernels import fused_credit_loss, linear_logprob, paired_linear_logprob  # noqa: E402
from coars_kernels.linear_logprob.reference import linear_logprob_reference  # noqa: E402

DEVICE = torch.device("cuda")
ERROR = {torch.bfloat16: 2e-3, torch.float16: 1e-3, torch.float32: 1e-5}
CASES = [(path, dtype) for path in ("library", "fused") for dtype in (torch.bfloat16, torch.float32)]


def case(rows: int, vocab: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, teacher's states, weight and targets, with certain and hopeless targets among them."""
    weight = torch.randn(vocab, hidden, device=DEVICE)
    states = torch.randn(rows, hidden, device=DEVICE) / hidden**0.5
    target = torch.randint(vocab, (rows,), device=DEVICE)
    direction = weight[target] / weight[target].square().sum(-1, keepdim=True)
    states[::4] += 16 * direction[::4]
    states[1::4] -= 90 * direction[1::4]
    teacher = states.flip(0)
    return states.to(dtype), teacher.to(dtype), weight.to(dtype), target


def exact(states: Tensor, weight: Tensor, target: Tensor, upstream: Tensor, **options: Any):
    """logp and gradients in float64."""
    h, w = states.double().requires_grad_(), weight.double().requires_grad_()
    logp = linear_logprob_reference(h, w, target, **options)
    assert isinstance(logp, Tensor)
    return logp.detach(), *torch.autograd.grad((logp * upstream.double()).sum(), (h, w))


def relative(found: Tensor | None, expected: Tensor) -> float:
    assert found is not None
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(("path", "dtype"), CASES)
@pytest.mark.parametrize("vocab", [997, 4096])
def test_values_and_gradients_over_several_chunks(path: str, dtype: torch.dtype, vocab: int, trainable: bool) -> None:
    states, teacher, weight, target = case(300, vocab, 192, dtype)
    upstream, bias = torch.randn(300, device=DEVICE), torch.randn(vocab, device=DEVICE)
    options: dict[str, Any] = {"bias": bias, "temperature": 0.8}
    expected, expected_h, expected_w = exact(states, weight, target, upstream, **options)
    expected_teacher, _, _ = exact(teacher, weight, target, upstream, **options)
    h, w = states.requires_grad_(), weight.requires_grad_(trainable)
    logp, teacher_logp = paired_linear_logprob(h, teacher, w, target, chunk_rows=128, path=path, **options)
    (logp * upstream).sum().backward()
    assert ((logp.detach() - expected).abs() <= 5e-6 * expected.abs().clamp(min=1)).all()
    assert ((teacher_logp - expected_teacher).abs() <= 5e-6 * expected_teacher.abs().clamp(min=1)).all()
    assert relative(h.grad, expected_h) <= ERROR[dtype]
    if trainable:
        assert relative(w.grad, expected_w) <= 2 * ERROR[dtype]


@pytest.mark.parametrize(("path", "dtype"), CASES)
def test_paired_and_separate_calls_are_equal(path: str, dtype: torch.dtype) -> None:
    states, teacher, weight, target = case(200, 1003, 64, dtype)
    logp, teacher_logp = paired_linear_logprob(states, teacher, weight, target, path=path)
    assert torch.equal(logp, linear_logprob(states, weight, target, path=path))
    assert torch.equal(teacher_logp, linear_logprob(teacher, weight, target, path=path))


@pytest.mark.parametrize("path", ["library", "fused"])
def test_nothing_waits_for_the_device(path: str) -> None:
    states, teacher, weight, target = case(512, 1024, 64, torch.bfloat16)
    reward, offsets = torch.randn(8, device=DEVICE), torch.arange(0, 513, 64, device=DEVICE)
    behaviour = linear_logprob(states, weight, target).detach()
    for debug in ("default", "error"):  # the first round compiles and loads kernels, which may wait
        torch.cuda.set_sync_debug_mode(debug)
        try:
            h = states.clone().requires_grad_()
            result = fused_credit_loss(h, teacher, weight, target, behaviour, reward, offsets, path=path)
            result.loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert h.grad is not None and h.grad.isfinite().all()


@pytest.mark.parametrize("path", ["library", "fused"])
def test_memory_at_a_large_vocabulary(path: str) -> None:
    states, teacher, weight, target = case(4096, 152_064, 256, torch.bfloat16)
    h = states.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logp, _ = paired_linear_logprob(h, teacher, weight, target, path=path)
    logp.sum().backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1.5e9


def test_compiles_without_a_graph_break() -> None:
    states, _, weight, target = case(64, 500, 64, torch.bfloat16)

    def loss(h: Tensor) -> Tensor:
        return (linear_logprob(h, weight, target) ** 2).mean()

    found = []
    for call in (loss, torch.compile(loss, fullgraph=True)):
        h = states.clone().requires_grad_()
        call(h).backward()
        assert h.grad is not None
        found.append(h.grad)
    torch.testing.assert_close(*found)


def test_values_are_checked_where_asked_for() -> None:
    states, _, weight, target = case(8, 50, 16, torch.bfloat16)
    target[3] = 50
    with coars_kernels.checked_values(), pytest.raises(ValueError, match="^target: "):
        linear_logprob(states, weight, target)
