"""The head's log-probabilities for any layout and extreme logits, with uninitialised memory full of NaN.

The yardstick is float64; an error may exceed that of eager fp32 on the same inputs by a few roundings of the values,
and no more.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coars_kernels import fused_credit_loss, linear_logprob, paired_linear_logprob
from coars_kernels.linear_logprob.reference import linear_logprob_reference

EPS = torch.finfo(torch.float32).eps
FEW = settings(max_examples=40, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def _poisoned_memory() -> Iterator[None]:
    """torch fills what it allocates with NaN while deterministic algorithms are asked for."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


KINDS = ("ordinary", "certain", "hopeless", "offset", "negative", "forbidden")


def draw_case(rows: int, vocab: int, hidden: int, kinds: list[str], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, weight, target and bias; each row of one kind, made by moving along its target's direction or along one
    that all tokens share."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, hidden, generator=generator)
    weight[:, 0] = 1.0
    states = torch.randn(rows, hidden, generator=generator) / hidden**0.5
    target = torch.randint(vocab, (rows,), generator=generator)
    direction = weight[target] / weight[target].square().sum(-1, keepdim=True)
    bias = torch.zeros(vocab)
    for row in range(rows):
        kind = kinds[row % len(kinds)]
        if kind == "certain":
            states[row] += 40 * direction[row]
        elif kind == "hopeless":
            states[row] -= 150 * direction[row]
        elif kind == "offset":
            states[row, 0] += 1e4
        elif kind == "negative":
            states[row, 0] -= 1e4
        elif kind == "forbidden":
            bias[int(torch.randint(vocab, (1,), generator=generator))] = -torch.inf
    return states, weight, target, bias


def exact(states: Tensor, weight: Tensor, target: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-probs and the gradient of the finite ones' sum, eagerly; -inf where no token is allowed."""
    h = states.to(dtype, copy=True).requires_grad_()
    logp = linear_logprob_reference(h, weight.to(dtype), target, bias=bias.to(dtype))
    assert isinstance(logp, Tensor)
    finite = logp[logp.isfinite()]
    (grad,) = torch.autograd.grad(finite.sum(), h) if len(finite) else (torch.zeros_like(h),)
    return logp.detach().nan_to_num(nan=-torch.inf, neginf=-torch.inf), grad.nan_to_num()


@FEW
@given(
    rows=st.integers(1, 12), vocab=st.integers(1, 70), hidden=st.integers(2, 17), chunk_rows=st.integers(1, 13),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=6), trainable=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_extreme_logits(
    rows: int, vocab: int, hidden: int, chunk_rows: int, kinds: list[str], trainable: bool, seed: int
) -> None:
    states, weight, target, bias = draw_case(rows, vocab, hidden, kinds, seed)
    expected, expected_grad = exact(states, weight, target, bias, torch.float64)
    eager, eager_grad = exact(states, weight, target, bias, torch.float32)
    h, w = states.clone().requires_grad_(), weight.clone().requires_grad_(trainable)
    logp = linear_logprob(h, w, target, bias=bias, chunk_rows=chunk_rows)
    assert not logp.isnan().any() and (logp <= 0).all()
    assert torch.equal(logp.isneginf(), expected.isneginf())
    finite = expected.isfinite()
    # A logit of size z carries a rounding error of z * EPS, in eager fp32 as here, but not in the same sum's order.
    size = (states.double().abs() @ weight.double().abs().T).amax(1).clamp(min=1)
    allowed = (eager - expected).abs() + 4 * EPS * size
    assert ((logp.detach() - expected).abs() <= allowed)[finite].all()
    if finite.any():
        logp[finite].sum().backward()
        assert h.grad is not None
        scale = weight.double().abs().amax() * size[:, None]
        assert ((h.grad - expected_grad).abs() <= (eager_grad - expected_grad).abs() + 8 * EPS * scale)[finite].all()
        if trainable:
            assert w.grad is not None and w.grad.isfinite().all()


@FEW
@given(rows=st.integers(0, 12), vocab=st.integers(1, 40), chunk_rows=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_paired_equals_separate_and_rows_do_not_depend_on_their_neighbours(
    rows: int, vocab: int, chunk_rows: int, seed: int
) -> None:
    states, weight, target, bias = draw_case(rows, vocab, 6, ["ordinary", "certain", "hopeless"], seed)
    teacher = states.flip(0).contiguous()
    logp, teacher_logp = paired_linear_logprob(states, teacher, weight, target, bias=bias, chunk_rows=chunk_rows)
    assert torch.equal(logp, linear_logprob(states, weight, target, bias=bias, chunk_rows=chunk_rows))
    assert torch.equal(teacher_logp, linear_logprob(teacher, weight, target, bias=bias, chunk_rows=chunk_rows))
    spoilt = states.clone()
    spoilt[::2] = torch.nan
    again = linear_logprob(spoilt, weight, target, bias=bias, chunk_rows=chunk_rows)
    assert torch.equal(again[1::2], logp[1::2])


@FEW
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6), weights=st.lists(st.sampled_from([0.0, 0.3, 1.0]),
    min_size=6, max_size=6), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_the_whole_head_over_turn_layouts(lengths: list[int], weights: list[float], seed: int) -> None:
    """Turns of any length, weight 0 among them, whose rewards and log-probs are NaN; gradients against float64."""
    rows, turns = sum(lengths), len(lengths)
    states, weight, target, _ = draw_case(rows, 23, 6, ["ordinary", "certain"], seed)
    teacher = torch.randn(rows, 6)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    turn_weight = torch.tensor(weights[:turns])
    left_out = (turn_weight == 0).repeat_interleave(torch.tensor(lengths))
    reward = torch.randn(turns).masked_fill(turn_weight == 0, torch.nan)
    with torch.no_grad():
        behaviour = (linear_logprob(states, weight, target) + 0.1 * torch.randn(rows)).masked_fill(left_out, torch.nan)

    def run(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        h = states.to(dtype, copy=True).requires_grad_()
        options = {"turn_weight": turn_weight.to(dtype)}
        if dtype == torch.float32:
            loss = fused_credit_loss(h, teacher, weight, target, behaviour, reward, offsets, **options).loss
        else:
            from coars_kernels.fused_credit_loss.reference import fused_credit_loss_reference

            inputs = (teacher.to(dtype), weight.to(dtype), target, behaviour.to(dtype), reward.to(dtype))
            loss, _ = fused_credit_loss_reference(h, *inputs, offsets, **options)
        (grad,) = torch.autograd.grad(loss, h)
        return loss.detach(), grad

    (loss, grad), (expected, expected_grad) = run(torch.float32), run(torch.float64)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-3, atol=1e-5)
    assert not grad[left_out].any()
