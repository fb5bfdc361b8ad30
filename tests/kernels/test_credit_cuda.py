"""The public `credit_policy_loss` on a GPU, where its Triton kernels run, against float64 on the CPU."""

import math
from typing import Any

import pytest
import torch

from coars_kernels import credit_policy_loss
from coars_kernels.checks import checked_values
from coars_kernels.credit_policy_loss.reference import OBJECTIVES
from tests.kernels.credit_cases import (
    Case,
    Results,
    assert_close,
    assert_same_bits,
    check_kernels,
    expected_results,
    make_case,
    poison,
    poisoned_memory,
    public_results,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# No token, a block exactly, one over it, several blocks, and many turns of usual lengths.
LENGTHS = [0, 1, 256, 257, 1000, *range(3, 60, 7)]


def on_gpu(case: Case, **options: Any) -> Results:
    case = {name: value.cuda() for name, value in case.items()}
    return Results(*(value.cpu() for value in public_results(case, **options)))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("absent", [(), ("old_logp", "turn_weight"), ("teacher_logp", "turn_agent", "reference_logp")])
@pytest.mark.parametrize("center", [False, True])
def test_equals_float64(objective: str, absent: tuple[str, ...], center: bool) -> None:
    case = {name: value for name, value in make_case(LENGTHS, seed=5).items() if name not in absent}
    if "turn_weight" in case:
        case = poison(case)
    check_kernels(
        on_gpu, case, objective=objective, credit_center=center, credit_weight=0.7, clip_low=0.1, clip_high=0.3,
        dual_clip=1.1 if objective in ("clipped", "gspo") else None,
        kl_weight=0.0 if "reference_logp" in absent else 0.3,
    )  # fmt: skip


@pytest.mark.parametrize("offsets", [torch.int32, torch.int64])
@pytest.mark.parametrize("agents", [torch.bool, torch.int8, torch.int32, torch.int64])
def test_index_dtypes(offsets: torch.dtype, agents: torch.dtype) -> None:
    case = make_case(LENGTHS, seed=6)
    case["turn_offsets"], case["turn_agent"] = case["turn_offsets"].to(offsets), case["turn_agent"].to(agents)
    check_kernels(on_gpu, case, credit_center=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_widened(dtype: torch.dtype) -> None:
    case = make_case([3, 300, 0, 20], seed=7)
    for name in ("logp", "teacher_logp", "behaviour_logp", "old_logp", "reference_logp", "turn_reward", "turn_weight"):
        case[name] = case[name].to(dtype)
    with poisoned_memory():
        found = on_gpu(case, kl_weight=0.1)
    expected = expected_results(case, kl_weight=0.1)
    # The gradient is rounded once, to the dtype of logp.
    torch.testing.assert_close(found.grad, expected.grad.to(dtype))
    assert_close(found._replace(grad=expected.grad), expected)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_tokens(lengths: list[int]) -> None:
    found = check_kernels(on_gpu, make_case(lengths), credit_center=True, kl_weight=0.1)
    assert found.loss == 0 and not found.metrics.any()


@pytest.mark.parametrize("argument", ["logp", "teacher_logp", "behaviour_logp", "old_logp", "reference_logp"])
@pytest.mark.parametrize("objective", ["clipped", "gspo"])
def test_nan_in_a_turn_that_counts_is_not_hidden(argument: str, objective: str) -> None:
    case = make_case([3, 2])
    case["turn_weight"] = torch.tensor([0.5, 0.5])
    case[argument][1] = math.nan
    options: dict[str, Any] = {"kl_weight": 0.1, "dual_clip": 1.5, "objective": objective}
    found = on_gpu(case, **options)
    assert found.loss.isnan() and found.grad[3:].isfinite().all()
    assert_close(found, expected_results(case, **options))


def test_compiles_without_a_break() -> None:
    case = {name: value.cuda() for name, value in make_case(LENGTHS, seed=8).items()}
    results = []
    for function in (credit_policy_loss, torch.compile(credit_policy_loss, fullgraph=True)):
        logp = case["logp"].clone().requires_grad_()
        loss, metrics = function(logp, **{name: value for name, value in case.items() if name != "logp"})
        (grad,) = torch.autograd.grad(loss, logp)
        results.append(Results(loss.detach(), grad, torch.stack([*metrics.values()])))
    assert_same_bits(*results)


def test_float64_stays_float64() -> None:
    case = make_case([3, 2, 5], dtype=torch.float64)
    assert_close(on_gpu(case), expected_results(case), 1e-12)


def test_does_not_wait_for_the_device() -> None:
    case = {name: value.cuda() for name, value in make_case(LENGTHS).items()}
    public_results(case, credit_center=True)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        public_results(case, credit_center=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_values_are_checked_on_request() -> None:
    case = make_case([3, 2])
    case["turn_weight"], case["turn_reward"][1] = torch.tensor([0.5, 0.5]), math.nan
    assert on_gpu(case).loss.isnan()
    with checked_values(), pytest.raises(ValueError, match="^turn_reward: must be finite, got nan in turn 1"):
        on_gpu(case)
