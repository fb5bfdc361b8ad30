"""`linear_logprob` against float64, its two backward paths, its memory, and its refusals."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coars_kernels import linear_logprob
from coars_kernels.linear_logprob import sweep
from coars_kernels.linear_logprob.reference import linear_logprob_reference
from coars_kernels.linear_logprob.sweep import default_chunk_rows, recompute_gradients, sweep_head

EPS = torch.finfo(torch.float32).eps


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def head_case(rows: int, vocab: int, hidden: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Ordinary rows, and among them rows whose target has p > 0.9 and rows whose target has logp < -80."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, hidden, generator=generator)
    states = torch.randn(rows, hidden, generator=generator) / hidden**0.5
    target = torch.randint(vocab, (rows,), generator=generator)
    direction = weight[target] / weight[target].square().sum(-1, keepdim=True)
    states[::4] += 16 * direction[::4]
    states[1::4] -= 90 * direction[1::4]
    return states.to(dtype), weight.to(dtype), target


def float64_gradients(states: Tensor, weight: Tensor, target: Tensor, upstream: Tensor, **options: Any):
    """logp and the gradients of `(logp * upstream).sum()`, by eager autograd in float64."""
    h, w = states.double().requires_grad_(), weight.double().requires_grad_()
    logp = linear_logprob_reference(h, w, target, **options)
    assert isinstance(logp, Tensor)
    (logp * upstream.double()).sum().backward()
    assert h.grad is not None and w.grad is not None
    return logp.detach(), h.grad, w.grad


def relative(actual: Tensor | None, expected: Tensor) -> float:
    assert actual is not None
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("chunk_rows", [1, 7, 64, None])
@pytest.mark.parametrize("trainable", [False, True])
def test_fp32_is_as_exact_as_eager_fp32(chunk_rows: int | None, trainable: bool) -> None:
    states, weight, target = head_case(41, 211, 48)
    upstream = torch.randn(41)
    expected, expected_h, expected_w = float64_gradients(states, weight, target, upstream)
    assert (expected.exp() > 0.9).any() and (expected < -80).any()

    eager_h, eager_w = states.clone().requires_grad_(), weight.clone().requires_grad_()
    eager = linear_logprob_reference(eager_h, eager_w, target)
    assert isinstance(eager, Tensor)
    (eager * upstream).sum().backward()
    h, w = states.clone().requires_grad_(), weight.clone().requires_grad_(trainable)
    logp = linear_logprob(h, w, target, chunk_rows=chunk_rows)
    (logp * upstream).sum().backward()

    scale = expected.abs().clamp(min=1)
    assert logp.dtype == torch.float32
    allowance = ((eager.detach() - expected).abs() / scale).max() + 4 * EPS
    assert ((logp.detach() - expected).abs() / scale).max() <= allowance
    assert relative(h.grad, expected_h) <= relative(eager_h.grad, expected_h) + 4 * EPS
    if trainable:
        assert relative(w.grad, expected_w) <= relative(eager_w.grad, expected_w) + 4 * EPS
    else:
        assert w.grad is None


@pytest.mark.parametrize("chunk_rows", [24, None])
@pytest.mark.parametrize("trainable", [False, True])
def test_bf16_against_float64_of_the_same_inputs(chunk_rows: int | None, trainable: bool) -> None:
    states, weight, target = head_case(64, 9001, 64, torch.bfloat16)
    ones = torch.ones(64)
    expected, expected_h, expected_w = float64_gradients(states, weight, target, ones)
    assert (expected.exp() > 0.9).any() and (expected < -80).any()
    h, w = states.requires_grad_(), weight.requires_grad_(trainable)
    logp = linear_logprob(h, w, target, chunk_rows=chunk_rows)
    logp.sum().backward()
    assert logp.dtype == torch.float32 and h.grad is not None and h.grad.dtype == torch.bfloat16
    assert ((logp.detach() - expected).abs() <= 5e-6 * expected.abs().clamp(min=1)).all()
    assert relative(h.grad, expected_h) <= 2e-3
    if trainable:
        assert w.grad is not None and w.grad.dtype == torch.bfloat16
        assert relative(w.grad, expected_w) <= 2e-3


def test_bf16_gradient_of_a_general_loss_is_rounded_once() -> None:
    states, weight, target = head_case(64, 2003, 64, torch.bfloat16)
    upstream = torch.randn(64)
    _, expected_h, _ = float64_gradients(states, weight, target, upstream)
    h = states.requires_grad_()
    (linear_logprob(h, weight, target) * upstream).sum().backward()
    assert relative(h.grad, expected_h) <= 2e-3


def test_near_certain_tokens_keep_the_digits_of_their_gradient() -> None:
    # 1 - p is 2e-9 here: formed as 1 - p in fp32 it would be 0
    weight, states = torch.eye(3) * 20.0, torch.tensor([[1.0, 0.0, 0.0]])
    target = torch.tensor([0])
    _, expected, _ = float64_gradients(states, weight, target, torch.ones(1))
    h = states.requires_grad_()
    linear_logprob(h, weight, target).sum().backward()
    assert relative(h.grad, expected) < 1e-5


@pytest.mark.parametrize("chunk_rows", [8, None])
@pytest.mark.parametrize("trainable", [False, True])
def test_bias_and_temperatures(chunk_rows: int | None, trainable: bool) -> None:
    states, weight, target = head_case(30, 97, 24)
    bias, temperature, upstream = torch.randn(97), torch.rand(30) + 0.5, torch.randn(30)
    for value in (0.7, temperature):
        h64, b64 = states.double().requires_grad_(), bias.double().requires_grad_()
        expected = linear_logprob_reference(h64, weight.double(), target, bias=b64, temperature=value)
        assert isinstance(expected, Tensor)
        (expected * upstream).sum().backward()
        h, b = states.clone().requires_grad_(), bias.clone().requires_grad_(trainable)
        logp = linear_logprob(h, weight, target, bias=b, temperature=value, chunk_rows=chunk_rows)
        (logp * upstream).sum().backward()
        torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=1e-5)
        assert h64.grad is not None and b64.grad is not None
        assert relative(h.grad, h64.grad) < 1e-5
        assert b.grad is None or relative(b.grad, b64.grad) < 1e-5
        assert (b.grad is None) == (not trainable)


def test_entropy_and_its_refusal_to_be_trained() -> None:
    states, weight, target = head_case(30, 97, 24)
    bias = torch.zeros(97)
    bias[:5] = -torch.inf
    wide = (states.double(), weight.double(), target)
    expected = linear_logprob_reference(*wide, bias=bias.double(), return_entropy=True)
    h = states.requires_grad_()
    logp, entropy = linear_logprob(h, weight, target, bias=bias, return_entropy=True, chunk_rows=8)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logp.double(), expected[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="entropy"):
        (logp.sum() + 0.01 * entropy.sum()).backward()
    with torch.no_grad():
        assert not linear_logprob(h, weight, target, return_entropy=True)[1].requires_grad


@pytest.mark.parametrize("trainable", [False, True])
def test_forbidden_and_strongly_negative_logits(trainable: bool) -> None:
    states, weight, target = head_case(6, 11, 4)
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    bias = torch.full((11,), -1e4)
    bias[0] = -torch.inf
    h, w = states.requires_grad_(), weight.requires_grad_(trainable)
    logp, entropy = linear_logprob(h, w, target, bias=bias, return_entropy=True)
    assert logp[[0, 5]].isneginf().all() and logp[1:5].isfinite().all() and entropy.isfinite().all()
    logp[1:5].sum().backward()
    assert h.grad is not None and h.grad.isfinite().all()
    nothing = torch.full((11,), -torch.inf)
    assert linear_logprob(states.detach(), weight.detach(), target, bias=nothing).isneginf().all()


@pytest.mark.parametrize("trainable", [False, True])
def test_no_rows(trainable: bool) -> None:
    h, w = torch.zeros(0, 8).requires_grad_(), torch.randn(5, 8).requires_grad_(trainable)
    logp = linear_logprob(h, w, torch.zeros(0, dtype=torch.int64))
    logp.sum().backward()
    assert logp.shape == (0,) and h.grad is not None and h.grad.shape == (0, 8)
    assert not trainable or (w.grad is not None and not w.grad.any())


def test_rows_do_not_see_each_other_and_repeats_are_identical() -> None:
    states, weight, target = head_case(40, 301, 32)
    h = states.clone().requires_grad_()
    logp = linear_logprob(h, weight, target, chunk_rows=16)
    logp.sum().backward()
    again = linear_logprob(states, weight, target, chunk_rows=16)
    assert torch.equal(logp, again)
    poisoned = states.clone()
    poisoned[::2] = torch.nan
    p = poisoned.requires_grad_()
    other = linear_logprob(p, weight, target, chunk_rows=16)
    other.sum().backward()
    assert h.grad is not None and p.grad is not None
    assert torch.equal(other[1::2], logp[1::2]) and torch.equal(p.grad[1::2], h.grad[1::2])


def test_a_trainable_head_keeps_what_fits_a_buffer_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    states, weight, target = head_case(20, 300, 16)
    found = []
    for limit in (4 * 20 * 300, 4 * 20 * 300 - 1):
        monkeypatch.setattr(sweep, "CPU_BUFFER_BYTES", limit)
        h, w = states.clone().requires_grad_(), weight.clone().requires_grad_()
        logp = linear_logprob(h, w, target)
        saved = logp.grad_fn.saved_tensors  # type: ignore[union-attr]
        assert any(x is not None and x.shape == (20, 300) for x in saved) == (limit == 4 * 20 * 300)
        loss = logp.square().sum()
        first = torch.autograd.grad(loss, (h, w), retain_graph=True)
        again = torch.autograd.grad(loss, (h, w))
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
        found.append(first)
    for kept, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(kept, recomputed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [False, True])
def test_full_logits_never_exist(dtype: torch.dtype, trainable: bool) -> None:
    rows, vocab, hidden, chunk = 256, 400, 16, 32
    states, weight, target = head_case(rows, vocab, hidden, dtype)
    h, w = states.requires_grad_(), weight.requires_grad_(trainable)
    with torch.no_grad(), LargestTensor() as largest:
        sweep_head(h, h, w, None, target, 1.0, chunk, want_jacobian=not trainable, want_entropy=False)
        if trainable:
            recompute_gradients(
                torch.ones(rows), h, w, None, target, 1.0, chunk, want_hidden=True, want_weight=True, want_bias=False
            )
    assert largest.numel == chunk * vocab


def test_default_chunks() -> None:
    assert default_chunk_rows(32_000) == 512
    assert default_chunk_rows(100) == 512
    assert default_chunk_rows(10_000_000) == 16
    # On a GPU: whole tiles of 128 rows within the budget, and waves that are nearly full.
    for vocab_size in (1_000, 32_000, 128_256, 151_936, 152_064, 262_144):
        for processors in (108, 114, 132):
            rows = default_chunk_rows(vocab_size, processors)
            assert rows % 128 == 0 and rows > 0
            assert rows == 128 or rows * vocab_size * 6 <= 1100 * 2**20
            tiles = rows // 128 * -(-vocab_size // 256)
            assert tiles / (-(-tiles // processors) * processors) > 0.93 or vocab_size < 32_000


def test_autocast_does_not_lower_the_precision() -> None:
    states, weight, target = head_case(20, 97, 24)
    for trainable in (False, True):
        h, w = states.clone().requires_grad_(), weight.clone().requires_grad_(trainable)
        plain = linear_logprob(h, w, target)
        plain.sum().backward()
        h2 = states.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logp = linear_logprob(h2, w, target)
            logp.sum().backward()
        assert torch.equal(logp, plain)
        assert h.grad is not None and h2.grad is not None and torch.equal(h.grad, h2.grad)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 20),
    vocab=st.integers(1, 30),
    hidden=st.integers(1, 9),
    chunk_rows=st.integers(1, 25),
    trainable=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(rows: int, vocab: int, hidden: int, chunk_rows: int, trainable: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    states, weight = torch.randn(rows, hidden, generator=generator), torch.randn(vocab, hidden, generator=generator)
    target = torch.randint(vocab, (rows,), generator=generator)
    expected, expected_h, expected_w = float64_gradients(states, weight, target, torch.ones(rows))
    h, w = states.requires_grad_(), weight.requires_grad_(trainable)
    logp = linear_logprob(h, w, target, chunk_rows=chunk_rows)
    logp.sum().backward()
    torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=2e-6)
    assert h.grad is not None
    torch.testing.assert_close(h.grad.double(), expected_h, rtol=1e-5, atol=1e-5)
    if trainable:
        assert w.grad is not None
        torch.testing.assert_close(w.grad.double(), expected_w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("hidden", {"hidden": torch.zeros(3)}),
        ("hidden", {"hidden": torch.zeros(3, 4, dtype=torch.float64)}),
        ("weight", {"weight": torch.zeros(5, 3)}),
        ("weight", {"weight": torch.zeros(5, 4, dtype=torch.bfloat16)}),
        ("weight", {"weight": torch.zeros(0, 4)}),
        ("target", {"target": torch.zeros(2, dtype=torch.int64)}),
        ("target", {"target": torch.zeros(3, dtype=torch.int32)}),
        ("target", {"target": torch.tensor([0, 5, 1])}),
        ("target", {"target": torch.tensor([0, -1, 1])}),
        ("bias", {"bias": torch.zeros(4)}),
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": torch.ones(2)}),
        ("temperature", {"temperature": torch.tensor([1.0, 0.0, 1.0])}),
        ("temperature", {"temperature": torch.ones(3, requires_grad=True)}),
        ("chunk_rows", {"chunk_rows": 0}),
        ("path", {"path": "fastest"}),
        ("path", {"path": "fused"}),  # needs a GPU
    ],
)
def test_errors_name_the_argument(argument: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(5, 4),
        "target": torch.zeros(3, dtype=torch.int64),
    }
    linear_logprob(**arguments)
    with pytest.raises(ValueError, match=f"^{argument}: "):
        linear_logprob(**(arguments | change))
