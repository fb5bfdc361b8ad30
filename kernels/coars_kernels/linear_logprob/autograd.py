"""The sweep over the head as registered operations, and the autograd function in front of them.

`torch.compile` sees opaque operations (`coars_kernels::head_sweep`, `coars_kernels::head_gradients`); eager code pays
for one of them a pass. What was not asked for is an empty tensor, since a registered operation must return tensors.

Shape suffixes: R rows, V vocabulary, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from coars_kernels.linear_logprob.sweep import (
    choose_chunk_rows,
    choose_path,
    keeps_masses,
    recompute_gradients,
    sweep_head,
)


@torch.library.custom_op("coars_kernels::head_sweep", mutates_args=())
def head_sweep(
    hidden: Tensor,
    teacher: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: Tensor | None,
    scalar_temperature: float,
    chunk_rows: int,
    want_jacobian: bool,
    want_entropy: bool,
    keep_masses: bool,
    path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp [R], teacher_logp [R], jacobian [R, H], entropy [R], masses [R, V] and other tokens' probability [R]), all
    fp32; `temperature` [R] wins over the scalar."""
    sweep = sweep_head(
        hidden.contiguous(), None if teacher is None else teacher.contiguous(), weight, bias, target.contiguous(),
        scalar_temperature if temperature is None else temperature.float().contiguous(),
        chunk_rows or choose_chunk_rows(weight),
        want_jacobian=want_jacobian, want_entropy=want_entropy, fused=choose_path(weight, path) == "fused",
        keep_masses=keep_masses,
    )  # fmt: skip
    made = (sweep.teacher_logp_R, sweep.jacobian_RH, sweep.entropy_R, sweep.mass_RV, sweep.others_R)
    rest = [hidden.new_empty(0, dtype=torch.float32) if one is None else one for one in made]
    return sweep.logp_R, rest[0], rest[1], rest[2], rest[3], rest[4]


@head_sweep.register_fake
def _(
    hidden,
    teacher,
    weight,
    bias,
    target,
    temperature,
    scalar_temperature,
    chunk_rows,
    want_jacobian,
    want_entropy,
    keep_masses,
    path,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    del bias, target, temperature, scalar_temperature, chunk_rows, path
    rows = hidden.shape[0]

    def made(wanted: bool, *shape: int) -> Tensor:
        return hidden.new_empty(*shape if wanted else (0,), dtype=torch.float32)

    jacobian = torch.empty_like(hidden, dtype=torch.float32) if want_jacobian else made(False)
    masses = made(keep_masses, rows, weight.shape[0]), made(keep_masses, rows)
    return made(True, rows), made(teacher is not None, rows), jacobian, made(want_entropy, rows), *masses


@torch.library.custom_op("coars_kernels::head_gradients", mutates_args=())
def head_gradients(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: Tensor | None,
    scalar_temperature: float,
    chunk_rows: int,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    masses: Tensor | None,
    others: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden [R, H], weight [V, H] and bias [V], in their dtypes, for a trainable head; with the masses
    that `head_sweep` kept, if it did."""
    made = recompute_gradients(
        grad, hidden.contiguous(), weight, bias, target.contiguous(),
        scalar_temperature if temperature is None else temperature.float().contiguous(),
        chunk_rows or choose_chunk_rows(weight),
        want_hidden=want_hidden, want_weight=want_weight, want_bias=want_bias, mass_RV=masses, others_R=others,
    )  # fmt: skip
    empty = [hidden.new_empty(0) for _ in range(3)]
    return (
        empty[0] if made.hidden_RH is None else made.hidden_RH,
        empty[1] if made.weight_VH is None else made.weight_VH,
        empty[2] if made.bias_V is None else made.bias_V,
    )


@head_gradients.register_fake
def _(
    grad,
    hidden,
    weight,
    bias,
    target,
    temperature,
    scalar_temperature,
    chunk_rows,
    want_hidden,
    want_weight,
    want_bias,
    masses,
    others,
) -> tuple[Tensor, Tensor, Tensor]:
    del grad, target, temperature, scalar_temperature, chunk_rows, masses, others
    return (
        torch.empty_like(hidden) if want_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if want_weight else hidden.new_empty(0),
        torch.empty_like(bias) if want_bias else hidden.new_empty(0),
    )


class _HeadLogprob(torch.autograd.Function):
    """(logp, teacher_logp, entropy) with the two backward paths that `sweep.py` tells of."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        teacher_RH: Tensor | None,
        target_R: Tensor,
        temperature_R: Tensor | None,
        temperature: float,
        chunk_rows: int,
        return_entropy: bool,
        trainable_head: bool,
        path: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # a caller who names the rows of a chunk wants no more memory than that
        keep_masses = trainable_head and not chunk_rows and keeps_masses(weight_VH, hidden_RH.shape[0])
        logp_R, teacher_logp_R, jacobian_RH, entropy_R, mass_RV, others_R = head_sweep(
            hidden_RH, teacher_RH, weight_VH, bias_V, target_R, temperature_R, temperature, chunk_rows,
            not trainable_head, return_entropy, keep_masses, path,
        )  # fmt: skip
        ctx.trainable_head, ctx.temperature, ctx.chunk_rows = trainable_head, temperature, chunk_rows
        ctx.dtype = hidden_RH.dtype
        if trainable_head:
            kept = (mass_RV, others_R) if keep_masses else (None, None)
            ctx.save_for_backward(hidden_RH, weight_VH, bias_V, target_R, temperature_R, *kept)
        else:
            ctx.save_for_backward(jacobian_RH)
        ctx.mark_non_differentiable(teacher_logp_R, entropy_R)
        return logp_R, teacher_logp_R, entropy_R

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Any, ...]:
        grad_R, unused = grad_outputs[0], (None,) * 8
        if not ctx.trainable_head:
            (jacobian_RH,) = ctx.saved_tensors
            return (grad_R[:, None] * jacobian_RH).to(ctx.dtype), None, None, *unused
        hidden_RH, weight_VH, bias_V, target_R, temperature_R, *kept = ctx.saved_tensors
        wanted = [bool(need) for need in ctx.needs_input_grad[:3]]
        gradients = head_gradients(
            grad_R, hidden_RH, weight_VH, bias_V, target_R, temperature_R, ctx.temperature, ctx.chunk_rows,
            *wanted, *kept,
        )  # fmt: skip
        return *(made if need else None for made, need in zip(gradients, wanted, strict=True)), *unused


@torch.library.custom_op("coars_kernels::refuse_entropy_gradient", mutates_args=())
def refuse_entropy_gradient(grad: Tensor, hidden: Tensor) -> Tensor:
    """Zeros like `hidden`; raises unless `grad` is all zeros (what `torch.compile` sends where nothing was asked)."""
    if grad.any():
        raise RuntimeError("linear_logprob: the entropy has no gradient; detach it before using it in a loss")
    return torch.zeros_like(hidden)


@refuse_entropy_gradient.register_fake
def _(grad, hidden) -> Tensor:
    del grad
    return torch.empty_like(hidden)


class _EntropyValue(torch.autograd.Function):
    """The entropy as it is, loud where a loss uses it: an entropy bonus that silently has no gradient looks like
    training."""

    @staticmethod
    def forward(ctx: Any, entropy_R: Tensor, hidden_RH: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_RH)
        return entropy_R.clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[None, Tensor]:
        return None, refuse_entropy_gradient(grad_outputs[0], *ctx.saved_tensors)


def head_logprob(
    hidden_RH: Tensor,
    teacher_RH: Tensor | None,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    target_R: Tensor,
    temperature: float | Tensor,
    chunk_rows: int | None,
    path: str,
    return_entropy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(logp, teacher_logp or None, entropy or None), each [R] fp32, of checked arguments. Autocast is off inside."""
    teacher_RH = None if teacher_RH is None else teacher_RH.detach()
    temperature_R = temperature if isinstance(temperature, Tensor) else None
    scalar = 1.0 if isinstance(temperature, Tensor) else float(temperature)
    trainable_head = weight_VH.requires_grad or (bias_V is not None and bias_V.requires_grad)
    with torch.autocast(hidden_RH.device.type, enabled=False):
        if torch.is_grad_enabled() and (hidden_RH.requires_grad or trainable_head):
            logp, teacher_logp, entropy = _HeadLogprob.apply(  # pyright: ignore[reportGeneralTypeIssues]
                hidden_RH, weight_VH, bias_V, teacher_RH, target_R, temperature_R, scalar, chunk_rows or 0,
                return_entropy, trainable_head, path,
            )  # fmt: skip
            if return_entropy:
                entropy = _EntropyValue.apply(entropy, hidden_RH if hidden_RH.requires_grad else weight_VH)
        else:
            logp, teacher_logp, _, entropy, _, _ = head_sweep(
                hidden_RH.detach(), teacher_RH, weight_VH.detach(), None if bias_V is None else bias_V.detach(),
                target_R, temperature_R, scalar, chunk_rows or 0, False, return_entropy, False, path,
            )  # fmt: skip
    return logp, None if teacher_RH is None else teacher_logp, entropy if return_entropy else None
