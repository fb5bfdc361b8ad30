"""The head in chunks of rows: log-probabilities and their gradient with one [chunk, V] buffer, never [R, V] logits.

With a frozen head the gradient of a log-probability does not depend on the loss (design, section 5):

    d logp_r / d h_r = (W[y_r] - E_{v ~ p_r}[W_v]) / temperature  =:  J_r

so the forward pass computes logp and J while the logits are at hand, and the backward pass of any per-token loss is
`g_r * J_r`: three products with the weight in all, the teacher's included. With a trainable head the backward pass
computes the logits again chunk by chunk, because dW needs the softmax itself; on a CPU it is kept where all rows fit
into the buffer of a chunk.

Logits are fp32 whatever the inputs: products are accumulated in fp32 and stored in fp32, and the target's logit and the
log-sum-exp come from that one buffer (mixing precisions gives log-probabilities above zero). J is kept in fp32 too, so
that a gradient is rounded once. `rows.py` (CPU) and `triton_rows.py` (CUDA) make masses of the logits;
`triton_fused.py` makes them without logits. `choose_path` says which of the two designs runs on a GPU.

Shape suffixes: R rows, C rows of a chunk, V vocabulary, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coars_kernels.dispatch import has_triton
from coars_kernels.linear_logprob.rows import RowMasses, row_masses_

PATHS = ("auto", "library", "fused")
CPU_CHUNK_ROWS = 512
CPU_BUFFER_BYTES = 64 * 2**20
CUDA_BUFFER_BYTES = 1100 * 2**20
WIDEN_ROWS = 8192
"""On CPU a 16-bit head is widened to fp32 in slabs of this many vocabulary rows, never whole."""
TILE_ROWS, TILE_COLUMNS = 128, 256
"""Output tile of the library's matrix products on Ampere and Hopper, by which `default_chunk_rows` counts waves."""
FUSED_IS_FASTER: frozenset[tuple[int, int]] = frozenset()
"""(compute capability, bytes per number) for which the fused product was measured to be faster than library product and
row kernel (docs/log.md). None yet: nothing has been measured on a GPU."""


def choose_path(weight_VH: Tensor, path: str) -> str:
    """`library` (library product, then a row kernel) or `fused` (one Triton product) for `auto`; others as named."""
    if path != "auto":
        return path
    if not has_triton(weight_VH):
        return "library"
    major, minor = torch.cuda.get_device_capability(weight_VH.device)
    return "fused" if (10 * major + minor, weight_VH.element_size()) in FUSED_IS_FASTER else "library"


def default_chunk_rows(vocab_size: int, num_processors: int = 0) -> int:
    """Rows whose logits exist at one time.

    Args:
        vocab_size: V.
        num_processors: multiprocessors of the GPU; 0 for a CPU.

    On a CPU 512 rows, or fewer where these would be over 64 MiB. On a GPU whole tiles of 128 rows within 1.1 GB (fp32
    logits and 16-bit masses), as many as fill the last wave of multiprocessors best: a power of two leaves up to half
    of it idle.
    """
    if not num_processors:
        rows = CPU_BUFFER_BYTES // (4 * vocab_size)
        return min(max(rows // 16 * 16, 16), CPU_CHUNK_ROWS)
    largest = min(max(CUDA_BUFFER_BYTES // (6 * vocab_size * TILE_ROWS), 1), 32)
    columns = -(-vocab_size // TILE_COLUMNS)

    def fill(tiles: int) -> float:
        """Share of the multiprocessors' time that has work."""
        waves = -(-tiles * columns // num_processors)
        return tiles * columns / (waves * num_processors)

    # Larger chunks read the weight less often, so they win unless a smaller one is fuller by half a percent.
    return TILE_ROWS * max(range(1, largest + 1), key=lambda tiles: (round(200 * fill(tiles)), tiles))


def choose_chunk_rows(weight_VH: Tensor) -> int:
    """`default_chunk_rows` for the device that the weight is on."""
    if not weight_VH.is_cuda:
        return default_chunk_rows(weight_VH.shape[0])
    return default_chunk_rows(
        weight_VH.shape[0], torch.cuda.get_device_properties(weight_VH.device).multi_processor_count
    )


def keeps_masses(weight_VH: Tensor, num_rows: int) -> bool:
    """Whether a forward pass with a trainable head keeps the masses [R, V] for the backward pass, which then computes
    no logits: on a CPU, where they take no more than the buffer of a chunk may."""
    return not weight_VH.is_cuda and 4 * num_rows * weight_VH.shape[0] <= CPU_BUFFER_BYTES


@dataclass
class Sweep:
    """What one pass over the head yields; what was not asked for is None."""

    logp_R: Tensor
    teacher_logp_R: Tensor | None
    jacobian_RH: Tensor | None  # fp32
    entropy_R: Tensor | None
    mass_RV: Tensor | None = None  # fp32, divided by their total
    others_R: Tensor | None = None


class Head:
    """A weight, its bias and a chunk's buffers: products with the weight, accumulated and returned in fp32.

    CUDA multiplies 16-bit operands into an fp32 result; a CPU has no such product, so there operands are widened.

    Args:
        weight_VH, bias_V: the head.
        chunk_rows: rows of the largest chunk.
        want_masses: `project` or `jacobian` will be called.
        fused: masses by the fused product, without logits (CUDA with Triton only).
    """

    def __init__(
        self, weight_VH: Tensor, bias_V: Tensor | None, chunk_rows: int, *, want_masses: bool, fused: bool = False
    ):
        self.weight_VH, self.bias_V = weight_VH, None if bias_V is None else bias_V.float().contiguous()
        vocab_size, low_precision = weight_VH.shape[0], weight_VH.dtype != torch.float32
        self.native, self.triton, self.fused = weight_VH.is_cuda, has_triton(weight_VH), fused
        self.slab = WIDEN_ROWS if low_precision and not self.native else vocab_size
        # Rows that begin at a multiple of 16 numbers are read and written in wide words whatever the vocabulary.
        columns = -(-vocab_size // 16) * 16 if self.native else vocab_size
        self.logits_CV = None if fused else weight_VH.new_empty(chunk_rows, columns, dtype=torch.float32)
        # 16-bit masses get a buffer of their own: a row that overflows is done again from its logits.
        separate = want_masses and (fused or (self.native and low_precision))
        self.mass_CV = weight_VH.new_empty(chunk_rows, columns) if separate else None

    def _slabs(self) -> list[slice]:
        vocab_size = self.weight_VH.shape[0]
        return [slice(start, min(start + self.slab, vocab_size)) for start in range(0, vocab_size, self.slab)]

    def _logits_(self, hidden_CH: Tensor, out_CV: Tensor) -> Tensor:
        """hidden @ W.T, before bias and temperature."""
        if self.native or self.weight_VH.dtype == torch.float32:
            return _multiply(hidden_CH, self.weight_VH.T, out_CV)
        for slab in self._slabs():
            torch.mm(hidden_CH.float(), self.weight_VH[slab].float().T, out=out_CV[:, slab])
        return out_CV

    def masses(
        self,
        hidden_CH: Tensor,
        target_C: Tensor,
        temperature: float | Tensor,
        *,
        want_entropy: bool = False,
        want_masses: bool = True,
    ) -> tuple[RowMasses, Tensor]:
        """Statistics of each row, and the masses [C, V] that `project` takes (worth nothing unless wanted)."""
        assert self.logits_CV is not None, "the fused product keeps no logits"
        logits_CV = self.logits_CV[: len(hidden_CH), : self.weight_VH.shape[0]]
        self._logits_(hidden_CH, logits_CV)
        mass_CV = logits_CV if self.mass_CV is None else self.mass_CV[: len(hidden_CH), : self.weight_VH.shape[0]]
        if not self.triton:

            def again(rows_F: Tensor) -> Tensor:
                out_FV = logits_CV.new_empty(len(rows_F), logits_CV.shape[1])
                for out_V, row in zip(out_FV, rows_F.tolist(), strict=True):
                    # one by one: a row's rounding must not depend on which others come along
                    self._logits_(hidden_CH[row : row + 1], out_V[None])
                return out_FV

            rows = row_masses_(logits_CV, target_C, self.bias_V, temperature, again=again, want_entropy=want_entropy)
            return rows, logits_CV if self.mass_CV is None else mass_CV.copy_(logits_CV)
        from coars_kernels.linear_logprob.triton_rows import row_masses

        rows = row_masses(
            logits_CV, target_C, bias_V=self.bias_V, temperature=temperature,
            mass_CV=mass_CV if want_masses else None, want_entropy=want_entropy,
        )  # fmt: skip
        return rows, mass_CV

    def paired_masses(
        self,
        student_CH: Tensor,
        teacher_CH: Tensor | None,
        target_C: Tensor,
        temperature: float | Tensor,
        *,
        want_entropy: bool = False,
        want_masses: bool = True,
    ) -> tuple[RowMasses, Tensor, Tensor | None]:
        """As `masses` of the student's rows, and the teacher's log-probabilities: in one product, or one after the
        other through one buffer."""
        if self.fused:
            from coars_kernels.linear_logprob.triton_fused import fused_masses

            mass_CV = None if self.mass_CV is None else self.mass_CV[: len(student_CH)]
            rows, teacher_logp = fused_masses(
                student_CH, teacher_CH, self.weight_VH, target_C, bias_V=self.bias_V, temperature=temperature,
                mass_CV=mass_CV, want_entropy=want_entropy,
            )  # fmt: skip
            used_CV = rows.logp_C if mass_CV is None else mass_CV[:, : self.weight_VH.shape[0]]
            return rows, used_CV, teacher_logp
        teacher_logp = None
        if teacher_CH is not None:  # first, so that the student's masses stay in the buffer
            teacher_logp = self.masses(teacher_CH, target_C, temperature, want_masses=False)[0].logp_C
        rows, mass_CV = self.masses(
            student_CH, target_C, temperature, want_entropy=want_entropy, want_masses=want_masses
        )
        return rows, mass_CV, teacher_logp

    def project(self, mass_CV: Tensor) -> Tensor:
        """mass @ W, [C, H] fp32"""
        product_CH = mass_CV.new_empty(len(mass_CV), self.weight_VH.shape[1], dtype=torch.float32)
        if self.native or self.weight_VH.dtype == torch.float32:
            return _multiply(mass_CV, self.weight_VH, product_CH)
        product_CH.zero_()
        for slab in self._slabs():
            product_CH.addmm_(mass_CV[:, slab], self.weight_VH[slab].float())
        return product_CH

    def jacobian(
        self, mass_CV: Tensor, target_C: Tensor, rows: RowMasses, temperature: float | Tensor, out_CH: Tensor
    ) -> None:
        """out = (others * W[y] - inverse * (mass @ W)) / temperature"""
        product_CH = self.project(mass_CV)
        if self.triton:
            from coars_kernels.linear_logprob.triton_rows import jacobian_rows

            jacobian_rows(product_CH, self.weight_VH, target_C, rows.others_C, rows.inverse_C, temperature, out_CH)
            return
        product_CH.mul_(rows.inverse_C[:, None])
        torch.addcmul(-product_CH, self.weight_VH[target_C].float(), rows.others_C[:, None], out=out_CH)
        out_CH.div_(temperature[:, None] if isinstance(temperature, Tensor) else temperature)

    def accumulate_weight_grad_(
        self, out_VH: Tensor, mass_CV: Tensor, target_C: Tensor, rows: RowMasses, grad_C: Tensor, hidden_CH: Tensor
    ) -> None:
        """out += sum over rows of grad * (others * onehot(target) - inverse * mass)^T hidden, in fp32"""
        hidden_CH, weight_C = hidden_CH.float(), grad_C * rows.inverse_C
        if self.native and mass_CV.dtype != torch.float32:
            # 16-bit operands: at a size of about 1 their digits are kept, which fp16 would lose at 1 / number of rows
            size = weight_C.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
            scaled_CH = (hidden_CH * (weight_C / size)[:, None]).to(mass_CV.dtype)
            out_VH.sub_(_multiply(mass_CV.T, scaled_CH, torch.empty_like(out_VH)).mul_(size))
        else:
            out_VH.addmm_(mass_CV.T, hidden_CH * weight_C[:, None], alpha=-1.0)
        out_VH.index_add_(0, target_C, hidden_CH * (grad_C * rows.others_C)[:, None])


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left @ right into an fp32 `out`."""
    if left.dtype == torch.float32:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def chunks(num_rows: int, chunk_rows: int) -> list[slice]:
    """Row ranges of at most `chunk_rows`."""
    return [slice(start, min(start + chunk_rows, num_rows)) for start in range(0, num_rows, chunk_rows)]


def _of_rows(temperature: float | Tensor, rows: slice) -> float | Tensor:
    return temperature[rows] if isinstance(temperature, Tensor) else temperature


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
    fused: bool = False,
    keep_masses: bool = False,
) -> Sweep:
    """Forward pass over all rows, with `keep_masses` in one chunk. Builds no autograd graph."""
    num_rows = len(hidden_RH)
    if keep_masses:
        chunk_rows = max(num_rows, 1)
    logp_R = hidden_RH.new_empty(num_rows, dtype=torch.float32)
    teacher_logp_R = None if teacher_RH is None else torch.empty_like(logp_R)
    entropy_R = torch.empty_like(logp_R) if want_entropy else None
    jacobian_RH = torch.empty_like(hidden_RH, dtype=torch.float32) if want_jacobian else None
    mass_RV = others_R = None
    if keep_masses:  # without rows there is no chunk that would make them
        mass_RV, others_R = logp_R.new_empty(0, weight_VH.shape[0]), torch.empty_like(logp_R)
    head = Head(weight_VH, bias_V, min(chunk_rows, num_rows), want_masses=want_jacobian, fused=fused)
    for chunk in chunks(num_rows, chunk_rows):
        target_C, chunk_temperature = target_R[chunk], _of_rows(temperature, chunk)
        rows, mass_CV, teacher_logp_C = head.paired_masses(
            hidden_RH[chunk], None if teacher_RH is None else teacher_RH[chunk], target_C, chunk_temperature,
            want_entropy=want_entropy, want_masses=want_jacobian or keep_masses,
        )  # fmt: skip
        if keep_masses:
            mass_RV, others_R = mass_CV, rows.others_C
        logp_R[chunk] = rows.logp_C
        if entropy_R is not None and rows.entropy_C is not None:
            entropy_R[chunk] = rows.entropy_C
        if teacher_logp_R is not None and teacher_logp_C is not None:
            teacher_logp_R[chunk] = teacher_logp_C
        if jacobian_RH is not None:
            head.jacobian(mass_CV, target_C, rows, chunk_temperature, jacobian_RH[chunk])
    return Sweep(logp_R, teacher_logp_R, jacobian_RH, entropy_R, mass_RV, others_R)


@dataclass
class HeadGradients:
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
    mass_RV: Tensor | None = None,
    others_R: Tensor | None = None,
) -> HeadGradients:
    """Backward pass with a trainable head, with the masses that the forward pass kept, or with logits computed again by
    chunks; weight and bias gradients accumulate in fp32."""
    num_rows, vocab_size = len(hidden_RH), weight_VH.shape[0]
    grad_hidden_RH = torch.empty_like(hidden_RH) if want_hidden else None
    grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if want_weight else None
    grad_bias_V = hidden_RH.new_zeros(vocab_size, dtype=torch.float32) if want_bias else None
    if mass_RV is not None:
        chunk_rows = max(num_rows, 1)
    head = Head(weight_VH, bias_V, min(chunk_rows, num_rows) if mass_RV is None else 0, want_masses=True)
    for chunk in chunks(num_rows, chunk_rows):
        target_C, chunk_temperature = target_R[chunk], _of_rows(temperature, chunk)
        if mass_RV is not None and others_R is not None:
            unknown_C = others_R  # their log-probs, which nothing below reads
            rows, mass_CV = RowMasses(unknown_C, others_R, torch.ones_like(others_R), None), mass_RV
        else:
            rows, mass_CV = head.masses(hidden_RH[chunk], target_C, chunk_temperature)
        grad_C = grad_R[chunk].float()
        if grad_hidden_RH is not None:
            jacobian_CH = torch.empty_like(hidden_RH[chunk], dtype=torch.float32)
            head.jacobian(mass_CV, target_C, rows, chunk_temperature, jacobian_CH)
            grad_hidden_RH[chunk] = jacobian_CH.mul_(grad_C[:, None])
        grad_C = grad_C / chunk_temperature
        if grad_weight_VH is not None:
            head.accumulate_weight_grad_(grad_weight_VH, mass_CV, target_C, rows, grad_C, hidden_RH[chunk])
        if grad_bias_V is not None:
            grad_bias_V.sub_(mass_CV.float().T @ (grad_C * rows.inverse_C))
            grad_bias_V.index_add_(0, target_C, grad_C * rows.others_C)
    return HeadGradients(
        grad_hidden_RH,
        None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype),
        None if grad_bias_V is None or bias_V is None else grad_bias_V.to(bias_V.dtype),
    )
