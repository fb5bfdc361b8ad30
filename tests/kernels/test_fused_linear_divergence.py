"""`fused_linear_divergence` against float64: values, gradients, identities, checks and registration."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coars_kernels import fused_linear_divergence
from coars_kernels.fused_linear_divergence.op import _sweep
from coars_kernels.fused_linear_divergence.reference import KINDS, fused_linear_divergence_reference

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def head(rows: int = 9, vocab: int = 50, size: int = 12, spread: float = 2.0, seed: int = 0) -> tuple[Tensor, ...]:
    """Hidden states of student and teacher, and a weight; logits of a few units, some rows nearly certain."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, size, generator=generator) * spread / size**0.25
    teacher = student + 0.5 * torch.randn(rows, size, generator=generator)
    weight = torch.randn(vocab, size, generator=generator) / size**0.25
    if rows:
        student[0] *= 12.0  # log-probs far below -80
    return student, teacher, weight


def both(function: Any, tensors: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, Tensor]:
    """(divergences, gradient of a weighted sum of them)"""
    student, teacher, weight = tensors
    student = student.detach().clone().requires_grad_()
    value = function(student, teacher, weight, **options)
    rows = torch.linspace(-1.0, 2.0, len(student), dtype=value.dtype, device=value.device)
    (gradient,) = torch.autograd.grad((rows * value).sum(), student)
    return value.detach(), gradient


def sum_of_parts(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float = 1.0) -> Tensor:
    """Norm of the gradient's terms without their signs: where student and teacher agree the terms cancel, and what is
    left of fp32 logits' rounding is a share of the terms, not of their sum."""
    logp, other = (torch.log_softmax(hidden @ weight.T / temperature, -1) for hidden in (student, teacher))
    sizes = (logp.exp() + other.exp()) * (1 + (logp - other).abs())
    return (sizes @ weight.abs()).norm() / temperature


def check(tensors: tuple[Tensor, ...], *, cancels: bool = False, **options: Any) -> None:
    """A kernel's error may exceed the same-dtype reference's by what fp32 explains.

    `cancels`: measure the gradient's error against its terms (`sum_of_parts`).
    """
    value, gradient = both(fused_linear_divergence, tensors, **options)
    assert value.dtype == torch.float32 and gradient.dtype == tensors[0].dtype
    wide = tuple(tensor.double() for tensor in tensors)
    exact_value, exact_gradient = both(fused_linear_divergence_reference, wide, **options)
    usual_value, usual_gradient = both(fused_linear_divergence_reference, tensors, **options)
    scale = exact_value.abs().clamp(min=1.0)
    error, usual = (((x.double() - exact_value).abs() / scale).max() for x in (value, usual_value))
    assert error <= usual + 5e-6
    norm = exact_gradient.norm().clamp(min=1e-6)
    if cancels:
        norm = norm.maximum(sum_of_parts(*wide[:3], temperature=options.get("temperature", 1.0)))
    error, usual = ((x.double() - exact_gradient).norm() / norm for x in (gradient, usual_gradient))
    assert error <= usual + (1e-5 if tensors[0].dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64(kind: str, dtype: torch.dtype, device: str) -> None:
    tensors = tuple(tensor.to(device, dtype) for tensor in head())
    check(tensors, kind=kind)
    check(tensors, kind=kind, temperature=0.7, chunk_rows=4)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 12), vocab=st.integers(1, 40), size=st.integers(1, 16), spread=st.sampled_from([0.0, 1.0, 5.0]),
    seed=st.integers(0, 1000), kind=st.sampled_from(KINDS), chunk_rows=st.integers(1, 13),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
)  # fmt: skip
def test_any_shape(rows: int, vocab: int, size: int, spread: float, seed: int, **options: Any) -> None:
    check(head(rows, vocab, size, spread, seed), cancels=True, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_of_itself_it_is_zero_and_has_no_gradient(kind: str) -> None:
    student, _, weight = head()
    value, gradient = both(fused_linear_divergence, (student, student.clone(), weight), kind=kind)
    assert value.abs().max() <= 1e-6 and gradient.abs().max() <= 1e-5


def test_kinds_are_what_their_names_say() -> None:
    student, teacher, weight = head()
    values = {kind: fused_linear_divergence(student, teacher, weight, kind=kind) for kind in KINDS}
    swapped = fused_linear_divergence(teacher, student, weight, kind="reverse_kl")
    torch.testing.assert_close(values["forward_kl"], swapped)
    assert all((value >= -1e-6).all() for value in values.values())
    assert (values["js"] <= 0.6932).all()
    torch.testing.assert_close(values["js"], fused_linear_divergence(teacher, student, weight, kind="js"))
    log_p, log_t = ((hidden @ weight.T).log_softmax(-1) for hidden in (student, teacher))
    expected = torch.nn.functional.kl_div(log_p, log_t, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(values["forward_kl"], expected)


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher, weight = head()
    value = fused_linear_divergence(student.requires_grad_(), teacher.requires_grad_(), weight)
    value.sum().backward()
    assert teacher.grad is None and student.grad is not None
    with torch.no_grad():
        assert not fused_linear_divergence(student, teacher, weight).requires_grad


def test_no_rows() -> None:
    student, teacher, weight = head(0)
    value = fused_linear_divergence(student.requires_grad_(), teacher, weight)
    value.sum().backward()
    assert value.shape == (0,)


@pytest.mark.parametrize("jacobian", [False, True])
def test_opcheck(jacobian: bool) -> None:
    torch.library.opcheck(_sweep, (*head(), "js", 0.7, 4, jacobian))


def test_compiles_without_a_break() -> None:
    torch.compiler.reset()
    compiled = torch.compile(fused_linear_divergence, fullgraph=True, backend="aot_eager")
    for rows in (3, 8):
        tensors = head(rows)
        for one, other in zip(both(compiled, tensors), both(fused_linear_divergence, tensors), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": torch.zeros(9)}, "student: expected"),
        ({"student": torch.zeros(9, 12, dtype=torch.float64)}, "student: expected dtype"),
        ({"teacher": torch.zeros(8, 12)}, "teacher: expected shape"),
        ({"teacher": torch.zeros(9, 12).half()}, "teacher: expected dtype"),
        ({"weight": torch.zeros(5, 11)}, "weight: expected"),
        ({"weight": torch.zeros(0, 12)}, "weight: the vocabulary is empty"),
        ({"weight": torch.zeros(5, 12, requires_grad=True)}, "weight: requires grad"),
        ({"kind": "kl"}, "kind: expected one of forward_kl, reverse_kl, js"),
        ({"temperature": 0.0}, "temperature: must be positive"),
        ({"chunk_rows": 0}, "chunk_rows: must be at least 1"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    case: dict[str, Any] = {"student": torch.zeros(9, 12), "teacher": torch.zeros(9, 12), "weight": torch.zeros(5, 12)}
    with pytest.raises(ValueError, match=f"^{message}"):
        fused_linear_divergence(**(case | change))
