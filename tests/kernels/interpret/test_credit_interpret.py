"""The Triton kernels of `credit_policy_loss` in the interpreter against float64, with blocks that turns outgrow."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from coars_kernels.credit_policy_loss import triton_credit
from coars_kernels.credit_policy_loss.reference import METRICS, OBJECTIVES, credit_policy_loss_reference
from tests.kernels.credit_cases import (
    Case,
    Results,
    assert_close,
    check_kernels,
    expected_results,
    make_case,
    operator_arguments,
    poison,
)

BLOCK = 32
# No token, one, some, a block exactly, one over, and two blocks with a rest.
LENGTHS = [0, 1, 5, BLOCK, BLOCK + 1, 2 * BLOCK + 7]
RATIO_OBJECTIVES = ("clipped", "gspo")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_credit, "BLOCK_TOKENS", BLOCK)


def launch(case: Case, **options: Any) -> Results:
    return Results(*triton_credit.credit_policy_loss_triton(*operator_arguments(case, **options)))


def dual_clip_of(objective: str) -> float | None:
    return 1.1 if objective in RATIO_OBJECTIVES else None


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_everything_at_once(objective: str) -> None:
    case = make_case(LENGTHS, seed=3)
    case["turn_weight"] = torch.tensor([0.3, 0.2, 0.0, 0.4, 0.1, 0.2])
    # Every second number of a longer row: nothing may rely on neighbours.
    case = {name: torch.stack([value, value], 1)[:, 0] for name, value in poison(case).items()}
    check_kernels(
        launch, case, objective=objective, credit_center=True, credit_weight=0.7, credit_clip=0.8, clip_low=0.1,
        clip_high=0.3, dual_clip=dual_clip_of(objective), importance_cap=1.2, kl_weight=0.3,
    )  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nothing_optional(objective: str) -> None:
    given = {"logp", "turn_reward", "turn_offsets"} | ({"behaviour_logp"} if objective != "faithful" else set())
    case = {name: value for name, value in make_case([BLOCK + 3, 2, 0]).items() if name in given}
    found = check_kernels(launch, case, objective=objective)
    assert len(found.metrics) == 11


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.sampled_from(LENGTHS), max_size=4),
    objective=st.sampled_from(OBJECTIVES),
    absent=st.sets(st.sampled_from(["teacher_logp", "old_logp", "reference_logp", "turn_weight", "turn_agent"])),
    center=st.booleans(),
    kl_weight=st.sampled_from([0.0, 0.2]),
    offsets=st.sampled_from([torch.int32, torch.int64]),
    agents=st.sampled_from([torch.bool, torch.int8, torch.int32, torch.int64]),
    seed=st.integers(0, 1000),
)
def test_any_layout(
    lengths: list[int],
    objective: str,
    absent: set[str],
    center: bool,
    kl_weight: float,
    offsets: torch.dtype,
    agents: torch.dtype,
    seed: int,
) -> None:
    case = {name: value for name, value in make_case(lengths, seed).items() if name not in absent}
    case["turn_offsets"] = case["turn_offsets"].to(offsets)
    if "turn_agent" in case:
        case["turn_agent"] = case["turn_agent"].to(agents)
    if "reference_logp" in absent:
        kl_weight = 0.0
    check_kernels(
        launch, case, objective=objective, credit_center=center, kl_weight=kl_weight, dual_clip=dual_clip_of(objective)
    )


def next_below(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(0)))


def ratio_in_both(log_ratio: float) -> float | None:
    """exp in fp32, if torch and numpy (the interpreter's arithmetic) round it alike."""
    value = torch.tensor(log_ratio).exp().item()
    return value if value == float(np.exp(np.float32(log_ratio))) else None


def exact_ratio() -> tuple[float, float]:
    """A log-ratio and its ratio, near 1.5."""
    for step in range(100):
        log_ratio = float(np.float32(0.4 + step / 1000))
        ratio = ratio_in_both(log_ratio)
        if ratio is not None:
            return log_ratio, ratio
    raise AssertionError("torch and numpy never agree")


def tie_case(log_ratio: float, reward: float) -> Case:
    zero = torch.zeros(2)
    return {
        "logp": zero + log_ratio,
        "behaviour_logp": zero,
        "turn_reward": torch.tensor([reward]),
        "turn_offsets": torch.tensor([0, 2]),
    }


def check_tie(case: Case, share: float, **options: Any) -> None:
    """The kernel's gradient is that of the reference in fp32, where the tie is, and `share` of an unclipped one."""
    logp = case["logp"].clone().requires_grad_()
    loss, _ = credit_policy_loss_reference(
        logp, None, case["behaviour_logp"], case["turn_reward"], case["turn_offsets"], **options
    )
    (grad,) = torch.autograd.grad(loss, logp)
    unclipped = -case["logp"].exp() * case["turn_reward"] / 2
    torch.testing.assert_close(grad, share * unclipped)
    torch.testing.assert_close(launch(case, **options).grad, grad)


def test_a_ratio_on_the_bound_keeps_its_gradient() -> None:
    check_tie(tie_case(0.0, 0.7), 1.0, clip_low=0.0, clip_high=0.0)
    check_tie(tie_case(0.0, -0.7), 1.0, clip_low=0.0, clip_high=0.0)
    log_ratio, ratio = exact_ratio()
    check_tie(tie_case(log_ratio, 0.7), 1.0, clip_high=ratio - 1.0)


def test_products_that_round_alike_share_the_gradient() -> None:
    log_ratio, ratio = exact_ratio()
    bound = next_below(ratio)
    rewards = torch.linspace(0.7, 0.9, 200)
    alike = rewards[rewards * torch.tensor(ratio) == rewards * torch.tensor(bound)]
    check_tie(tie_case(log_ratio, alike[0].item()), 0.5, clip_high=bound - 1.0)


def test_a_term_on_the_dual_clip_shares_the_gradient() -> None:
    log_ratio, ratio = exact_ratio()
    check_tie(tie_case(log_ratio, -0.7), 0.5, dual_clip=ratio)
    check_tie(tie_case(log_ratio, -0.7), 0.0, dual_clip=next_below(ratio))


@pytest.mark.parametrize("argument", ["logp", "teacher_logp", "behaviour_logp", "old_logp", "reference_logp"])
@pytest.mark.parametrize("objective", RATIO_OBJECTIVES)
def test_nan_in_a_turn_that_counts_is_not_hidden(argument: str, objective: str) -> None:
    case = make_case([3, 2])
    case["turn_weight"] = torch.tensor([0.5, 0.5])
    case[argument][1] = math.nan
    options: dict[str, Any] = {"kl_weight": 0.1, "dual_clip": 1.5, "objective": objective}
    found = launch(case, **options)
    assert found.loss.isnan() and found.grad[3:].isfinite().all()
    assert_close(found, expected_results(case, **options))


def test_nan_reaches_no_turn_of_weight_zero_through_the_mean_credit() -> None:
    case = make_case([3, 2])
    case["turn_weight"], case["teacher_logp"][1] = torch.tensor([0.5, 0.0]), math.nan
    found = launch(case, credit_center=True)
    assert found.loss.isnan() and torch.equal(found.grad[3:], torch.zeros(2))
    assert_close(found, expected_results(case, credit_center=True))


def test_values_on_a_bound_are_not_counted_as_clipped() -> None:
    log_ratio, ratio = exact_ratio()
    case = tie_case(log_ratio, -0.7)
    case["logp"][1] = case["behaviour_logp"][1]  # ratio 1
    case["teacher_logp"] = case["logp"] + torch.tensor([0.0, 0.5])
    options: dict[str, Any] = {"dual_clip": ratio, "clip_low": 0.0, "credit_clip": 0.5, "credit_weight": 0.0}
    metrics = dict(zip(METRICS, launch(case, **options).metrics.tolist(), strict=True))
    assert metrics["clip_fraction"] == 0.0 and metrics["credit_clip_fraction"] == 0.0
    assert metrics["credit_mean"] == 0.25


def test_a_divergence_without_weight_may_be_infinite() -> None:
    case = make_case([3, 2])
    case["reference_logp"][1] = 200.0
    found = launch(case)
    assert found.metrics[METRICS.index("kl")] == math.inf
    del case["reference_logp"]
    assert_close(found, expected_results(case)._replace(metrics=found.metrics))


@triton.jit
def expm1_and_k3_kernel(expm1_ptr, k3_ptr, x_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    expm1, k3 = triton_credit._expm1_and_k3(tl.load(x_ptr + index))
    tl.store(expm1_ptr + index, expm1)
    tl.store(k3_ptr + index, k3)


def test_k3_keeps_its_digits_near_zero() -> None:
    small = torch.logspace(-12, 0, 120)
    x = torch.cat([-small, small, torch.tensor([0.0, 1.0001, -1.0001, 1.5, -1.5, 5.0, -5.0, 30.0, -30.0])])
    x = torch.cat([x, x.new_zeros(256 - len(x))])
    expm1, k3 = torch.empty_like(x), torch.empty_like(x)
    expm1_and_k3_kernel[(1,)](expm1, k3, x, BLOCK=256)
    exact = torch.expm1(x.double())
    # By the series of x^n / n!, since float64 too loses digits of exp(x) - 1 - x near 0.
    near = sum(x.double() ** n / float(math.factorial(n)) for n in range(2, 25))
    torch.testing.assert_close(expm1.double(), exact, rtol=5e-7, atol=0)
    torch.testing.assert_close(k3.double(), torch.where(x.abs() < 2, near, exact - x.double()), rtol=5e-7, atol=1e-38)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_tokens(lengths: list[int]) -> None:
    found = check_kernels(launch, make_case(lengths), credit_center=True, kl_weight=0.1)
    assert found.loss == 0 and not found.metrics.any() and found.grad.shape == (0,)
