"""`fused_linear_divergence`: the public function, its checks, and the sweep over the head behind it.

With p and t the distributions of student and teacher, z the student's logits over the temperature, and D the row's
divergence:

    forward KL(t, p)         dD / dz = p - t
    reverse KL(p, t)         dD / dz = p (log p - log t - D)
    Jensen-Shannon           dD / dz = p (g - sum p g),  g = log(p / m) / 2,  m = (p + t) / 2

The divergence of a row does not depend on the loss around it, so the forward pass computes dD / dh = dD / dz @ W /
temperature as well, [R, H] in fp32, while a chunk's logits are at hand; the backward pass of any weighting of rows is
one multiplication. So the work is three products with the weight: student logits, teacher logits, gradient (design,
section 5). Plain torch on every device, by chunks of rows. Left out: a Triton row kernel, a trainable head, a bias.

Shape suffixes: R rows, C rows of a chunk, V vocabulary, H hidden size.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from coars_kernels.checks import MATRIX_DTYPES, require, require_device, require_dtype, require_shape
from coars_kernels.fused_linear_divergence.reference import KINDS
from coars_kernels.linear_logprob.sweep import WIDEN_ROWS, choose_chunk_rows, chunks


def _logits(hidden_CH: Tensor, weight_VH: Tensor, temperature: float) -> Tensor:
    """hidden @ W.T / temperature, [C, V] fp32."""
    if weight_VH.dtype == torch.float32:
        return torch.mm(hidden_CH, weight_VH.T).div_(temperature)
    if weight_VH.is_cuda:
        return torch.mm(hidden_CH, weight_VH.T, out_dtype=torch.float32).div_(temperature)
    wide_CH, slabs = hidden_CH.float(), weight_VH.split(WIDEN_ROWS)
    return torch.cat([torch.mm(wide_CH, slab.float().T) for slab in slabs], 1).div_(temperature)


def _project(gradient_CV: Tensor, weight_VH: Tensor) -> Tensor:
    """gradient @ W, [C, H] fp32. With bf16 on a GPU the gradient, formed in fp32, is the sum of two bf16 numbers with a
    product each: rounded to one, and the result rounded again, it would miss the bound of 2e-3."""
    if weight_VH.dtype == torch.float32:
        return torch.mm(gradient_CV, weight_VH)
    if weight_VH.is_cuda and weight_VH.dtype == torch.bfloat16:
        upper_CV = gradient_CV.bfloat16()
        lower_CV = (gradient_CV - upper_CV).bfloat16()
        lower_CH = torch.mm(lower_CV, weight_VH, out_dtype=torch.float32)
        return torch.mm(upper_CV, weight_VH, out_dtype=torch.float32).add_(lower_CH)
    out_CH = gradient_CV.new_zeros(len(gradient_CV), weight_VH.shape[1])
    for slab in range(0, len(weight_VH), WIDEN_ROWS):
        columns = slice(slab, slab + WIDEN_ROWS)
        out_CH.addmm_(gradient_CV[:, columns], weight_VH[columns].float())
    return out_CH


def _rows(kind: str, student_CV: Tensor, teacher_CV: Tensor) -> tuple[Tensor, Tensor]:
    """(divergence [C], dD / dz [C, V]) of logits."""
    log_p, log_t = torch.log_softmax(student_CV, -1), torch.log_softmax(teacher_CV, -1)
    p = log_p.exp()
    if kind == "forward_kl":
        t = log_t.exp()
        return (t * (log_t - log_p)).sum(-1), p.sub_(t)
    if kind == "reverse_kl":
        ratio = log_p.sub_(log_t)
        divergence = (p * ratio).sum(-1)
        return divergence, p.mul_(ratio.sub_(divergence[:, None]))
    log_m = torch.logaddexp(log_p, log_t).sub_(math.log(2.0))
    of_teacher = (log_t.exp() * (log_t - log_m)).sum(-1)
    half = log_p.sub_(log_m).div_(2)
    of_student = (p * half).sum(-1)
    return of_student + of_teacher / 2, p.mul_(half.sub_(of_student[:, None]))


@torch.library.custom_op("coars_kernels::linear_divergence", mutates_args=())
def _sweep(
    student: Tensor, teacher: Tensor, weight: Tensor, kind: str, temperature: float, chunk_rows: int, jacobian: bool
) -> tuple[Tensor, Tensor]:
    """(divergence [R], d divergence / d student [R, H] or [0, H] unless wanted), fp32."""
    size = chunk_rows or choose_chunk_rows(weight)
    value_R = student.new_empty(len(student), dtype=torch.float32)
    jacobian_RH = student.new_empty(len(student) if jacobian else 0, student.shape[1], dtype=torch.float32)
    for rows in chunks(len(student), size):
        student_CV = _logits(student[rows], weight, temperature)
        value_R[rows], gradient_CV = _rows(kind, student_CV, _logits(teacher[rows], weight, temperature))
        if jacobian:
            jacobian_RH[rows] = _project(gradient_CV, weight).div_(temperature)
    return value_R, jacobian_RH


@_sweep.register_fake
def _(student: Tensor, teacher: Tensor, weight: Tensor, kind: str, temperature: float, chunk_rows: int, jacobian: bool):
    del teacher, weight, kind, temperature, chunk_rows
    rows = student.shape[0] if jacobian else 0
    value_R = student.new_empty(student.shape[0], dtype=torch.float32)
    return value_R, student.new_empty(rows, student.shape[1], dtype=torch.float32)


class _Divergence(torch.autograd.Function):
    """Gradient in the student alone: g_r times the row's jacobian."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, *arguments: Any) -> Tensor:
        value_R, jacobian_RH = _sweep(student, *arguments, True)
        ctx.save_for_backward(jacobian_RH)
        ctx.dtype, ctx.num_arguments = student.dtype, len(arguments)
        return value_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (jacobian_RH,) = ctx.saved_tensors
        return (grad_outputs[0][:, None] * jacobian_RH).to(ctx.dtype), *[None] * ctx.num_arguments


def fused_linear_divergence(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    *,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """Divergence of softmax(student @ weight.T / temperature) from the teacher's, row by row, in nats.

    For on-policy (self-)distillation over the whole vocabulary, where `paired_linear_logprob` compares sampled tokens
    only. Full logits [R, V] are never stored. Differentiable in `student`; never in `teacher`.

    Args:
        student: [R, H] fp32, bf16 or fp16 hidden states after the final norm. R may be 0.
        teacher: [R, H], same dtype: hidden states of the same rows given more, or of other weights below the head.
        weight: [V, H], the frozen head of both, in the same dtype.
        kind: "forward_kl", sum t (log t - log p), which covers all that the teacher would say; "reverse_kl", sum p (log
            p - log t), which keeps to it; "js", the mean of both distributions' divergences from their mean.
        temperature: of both distributions, positive; the divergence is not scaled by it.
        chunk_rows: rows whose logits exist at one time; by default as `linear_logprob`.

    Returns:
        [R] fp32, at least 0 up to rounding. Weight and sum it as you like: the gradient was made in the forward pass.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range, or the head wants a gradient; the message
            begins with its name.
    """
    require(student.dim() == 2, "student", f"expected [R, H], got shape {list(student.shape)}")
    require_dtype(student, "student", MATRIX_DTYPES)
    require_shape(teacher, "teacher", tuple(student.shape))
    require(weight.dim() == 2, "weight", f"expected [V, H], got shape {list(weight.shape)}")
    require(weight.shape[0] > 0, "weight", "the vocabulary is empty")
    require(
        weight.shape[1] == student.shape[1], "weight", f"expected [V, {student.shape[1]}], got {list(weight.shape)}"
    )
    for argument, tensor in (("teacher", teacher), ("weight", weight)):
        require_dtype(tensor, argument, (student.dtype,))
        require_device(tensor, argument, student, "student")
    require(not weight.requires_grad, "weight", "requires grad, but this operation is for a frozen head; detach it")
    require(kind in KINDS, "kind", f"expected one of {', '.join(KINDS)}, got {kind!r}")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature: must be positive and finite, got {temperature}")
    require(chunk_rows is None or chunk_rows >= 1, "chunk_rows", f"must be at least 1, got {chunk_rows}")
    arguments = (teacher.detach(), weight, kind, float(temperature), chunk_rows or 0)
    with torch.autocast(student.device.type, enabled=False):
        if torch.is_grad_enabled() and student.requires_grad:
            found = _Divergence.apply(student, *arguments)
            assert isinstance(found, Tensor)
            return found
        return _sweep(student.detach(), *arguments, False)[0]
