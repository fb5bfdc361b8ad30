"""The head in chunks of rows: log-probabilities and their gradient with one [chunk, V] buffer, never [R, V] logits.

With a frozen head the gradient of a log-probability does not depend on the loss (design, section 5):

    d logp_r / d h_r = (W[y_r] - E_{v ~ p_r}[W_v]) / temperature  =:  J_r

so the forward pass computes logp and J while the logits are at hand, and the backward pass of any per-token loss is
`g_r * J_r`. With a trainable head the backward pass recomputes the logits chunk by chunk, because dW needs the softmax
itself. The teacher's rows ride in the same chunks as the student's, so the weight is read once for both.

Logits are fp32 whatever the inputs: products are accumulated in fp32 and stored in fp32, and both the target's logit
and the log-sum-exp come from that one buffer (mixing precisions gives log-probabilities above zero).

Shape suffixes: R rows, C rows of a chunk, V vocabulary, H hidden size.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BUFFER_BYTES = 64 * 2**20
MIN_CHUNK_ROWS, MAX_CHUNK_ROWS = 16, 2048
# On CPU a 16-bit head is widened to fp32 in slabs of this many vocabulary rows, never whole.
WIDEN_ROWS = 8192


class HeadSweep(NamedTuple):
    """What one sweep over the head yields; what was not asked for is None."""

    logp_R: Tensor
    teacher_logp_R: Tensor | None
    jacobian_RH: Tensor | None
    entropy_R: Tensor | None


class RowStatistics(NamedTuple):
    """Per-row results of `normalise_`, each [C]; entropy is None unless asked for."""

    logp_C: Tensor
    entropy_C: Tensor | None


def default_chunk_rows(vocab_size: int, num_streams: int = 1) -> int:
    """Rows per chunk (of each stream) for a buffer of about 64 MiB: 512 for V=32,000, within [16, 2048]."""
    rows = BUFFER_BYTES // (4 * max(vocab_size, 1) * num_streams)
    return min(max(rows // 16 * 16, MIN_CHUNK_ROWS), MAX_CHUNK_ROWS)


class HeadProducts:
    """The three matrix products with the head, accumulated and returned in fp32 for inputs of any dtype."""

    def __init__(self, weight_VH: Tensor, chunk_rows: int) -> None:
        self.weight_VH = weight_VH
        vocab_size = weight_VH.shape[0]
        low_precision = weight_VH.dtype != torch.float32
        # CUDA multiplies 16-bit operands with an fp32 result; CPU has no such product, so there operands are widened.
        self.native = low_precision and weight_VH.is_cuda
        self.slab = WIDEN_ROWS if low_precision and not self.native else max(vocab_size, 1)
        self.rounded_CV = weight_VH.new_empty(chunk_rows, vocab_size) if self.native else None

    def _slabs(self) -> list[slice]:
        vocab_size = self.weight_VH.shape[0]
        return [slice(start, min(start + self.slab, vocab_size)) for start in range(0, vocab_size, self.slab)]

    def _rounded(self, matrix_CV: Tensor) -> Tensor:
        assert self.rounded_CV is not None
        return self.rounded_CV[: matrix_CV.shape[0]].copy_(matrix_CV)

    def logits_(self, out_CV: Tensor, hidden_CH: Tensor) -> None:
        """out = hidden @ W.T"""
        if self.native:
            torch.mm(hidden_CH, self.weight_VH.T, out_dtype=torch.float32, out=out_CV)
            return
        hidden_CH = hidden_CH.float()
        for slab in self._slabs():
            torch.mm(hidden_CH, self.weight_VH[slab].float().T, out=out_CV[:, slab])

    def project_back(self, matrix_CV: Tensor) -> Tensor:
        """matrix @ W, [C, H] fp32"""
        if self.native:
            return torch.mm(self._rounded(matrix_CV), self.weight_VH, out_dtype=torch.float32)
        out_CH = matrix_CV.new_zeros(matrix_CV.shape[0], self.weight_VH.shape[1])
        for slab in self._slabs():
            out_CH.addmm_(matrix_CV[:, slab], self.weight_VH[slab].float())
        return out_CH

    def accumulate_weight_grad_(self, out_VH: Tensor, matrix_CV: Tensor, hidden_CH: Tensor) -> None:
        """out += matrix.T @ hidden, in fp32"""
        if self.native:
            out_VH.add_(torch.mm(self._rounded(matrix_CV).T, hidden_CH, out_dtype=torch.float32))
            return
        out_VH.addmm_(matrix_CV.T, hidden_CH.float())


def scaled_logits_(
    out_CV: Tensor, hidden_CH: Tensor, products: HeadProducts, bias_V: Tensor | None, temperature: float | Tensor
) -> None:
    """Write `(hidden @ W.T + bias) / temperature` into `out`; a tensor temperature is [C, 1]."""
    products.logits_(out_CV, hidden_CH)
    if bias_V is not None:
        out_CV.add_(bias_V)
    if isinstance(temperature, Tensor) or temperature != 1.0:
        out_CV.div_(temperature)


def normalise_(logits_CV: Tensor, target_C: Tensor, entropy_scratch_CV: Tensor | None = None) -> RowStatistics:
    """Turn logits into `onehot(target) - softmax` in place, and return the log-probability (and entropy) of each row.

    The row's true maximum is subtracted, never a running one that starts at 0: strongly negative rows would give NaN.
    The target's own entry is formed as (mass of the other tokens) / total, which keeps its digits where 1 - p cancels.
    """
    target_C1 = target_C[:, None]
    peak_C1 = logits_CV.amax(dim=-1, keepdim=True)
    peak_C1.masked_fill_(peak_C1 == -torch.inf, 0.0)  # a row without any allowed token: -inf - (-inf) would be NaN
    shifted_target_C1 = logits_CV.gather(1, target_C1) - peak_C1
    mass_CV = logits_CV.sub_(peak_C1).exp_()
    target_mass_C1 = mass_CV.gather(1, target_C1)
    mass_CV.scatter_(1, target_C1, 0.0)
    others_C1 = mass_CV.sum(dim=-1, keepdim=True)
    total_C1 = others_C1 + target_mass_C1
    log_total_C1 = total_C1.log()
    logp_C1 = torch.where(shifted_target_C1 == -torch.inf, shifted_target_C1, shifted_target_C1 - log_total_C1)
    inverse_C1 = torch.where(total_C1 == 0.0, 0.0, total_C1.reciprocal())
    entropy_C = None
    if entropy_scratch_CV is not None:
        # sum of -m ln m over unnormalised masses m; the target's term is added back
        terms_C1 = torch.special.entr(mass_CV, out=entropy_scratch_CV).sum(dim=-1, keepdim=True)
        terms_C1 = terms_C1 + torch.special.entr(target_mass_C1)
        entropy_C = torch.where(total_C1 == 0.0, 0.0, log_total_C1 + terms_C1 * inverse_C1).squeeze(1)
    mass_CV.mul_(-inverse_C1).scatter_(1, target_C1, others_C1 * inverse_C1)
    return RowStatistics(logp_C1.squeeze(1), entropy_C)


def _rows(values: float | Tensor, chunk: slice, num_streams: int = 1) -> float | Tensor:
    """A per-row column [C, 1] of a [R] tensor, repeated for each stream; a float is passed through."""
    if not isinstance(values, Tensor):
        return values
    column_C1 = values[chunk].float()[:, None]
    return column_C1 if num_streams == 1 else torch.cat([column_C1, column_C1])


def sweep_head(
    hidden_RH: Tensor,
    teacher_RH: Tensor | None,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    target_R: Tensor,
    temperature: float | Tensor,
    chunk_rows: int,
    *,
    want_jacobian: bool,
    want_entropy: bool,
) -> HeadSweep:
    """Forward pass over all rows. `chunk_rows` counts rows of each stream. Builds no autograd graph."""
    num_rows, vocab_size = hidden_RH.shape[0], weight_VH.shape[0]
    num_streams = 1 if teacher_RH is None else 2
    chunk_rows = max(min(chunk_rows, num_rows), 1)
    buffer_CV = hidden_RH.new_empty(num_streams * chunk_rows, vocab_size, dtype=torch.float32)
    scratch_CV = torch.empty_like(buffer_CV) if want_entropy else None
    logp_R = hidden_RH.new_empty(num_rows, dtype=torch.float32)
    teacher_logp_R = None if teacher_RH is None else torch.empty_like(logp_R)
    entropy_R = torch.empty_like(logp_R) if want_entropy else None
    jacobian_RH = torch.empty_like(hidden_RH) if want_jacobian else None
    products = HeadProducts(weight_VH, chunk_rows)
    bias_V = None if bias_V is None else bias_V.float()
    for start in range(0, num_rows, chunk_rows):
        chunk = slice(start, min(start + chunk_rows, num_rows))
        count = chunk.stop - chunk.start
        rows_CH, target_C = hidden_RH[chunk], target_R[chunk]
        if teacher_RH is not None:
            rows_CH, target_C = torch.cat([rows_CH, teacher_RH[chunk]]), torch.cat([target_C, target_C])
        logits_CV = buffer_CV[: num_streams * count]
        scaled_logits_(logits_CV, rows_CH, products, bias_V, _rows(temperature, chunk, num_streams))
        scratch = None if scratch_CV is None else scratch_CV[: num_streams * count]
        statistics = normalise_(logits_CV, target_C, scratch)
        logp_R[chunk] = statistics.logp_C[:count]
        if teacher_logp_R is not None:
            teacher_logp_R[chunk] = statistics.logp_C[count:]
        if entropy_R is not None and statistics.entropy_C is not None:
            entropy_R[chunk] = statistics.entropy_C[:count]
        if jacobian_RH is not None:
            jacobian_RH[chunk] = products.project_back(logits_CV[:count]).div_(_rows(temperature, chunk))
    return HeadSweep(logp_R, teacher_logp_R, jacobian_RH, entropy_R)


class HeadGradients(NamedTuple):
    """Gradients of the trainable-head path; what was not asked for is None."""

    hidden_RH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None


def recompute_gradients(
    grad_R: Tensor,
    hidden_RH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    target_R: Tensor,
    temperature: float | Tensor,
    chunk_rows: int,
    *,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> HeadGradients:
    """Backward pass with a trainable head: logits again by chunks; weight and bias gradients accumulate in fp32."""
    num_rows, vocab_size = hidden_RH.shape[0], weight_VH.shape[0]
    chunk_rows = max(min(chunk_rows, num_rows), 1)
    buffer_CV = hidden_RH.new_empty(chunk_rows, vocab_size, dtype=torch.float32)
    grad_hidden_RH = torch.empty_like(hidden_RH) if want_hidden else None
    grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if want_weight else None
    grad_bias_V = buffer_CV.new_zeros(vocab_size) if want_bias else None
    products = HeadProducts(weight_VH, chunk_rows)
    bias_fp32_V = None if bias_V is None else bias_V.float()
    for start in range(0, num_rows, chunk_rows):
        chunk = slice(start, min(start + chunk_rows, num_rows))
        logits_CV = buffer_CV[: chunk.stop - chunk.start]
        chunk_temperature = _rows(temperature, chunk)
        scaled_logits_(logits_CV, hidden_RH[chunk], products, bias_fp32_V, chunk_temperature)
        normalise_(logits_CV, target_R[chunk])
        grad_logits_CV = logits_CV.mul_(grad_R[chunk].float()[:, None] / chunk_temperature)
        if grad_hidden_RH is not None:
            grad_hidden_RH[chunk] = products.project_back(grad_logits_CV)
        if grad_weight_VH is not None:
            products.accumulate_weight_grad_(grad_weight_VH, grad_logits_CV, hidden_RH[chunk])
        if grad_bias_V is not None:
            grad_bias_V.add_(grad_logits_CV.sum(dim=0))
    return HeadGradients(
        grad_hidden_RH,
        None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype),
        None if grad_bias_V is None or bias_V is None else grad_bias_V.to(bias_V.dtype),
    )


class _HeadLogprob(torch.autograd.Function):
    """(logp, teacher_logp or None, entropy or None); the module docstring tells of the two backward paths."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        teacher_RH: Tensor | None,
        target_R: Tensor,
        temperature: float | Tensor,
        chunk_rows: int,
        return_entropy: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ctx.trainable_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        sweep = sweep_head(
            hidden_RH, teacher_RH, weight_VH, bias_V, target_R, temperature, chunk_rows,
            want_jacobian=not ctx.trainable_head, want_entropy=return_entropy,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.chunk_rows = chunk_rows
        temperature_R = temperature if isinstance(temperature, Tensor) else None
        ctx.temperature = None if temperature_R is not None else temperature
        if ctx.trainable_head:
            ctx.save_for_backward(hidden_RH, weight_VH, bias_V, target_R, temperature_R)
        else:
            ctx.save_for_backward(sweep.jacobian_RH)
        if sweep.teacher_logp_R is not None:
            ctx.mark_non_differentiable(sweep.teacher_logp_R)
        return sweep.logp_R, sweep.teacher_logp_R, sweep.entropy_R

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Any, ...]:
        grad_R, _, grad_entropy_R = grad_outputs
        # Loud on purpose: an entropy bonus that silently has no gradient looks like training.
        if grad_entropy_R is not None:
            raise RuntimeError("linear_logprob: the entropy has no gradient; detach it before using it in a loss")
        unused = (None,) * 5
        if grad_R is None:
            return None, None, None, *unused
        if not ctx.trainable_head:
            (jacobian_RH,) = ctx.saved_tensors
            # computed in fp32 and stored in hidden's dtype, without an fp32 [R, H] in between
            grad_RH = torch.mul(grad_R[:, None], jacobian_RH, out=torch.empty_like(jacobian_RH))
            return grad_RH, None, None, *unused
        hidden_RH, weight_VH, bias_V, target_R, temperature_R = ctx.saved_tensors
        with torch.autocast(hidden_RH.device.type, enabled=False):
            gradients = recompute_gradients(
                grad_R, hidden_RH, weight_VH, bias_V, target_R,
                ctx.temperature if temperature_R is None else temperature_R, ctx.chunk_rows,
                want_hidden=ctx.needs_input_grad[0],
                want_weight=ctx.needs_input_grad[1],
                want_bias=ctx.needs_input_grad[2],
            )  # fmt: skip
        return *gradients, *unused


def head_logprob(
    hidden_RH: Tensor,
    teacher_RH: Tensor | None,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    target_R: Tensor,
    temperature: float | Tensor,
    chunk_rows: int,
    return_entropy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(logp, teacher_logp or None, entropy or None), each [R] fp32, of checked arguments. Autocast is off inside."""
    teacher_RH = None if teacher_RH is None else teacher_RH.detach()
    differentiable = (hidden_RH, weight_VH) if bias_V is None else (hidden_RH, weight_VH, bias_V)
    with torch.autocast(hidden_RH.device.type, enabled=False):
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable):
            return _HeadLogprob.apply(  # pyright: ignore[reportReturnType]
                hidden_RH, weight_VH, bias_V, teacher_RH, target_R, temperature, chunk_rows, return_entropy
            )
        with torch.no_grad():
            sweep = sweep_head(
                hidden_RH, teacher_RH, weight_VH, bias_V, target_R, temperature, chunk_rows,
                want_jacobian=False, want_entropy=return_entropy,
            )  # fmt: skip
    return sweep.logp_R, sweep.teacher_logp_R, sweep.entropy_R
