"""Laws of `credit_policy_loss` that hold for any turns: gradient, additivity, zero weights, order of turns."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coars_kernels.credit_policy_loss.reference import METRICS, OBJECTIVES
from tests.kernels.credit_cases import (
    FP32_TOLERANCE,
    Case,
    assert_close,
    assert_same_bits,
    expected_results,
    make_case,
    poison,
    public_results,
)

PER_TURN = ("turn_reward", "turn_weight", "turn_agent")
OPTIONAL = ["teacher_logp", "old_logp", "reference_logp", "turn_weight", "turn_agent"]
COUNTS = ("num_tokens", "num_turns")

turns = st.lists(st.integers(0, 6), max_size=7)
seeds = st.integers(0, 10_000)


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    objective = draw(st.sampled_from(OBJECTIVES))
    return {
        "objective": objective,
        "credit_weight": draw(st.sampled_from([0.0, 0.1, 1.5])),
        "credit_clip": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "clip_low": draw(st.sampled_from([0.0, 0.2, 1.0])),
        "clip_high": draw(st.sampled_from([0.0, 0.2, 0.5])),
        "dual_clip": draw(st.sampled_from([None, 1.2, 3.0])) if objective in ("clipped", "gspo") else None,
        "importance_cap": draw(st.sampled_from([0.5, 2.0])),
        "kl_weight": draw(st.sampled_from([0.0, 0.3])),
    }


def choose_turns(case: Case, chosen: list[int]) -> tuple[Case, Tensor]:
    """A case of these turns in this order, and the index of its tokens in the old one."""
    offsets = case["turn_offsets"].tolist()
    spans = [torch.arange(offsets[m], offsets[m + 1]) for m in chosen]
    rows = torch.cat([torch.arange(0), *spans])
    part = {name: value[chosen if name in PER_TURN else rows] for name, value in case.items() if name != "turn_offsets"}
    part["turn_offsets"] = torch.tensor([0, *map(len, spans)]).cumsum(0)
    return part, rows


@settings(max_examples=40, deadline=None)
@given(lengths=turns, options=options(), center=st.booleans(), absent=st.sets(st.sampled_from(OPTIONAL)), seed=seeds)
def test_gradient_is_that_of_the_reference_in_float64(
    lengths: list[int], options: dict[str, Any], center: bool, absent: set[str], seed: int
) -> None:
    case = {name: value for name, value in make_case(lengths, seed).items() if name not in absent}
    options = options | {"credit_center": center}
    if "reference_logp" in absent:
        options["kl_weight"] = 0.0
    assert_close(public_results(case, **options), expected_results(case, **options))
    wide = {name: value.double() if value.is_floating_point() else value for name, value in case.items()}
    assert_close(public_results(wide, **options), expected_results(case, **options), 1e-12)


@settings(max_examples=30, deadline=None)
@given(lengths=turns, options=options(), cut=st.integers(0, 7), seed=seeds)
def test_calls_on_parts_of_the_turns_add_up(lengths: list[int], options: dict[str, Any], cut: int, seed: int) -> None:
    case = make_case(lengths, seed)
    whole = public_results(case, **options)
    cut = min(cut, len(lengths))
    loss, grad, counts = torch.zeros(()), torch.zeros_like(whole.grad), torch.zeros(len(COUNTS))
    columns = [METRICS.index(name) for name in COUNTS]
    for chosen in (list(range(cut)), list(range(cut, len(lengths)))):
        part, rows = choose_turns(case, chosen)
        results = public_results(part, **options)
        loss, counts = loss + results.loss, counts + results.metrics[columns]
        grad[rows] = results.grad
    torch.testing.assert_close(loss, whole.loss, rtol=FP32_TOLERANCE, atol=FP32_TOLERANCE)
    torch.testing.assert_close(grad, whole.grad, rtol=FP32_TOLERANCE, atol=FP32_TOLERANCE)
    assert torch.equal(counts, whole.metrics[columns])


@settings(max_examples=30, deadline=None)
@given(lengths=turns, options=options(), seed=seeds)
def test_turns_of_weight_zero_might_as_well_be_absent(lengths: list[int], options: dict[str, Any], seed: int) -> None:
    case, options = make_case(lengths, seed), options | {"credit_center": True}
    with_nan = public_results(poison(case), **options)
    assert_same_bits(with_nan, public_results(case, **options))
    kept, rows = choose_turns(case, case["turn_weight"].nonzero()[:, 0].tolist())
    without = public_results(kept, **options)
    full = torch.zeros_like(with_nan.grad)
    full[rows] = without.grad
    assert_close(with_nan, without._replace(grad=full))


@settings(max_examples=30, deadline=None)
@given(lengths=turns, options=options(), order=st.permutations(range(7)), seed=seeds)
def test_the_order_of_turns_does_not_matter(
    lengths: list[int], options: dict[str, Any], order: list[int], seed: int
) -> None:
    case, options = make_case(lengths, seed), options | {"credit_center": True}
    shuffled, rows = choose_turns(case, [m for m in order if m < len(lengths)])
    whole = public_results(case, **options)
    assert_close(public_results(shuffled, **options), whole._replace(grad=whole.grad[rows]))
