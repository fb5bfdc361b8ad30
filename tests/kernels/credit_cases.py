"""Inputs for the tests of `credit_policy_loss`, what the specification makes of them in float64, and how to compare."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coars_kernels import credit_policy_loss
from coars_kernels.credit_policy_loss.reference import credit_policy_loss_reference

Case = dict[str, Any]

# Log-probs, rewards and ratios of size 1, summed with weights below 1 in fp32; exp is good to a few units in the last
# place.
FP32_TOLERANCE = 5e-6


class Results(NamedTuple):
    loss: Tensor
    grad: Tensor
    metrics: Tensor  # in the operator's order


def make_case(lengths: list[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> Case:
    """Log-probs near each other, so that some ratios and credits are clipped and others are not."""
    generator = torch.Generator().manual_seed(seed)
    rows, turns = sum(lengths), len(lengths)

    def near(center: Tensor, spread: float) -> Tensor:
        return center + spread * torch.randn(rows, generator=generator)

    logp = -2 * torch.rand(rows, generator=generator)
    behaviour = near(logp, 0.3)
    weight = torch.rand(turns, generator=generator) * (torch.rand(turns, generator=generator) > 0.2)
    case: Case = {
        "logp": logp,
        "teacher_logp": near(logp, 0.9),
        "behaviour_logp": behaviour,
        "turn_reward": torch.randn(turns, generator=generator),
        "turn_weight": weight,
        "old_logp": near(behaviour, 0.5),
        "reference_logp": near(logp, 0.4),
    }
    case = {name: tensor.to(dtype) for name, tensor in case.items()}
    case["turn_offsets"] = torch.tensor([0, *lengths]).cumsum(0).int()
    case["turn_agent"] = torch.randint(2, (turns,), generator=generator)
    return case


def poison(case: Case) -> Case:
    """The case with NaN in everything that a turn of weight 0 holds."""
    case = {name: value.clone() for name, value in case.items()}
    counts = case["turn_weight"] != 0
    hidden = ~counts.repeat_interleave(case["turn_offsets"].diff())
    for name in ("logp", "teacher_logp", "behaviour_logp", "old_logp", "reference_logp"):
        if name in case:
            case[name][hidden] = torch.nan
    case["turn_reward"][~counts] = torch.nan
    return case


def operator_arguments(case: Case, **options: Any) -> tuple[Any, ...]:
    """The operator's arguments in its order: those of the public function, without keywords and defaults."""
    names = [argument.name for argument in torch.ops.coars_kernels.credit_policy_loss.default._schema.arguments]
    parameters = inspect.signature(credit_policy_loss).parameters
    given = case | options
    return tuple(given.get(name, None if name.endswith("_logp") else parameters[name].default) for name in names)


def expected_results(case: Case, **options: Any) -> Results:
    """What the reference and its autograd give in float64."""
    given = {name: value.double() if value.is_floating_point() else value for name, value in case.items()}
    logp = given.pop("logp").detach().requires_grad_()
    teacher, behaviour = given.pop("teacher_logp", None), given.pop("behaviour_logp", None)
    loss, metrics = credit_policy_loss_reference(logp, teacher, behaviour, **given, **options)
    (grad,) = torch.autograd.grad(loss, logp)
    return Results(loss.detach(), grad, torch.stack([value.double() for value in metrics.values()]))


def public_results(case: Case, **options: Any) -> Results:
    """What the public function and its backward pass give."""
    given = dict(case)
    logp = given.pop("logp").detach().requires_grad_()
    teacher, behaviour = given.pop("teacher_logp", None), given.pop("behaviour_logp", None)
    loss, metrics = credit_policy_loss(logp, teacher, behaviour, **given, **options)
    (grad,) = torch.autograd.grad(loss, logp)
    return Results(loss.detach(), grad, torch.stack([*metrics.values()]))


def assert_close(found: Results, expected: Results, tolerance: float = FP32_TOLERANCE) -> None:
    for name, value, other in zip(Results._fields, found, expected, strict=True):
        torch.testing.assert_close(
            value.double().cpu(), other.double().cpu(), rtol=tolerance, atol=tolerance, equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


def assert_same_bits(found: Results, other: Results) -> None:
    assert all(torch.equal(value, again) for value, again in zip(found, other, strict=True))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors are full of NaN, so that a value that is never written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_kernels(run: Callable[..., Results], case: Case, **options: Any) -> Results:
    """`run` twice on poisoned memory: the reference's values, exact zeros where a turn has weight 0, the same bits."""
    with poisoned_memory():
        found, again = run(case, **options), run(case, **options)
    assert all(value.dtype == torch.float32 for value in found)
    assert_close(found, expected_results(case, **options))
    assert_same_bits(found, again)
    if "turn_weight" in case:
        hidden = (case["turn_weight"] == 0).repeat_interleave(case["turn_offsets"].diff())
        assert not found.grad[hidden].any()
    return found
