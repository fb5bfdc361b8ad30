"""`paired_linear_logprob`: equal to two separate calls, one sweep, no gradient into the teacher."""

from typing import Any

import pytest
import torch

from coars_kernels import linear_logprob, paired_linear_logprob
from coars_kernels.paired_linear_logprob.reference import paired_linear_logprob_reference


def case(rows: int = 37, vocab: int = 211, hidden: int = 32):
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, rows, hidden, generator=generator).unbind()
    weight = torch.randn(vocab, hidden, generator=generator)
    return student, teacher, weight, torch.randint(vocab, (rows,), generator=generator)


@pytest.mark.parametrize("chunk_rows", [1, 8, None])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_two_separate_calls(chunk_rows: int | None, trainable: bool, dtype: torch.dtype) -> None:
    student, teacher, weight, target = case()
    student, teacher, weight = student.to(dtype), teacher.to(dtype), weight.to(dtype)
    bias, temperature, upstream = torch.randn(211), torch.rand(37) + 0.5, torch.randn(37)
    options: dict[str, Any] = {"bias": bias, "temperature": temperature}
    one, w_one = student.clone().requires_grad_(), weight.clone().requires_grad_(trainable)
    t = teacher.clone().requires_grad_()
    logp, teacher_logp = paired_linear_logprob(one, t, w_one, target, chunk_rows=chunk_rows, **options)
    (logp * upstream).sum().backward()
    two, w_two = student.clone().requires_grad_(), weight.clone().requires_grad_(trainable)
    expected = linear_logprob(two, w_two, target, **options)
    (expected * upstream).sum().backward()

    torch.testing.assert_close(logp, expected, rtol=1e-6, atol=2e-6)
    expected_teacher = linear_logprob(teacher, weight, target, **options)
    torch.testing.assert_close(teacher_logp, expected_teacher, rtol=1e-6, atol=2e-6)
    assert t.grad is None and not teacher_logp.requires_grad
    for actual, value in ((one.grad, two.grad), (w_one.grad, w_two.grad)):
        assert (actual is None) == (value is None)
        if actual is not None and value is not None:
            # both sum in fp32 in another order; in bf16 that seldom moves a last bit
            assert (actual - value).norm() <= (1e-5 if dtype == torch.float32 else 1e-3) * value.norm()


def test_against_float64() -> None:
    student, teacher, weight, target = case()
    expected = paired_linear_logprob_reference(student.double(), teacher.double(), weight.double(), target)
    for actual, value in zip(paired_linear_logprob(student, teacher, weight, target), expected, strict=True):
        torch.testing.assert_close(actual.double(), value, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 31, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_rows_give_equal_values_but_for_the_rounding_of_the_product(rows: int, dtype: torch.dtype) -> None:
    # Not bitwise: with several threads the library's product sums a row in an order that depends on where it stands.
    # Logits are fp32 sums of 40 products whatever the inputs' dtype: 8 units in the last place bound that.
    student, _, weight, target = case(rows, 503, 40)
    student, weight = student.to(dtype), weight.to(dtype)
    logp, teacher_logp = paired_linear_logprob(student.requires_grad_(), student.detach(), weight, target, chunk_rows=7)
    allowance = 8 * torch.finfo(torch.float32).eps * logp.detach().abs().clamp(min=1.0)
    assert bool(((logp - teacher_logp).abs() <= allowance).all())


def test_no_rows_and_errors() -> None:
    student, teacher, weight, target = case()
    logp, teacher_logp = paired_linear_logprob(student[:0].requires_grad_(), teacher[:0], weight, target[:0])
    logp.sum().backward()
    assert logp.shape == teacher_logp.shape == (0,)
    with pytest.raises(ValueError, match="^teacher: "):
        paired_linear_logprob(student, teacher[:-1], weight, target)
    with pytest.raises(ValueError, match="^teacher: "):
        paired_linear_logprob(student, teacher.bfloat16(), weight, target)
    with pytest.raises(ValueError, match="^student: "):
        paired_linear_logprob(student[0], teacher, weight, target)
