"""The head's Triton kernels on a GPU, both designs, against float64 of the same inputs."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from coars_kernels.linear_logprob.triton_fused import config_of, fused_masses  # noqa: E402
from coars_kernels.linear_logprob.triton_rows import jacobian_rows, row_masses  # noqa: E402

DEVICE = torch.device("cuda")
LOGP_ERROR = 5e-6
GRADIENT_ERROR = {torch.bfloat16: 2e-3, torch.float16: 5e-4, torch.float32: 1e-5}


class Head(NamedTuple):
    student_RH: Tensor
    teacher_RH: Tensor
    weight_VH: Tensor
    target_R: Tensor


class Outcome(NamedTuple):
    logp_R: Tensor
    entropy_R: Tensor
    teacher_logp_R: Tensor
    jacobian_RH: Tensor
    mass_RV: Tensor


def head_case(rows: int, vocab: int, hidden: int, dtype: torch.dtype) -> Head:
    """Ordinary rows, and among them rows whose target has p > 0.9 and rows whose target has logp < -80."""
    weight = torch.randn(vocab, hidden, device=DEVICE)
    states = torch.randn(2, rows, hidden, device=DEVICE) / hidden**0.5
    target = torch.randint(vocab, (rows,), device=DEVICE)
    direction = weight[target] / weight[target].square().sum(-1, keepdim=True)
    states[:, ::4] += 16 * direction[::4]
    states[:, 1::4] -= 90 * direction[1::4]
    return Head(*states.to(dtype), weight.to(dtype), target)


def expected_of(states: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: Any):
    """logp, entropy and d logp / d states in float64, the gradient without forming 1 - p."""
    heat = temperature.double()[:, None] if isinstance(temperature, Tensor) else temperature
    logits = states.double() @ weight.double().T
    logits = (logits if bias is None else logits + bias.double()) / heat
    logp, share, rows = torch.log_softmax(logits, 1), torch.softmax(logits, 1), torch.arange(len(target))
    others = share.clone()
    others[rows, target] = 0.0
    gradient = (others.sum(1, keepdim=True) * weight[target].double() - others @ weight.double()) / heat
    return logp[rows, target], torch.special.entr(share).sum(1), gradient


def product_with(mass_RV: Tensor, weight_VH: Tensor) -> Tensor:
    if weight_VH.dtype == torch.float32:
        return mass_RV @ weight_VH
    return torch.mm(mass_RV, weight_VH, out_dtype=torch.float32)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, device=DEVICE, dtype=dtype)


def run(
    design: str, head: Head, bias: Tensor | None = None, temperature: float | Tensor = 1.0, **options: Any
) -> Outcome:
    """One chunk through a design: masses, log-probabilities, and the gradient by the library's product."""
    student, teacher, weight, target = head
    mass = poisoned(len(target), len(weight), dtype=weight.dtype)
    asked: dict[str, Any] = {"bias_V": bias, "temperature": temperature}
    if design == "fused":
        result, teacher_logp = fused_masses(
            student, teacher, weight, target, mass_CV=mass, want_entropy=True, **asked, **options
        )
    else:
        logits, teacher_logits = product_with(student, weight.T), product_with(teacher, weight.T)
        if design == "rows in place":
            assert weight.dtype == torch.float32
            mass = logits
        result = row_masses(logits, target, mass_CV=mass, want_entropy=True, **asked, **options)
        teacher_logp = row_masses(teacher_logits, target, mass_CV=None, **asked).logp_C
    jacobian = poisoned(*student.shape, dtype=student.dtype)
    product = product_with(mass, weight)
    jacobian_rows(product, weight, target, result.others_C, result.inverse_C, temperature, jacobian)
    assert result.entropy_C is not None and teacher_logp is not None
    return Outcome(result.logp_C, result.entropy_C, teacher_logp, jacobian, mass)


def assert_outcome(outcome: Outcome, head: Head, bias: Tensor | None = None, temperature: float | Tensor = 1.0) -> None:
    """Log-probs within 5e-6 max(1, |logp|); the gradient by its norm, over all rows and over the hard ones alone."""
    student, teacher, weight, target = head
    logp, entropy, gradient = expected_of(student, weight, target, bias, temperature)
    for actual, states in ((outcome.logp_R, student), (outcome.teacher_logp_R, teacher)):
        expected = expected_of(states, weight, target, bias, temperature)[0]
        assert ((actual.double() - expected).abs() <= LOGP_ERROR * expected.abs().clamp(min=1)).all()
        assert (actual <= 0).all()
    assert ((outcome.entropy_R.double() - entropy).abs() <= 2 * LOGP_ERROR * logp.abs().clamp(min=1)).all()
    for some in (torch.full_like(target, True, dtype=torch.bool), logp > -0.1, logp < -80):
        if some.any():
            error, size = (outcome.jacobian_RH.double() - gradient)[some].norm(), gradient[some].norm()
            # the spacing of the smallest numbers: fp16 has no digits for the gradient of a near-certain token
            limits = torch.finfo(weight.dtype)
            spacing = limits.smallest_normal * limits.eps * gradient[some].numel() ** 0.5
            assert error <= GRADIENT_ERROR[weight.dtype] * size + spacing, (float(error), float(size))


CASES = [
    (design, dtype)
    for design in ("rows", "fused", "rows in place")
    for dtype in (torch.bfloat16, torch.float32)
    if (design, dtype) != ("rows in place", torch.bfloat16)
] + [("rows", torch.float16)]  # fused fp16 masses lose digits near p = 1, as its module says


@pytest.mark.parametrize(("design", "dtype"), CASES)
@pytest.mark.parametrize(
    ("rows", "vocab", "hidden"),
    [(1, 1, 16), (3, 2, 64), (130, 4099, 192), (300, 32000, 256), (77, 1003, 100), (512, 8192, 1024)],
)
def test_against_float64(design: str, dtype: torch.dtype, rows: int, vocab: int, hidden: int) -> None:
    head = head_case(rows, vocab, hidden, dtype)
    assert_outcome(run(design, head), head)


@pytest.mark.parametrize(("design", "dtype"), CASES)
def test_bias_and_temperatures(design: str, dtype: torch.dtype) -> None:
    head = head_case(65, 2003, 128, dtype)
    bias = torch.randn(2003, device=DEVICE)
    bias[::7] = -torch.inf
    bias[head.target_R] = 0.0
    for temperature in (0.7, torch.rand(65, device=DEVICE) + 0.5):
        assert_outcome(run(design, head, bias, temperature), head, bias, temperature)


@pytest.mark.parametrize(("design", "dtype"), CASES)
def test_forbidden_targets_and_rows(design: str, dtype: torch.dtype) -> None:
    head = head_case(8, 301, 64, dtype)
    bias = torch.zeros(301, device=DEVICE)
    bias[head.target_R[:4]] = -torch.inf
    outcome = run(design, head, bias)
    forbidden = torch.isin(head.target_R, head.target_R[:4])
    assert outcome.logp_R[forbidden].isneginf().all() and outcome.logp_R[~forbidden].isfinite().all()
    assert outcome.jacobian_RH.isfinite().all() and outcome.entropy_R.isfinite().all()
    outcome = run(design, head, torch.full_like(bias, -torch.inf))
    assert outcome.logp_R.isneginf().all() and outcome.teacher_logp_R.isneginf().all()
    assert not outcome.jacobian_RH.any() and not outcome.entropy_R.any()


@pytest.mark.parametrize(("design", "dtype"), CASES)
def test_rows_do_not_see_each_other_and_repeats_are_identical(design: str, dtype: torch.dtype) -> None:
    head = head_case(200, 5003, 128, dtype)
    student = head.student_RH.clone()
    student[::2] = torch.nan
    first, second, third = run(design, head), run(design, head), run(design, head._replace(student_RH=student))
    for name in ("logp_R", "entropy_R", "teacher_logp_R", "mass_RV"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    for name in ("logp_R", "entropy_R", "mass_RV"):
        assert torch.equal(getattr(first, name)[1::2], getattr(third, name)[1::2]), name
    assert third.logp_R[::2].isnan().all() and torch.equal(first.teacher_logp_R, third.teacher_logp_R)


@pytest.mark.parametrize("group_rows", [1, 2, 64])
def test_the_order_of_the_tiles_changes_nothing(group_rows: int) -> None:
    head = head_case(300, 3001, 192, torch.bfloat16)
    config = config_of(head.weight_VH)
    first = run("fused", head, config=config)
    again = run("fused", head, config=config._replace(group_rows=group_rows))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("design", ["rows", "fused"])
def test_more_than_2_to_the_31_logits(design: str) -> None:
    rows, vocab, hidden = 66_000, 32_768, 64
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free device memory")
    head = head_case(rows, vocab, hidden, torch.bfloat16)
    student, _, weight, target = head
    mass = torch.empty(rows, vocab, dtype=torch.bfloat16, device=DEVICE)
    if design == "fused":
        result, _ = fused_masses(student, None, weight, target, mass_CV=mass)
    else:
        result = row_masses(product_with(student, weight.T), target, mass_CV=mass)
    last = slice(rows - 64, rows)
    logp, _, gradient = expected_of(student[last], weight, target[last], None, 1.0)
    assert ((result.logp_C[last].double() - logp).abs() <= LOGP_ERROR * logp.abs().clamp(min=1)).all()
    jacobian = poisoned(64, hidden, dtype=torch.bfloat16)
    shares = (result.others_C[last].contiguous(), result.inverse_C[last].contiguous())
    jacobian_rows(product_with(mass[last], weight), weight, target[last].contiguous(), *shares, 1.0, jacobian)
    assert (jacobian.double() - gradient).norm() <= GRADIENT_ERROR[torch.bfloat16] * gradient.norm()
