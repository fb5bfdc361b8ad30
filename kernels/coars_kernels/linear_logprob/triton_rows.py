"""The row kernels of the head, for a GPU: fp32 logits of a chunk in, log-probabilities and gradient weights out.

Between two library products (hidden @ W.T before, mass @ W after) each row is read once. With the target's logit as the
anchor, a = z_y, one pass gives everything:

    mass_v = exp(z_v - a) for v != y, and 0 for the target, which is left out by its index
    others = sum_v mass_v,  total = others + 1,  logp = -log1p(others)
    entropy = -logp - sum_v mass_v (z_v - a) / total
    d logp / d h = ( (others / total) W_y - (1 / total) sum_v mass_v W_v ) / temperature

No subtraction of like quantities is in it: logp is never above zero, and near p = 1 both logp and its gradient keep
their digits. A row whose masses could overflow (logp below about -66, a target of logit -inf, any NaN) is done again
by the same program with the largest of the *other* logits as the anchor, two passes over that row alone, without a
second launch and without the host. That anchor is used for all rows where one pass cannot serve: where fp32 masses
overwrite the logits, and for fp16 masses, whose range of 2^-24 to 2^16 needs the largest mass at 1.

What is left out: the matrix products, and chunking; `triton_fused.py` has the design that never stores logits.

Shape suffixes: C rows of a chunk, V vocabulary, H hidden size.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright reads a kernel as an ordinary function: `num_warps` is no parameter of it, and an int is no `tl.constexpr`.

import torch
import triton
import triton.language as tl
from torch import Tensor

from coars_kernels import aot_library
from coars_kernels.linear_logprob.rows import RowMasses

aot_library.install()  # where COARS_KERNELS_AOT is set; before the first launch

# 8 logits per thread and step, two 16-byte loads; the compiler unrolls the loop. 16 per thread doubled the registers
# (55 to 106) and so halved the rows in flight. Figures of the compiler, not measured on a GPU.
BLOCK, NUM_WARPS = 2048, 8
JACOBIAN_BLOCK, JACOBIAN_WARPS = 1024, 4

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Above this sum of anchored masses a row takes the other anchor. fp32 and bf16 reach 2^127: the rest is room for the
# product with W, and for the entropy's sum.
LARGEST_SUM = tl.constexpr(2.0**96)


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1, relative error of a few ulp (Kahan); the interpreter has no libdevice to take it from."""
    whole = 1.0 + x
    gained = whole - 1.0
    return tl.where(gained == 0.0, x, tl.log(whole) * (x / tl.where(gained == 0.0, 1.0, gained)))


@triton.jit
def finish_rows(lead, others, rounded, weighted):
    """(logp, share of the others, inverse, entropy) from sums over the other tokens, for any anchor a.

    lead = z_y - a; others, rounded: sums of the masses, and of the masses as stored; weighted: sum of mass * (z_v - a).
    With the target ahead of the anchor everything is divided by exp(lead), which could overflow.
    """
    ahead = lead >= 0.0
    small = tl.exp(-tl.abs(lead))
    odds = others * tl.where(ahead, small, 1.0)
    total = odds + tl.where(ahead, 1.0, small)
    safe_total = tl.where(total == 0.0, 1.0, total)  # no token is allowed at all: shares of 0
    log_total = tl.where(ahead, log1p(odds), tl.log(safe_total))
    logp = tl.where(ahead, -log_total, tl.where(lead == -float("inf"), lead, lead - log_total))
    share = odds / safe_total
    inverse = tl.where(total == 0.0, 0.0, tl.where(ahead, small, 1.0) / safe_total)
    # lead * (share of the target) is 0 for a forbidden target, not -inf * 0
    own = tl.where(ahead, -lead * share, tl.where(small == 0.0, 0.0, lead * (small / safe_total)))
    entropy = log_total - own - weighted * inverse
    # Made good: what rounding the masses to 16 bits did to their sum. The gradient's two sums then have the same total,
    # and a direction that all rows of W share cancels from it.
    inverse = inverse * tl.where(rounded > 0.0, others / rounded, 1.0)
    return logp, share, inverse, entropy


@triton.jit
def largest_anchor(largest, own):
    """The largest of the other logits; the target's where there is no other, and 0 where no token is allowed."""
    peak = tl.where(largest == -float("inf"), own, largest)
    peak = tl.where(peak == float("inf"), float("nan"), peak)  # an overflow upstream has no log-probabilities
    return tl.where(peak == -float("inf"), 0.0, peak)


@triton.jit
def _load_logits(logits, bias, columns, vocab_size, MASKED: tl.constexpr):
    # Whole blocks carry no mask: a mask that ends at an odd V would break every load of the row into single words.
    if MASKED:
        values = tl.load(logits + columns, mask=columns < vocab_size, other=-float("inf"))
        if bias is not None:
            values += tl.load(bias + columns, mask=columns < vocab_size, other=0.0)
    else:
        values = tl.load(logits + columns)
        if bias is not None:
            values += tl.load(bias + columns)
    return values


@triton.jit
def _largest_other(logits, bias, vocab_size, token, own, BLOCK: tl.constexpr):
    """The anchor of a row that takes two passes."""
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    whole = vocab_size // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = _load_logits(logits, bias, columns, vocab_size, False)
        largest = tl.maximum(largest, tl.where(columns == token, -float("inf"), values))
    if whole < vocab_size:
        columns = whole + tl.arange(0, BLOCK)
        values = _load_logits(logits, bias, columns, vocab_size, True)
        largest = tl.maximum(largest, tl.where(columns == token, -float("inf"), values))
    return largest_anchor(tl.max(largest, axis=0), own)


@triton.jit
def _masses_of_block(logits, bias, mass, columns, vocab_size, token, anchor, scale, MASKED: tl.constexpr):
    """(mass, the mass as stored, mass * exponent); exponents count in powers of two."""
    exponent = (_load_logits(logits, bias, columns, vocab_size, MASKED) - anchor) * scale
    value = tl.where(columns == token, 0.0, tl.exp2(exponent))
    stored = value
    if mass is not None:
        rounded = value.to(mass.dtype.element_ty)
        stored = rounded.to(tl.float32)
        if MASKED:
            tl.store(mass + columns, rounded, mask=columns < vocab_size)
        else:
            tl.store(mass + columns, rounded)
    # a forbidden token has mass 0 and exponent -inf
    return value, stored, tl.where(value == 0.0, 0.0, value * exponent)


@triton.jit
def _sweep_row(logits, bias, mass, vocab_size, token, anchor, scale, BLOCK: tl.constexpr):
    """Write the masses of one row; return their sum, the sum of the stored ones, and the sum of mass * exponent."""
    others = tl.zeros([BLOCK], tl.float32)
    rounded = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    whole = vocab_size // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value, stored, term = _masses_of_block(logits, bias, mass, columns, vocab_size, token, anchor, scale, False)
        others += value
        rounded += stored
        weighted += term
    if whole < vocab_size:
        columns = whole + tl.arange(0, BLOCK)
        value, stored, term = _masses_of_block(logits, bias, mass, columns, vocab_size, token, anchor, scale, True)
        others += value
        rounded += stored
        weighted += term
    return tl.sum(others, axis=0), tl.sum(rounded, axis=0), tl.sum(weighted, axis=0)


@triton.jit
def row_masses_kernel(
    logits,  # [C, V] fp32
    target,  # [C] int64
    bias,  # [V] fp32, or None
    temperature,  # [C] fp32, or one number
    mass,  # [C, V], or None
    logp,  # [C] fp32, as are the three below
    others_share,
    inverse,
    entropy,  # or None
    vocab_size,
    logits_stride,
    mass_stride,
    ROW_TEMPERATURE: tl.constexpr,
    LARGEST_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row; the module docstring has the equations."""
    row = tl.program_id(0).to(tl.int64)  # rows times V passes 2^31
    logits += row * logits_stride
    if mass is not None:
        mass += row * mass_stride
    token = tl.load(target + row)
    own = tl.load(logits + token)
    if bias is not None:
        own += tl.load(bias + token)
    own = tl.where(own == float("inf"), float("nan"), own)  # an overflow upstream is no certainty
    if ROW_TEMPERATURE:
        heat = tl.load(temperature + row)
    else:
        heat = temperature
    scale = LOG2_E / heat

    if LARGEST_FIRST:
        anchor = _largest_other(logits, bias, vocab_size, token, own, BLOCK)
    else:
        anchor = own
    others, rounded, weighted = _sweep_row(logits, bias, mass, vocab_size, token, anchor, scale, BLOCK)
    if not LARGEST_FIRST:
        fits = others <= LARGEST_SUM  # false for NaN too
        if fits == 0:
            anchor = _largest_other(logits, bias, vocab_size, token, own, BLOCK)
            others, rounded, weighted = _sweep_row(logits, bias, mass, vocab_size, token, anchor, scale, BLOCK)

    lead = (own - anchor) / heat
    row_logp, row_share, row_inverse, row_entropy = finish_rows(lead, others, rounded, weighted * LN_2)
    tl.store(logp + row, row_logp)
    tl.store(others_share + row, row_share)
    tl.store(inverse + row, row_inverse)
    if entropy is not None:
        tl.store(entropy + row, row_entropy)


def row_masses(
    logits_CV: Tensor,
    target_C: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mass_CV: Tensor | None,
    want_entropy: bool = False,
    block: int = BLOCK,
) -> RowMasses:
    """Masses and row statistics of `(logits + bias) / temperature`; one launch.

    Args:
        logits_CV: fp32, rows of unit stride that may stand further apart than V. 16-byte aligned rows are read fastest:
            where V is no multiple of 16, pad the row stride of the buffer to one.
        target_C: int64, in [0, V).
        bias_V: fp32 or None; -inf forbids a token.
        temperature: a number, or [C] fp32.
        mass_CV: where the masses go, in the dtype of the product with W; an fp32 one may be `logits_CV` itself.
            None for rows that need no gradient.
        want_entropy: also return the entropy.
        block: logits per step; tests use small ones.
    """
    num_rows, vocab_size = logits_CV.shape
    assert logits_CV.dtype == torch.float32 and logits_CV.stride(1) == 1
    assert target_C.dtype == torch.int64 and target_C.is_contiguous() and target_C.shape == (num_rows,)
    assert bias_V is None or (bias_V.dtype == torch.float32 and bias_V.is_contiguous())
    assert mass_CV is None or (mass_CV.shape == logits_CV.shape and mass_CV.stride(1) == 1)
    row_temperature = isinstance(temperature, Tensor)
    if row_temperature:
        assert temperature.dtype == torch.float32 and temperature.is_contiguous() and temperature.shape == (num_rows,)
    logp_C, others_C, inverse_C = logits_CV.new_empty(3, num_rows).unbind()
    entropy_C = torch.empty_like(logp_C) if want_entropy else None
    if num_rows:
        with torch.cuda.device_of(logits_CV):
            row_masses_kernel[(num_rows,)](
                logits_CV,
                target_C,
                bias_V,
                temperature if row_temperature else float(temperature),
                mass_CV,
                logp_C,
                others_C,
                inverse_C,
                entropy_C,
                vocab_size,
                logits_CV.stride(0),
                0 if mass_CV is None else mass_CV.stride(0),
                ROW_TEMPERATURE=row_temperature,
                LARGEST_FIRST=mass_CV is not None and largest_first(logits_CV, mass_CV),
                BLOCK=block,
                num_warps=NUM_WARPS,
            )
    return RowMasses(logp_C, others_C, inverse_C, entropy_C)


def largest_first(logits_CV: Tensor, mass_CV: Tensor) -> bool:
    """Whether one pass cannot serve: the masses overwrite the logits, or are fp16 (see the module docstring)."""
    return mass_CV.dtype == torch.float16 or mass_CV.data_ptr() == logits_CV.data_ptr()


@triton.jit
def jacobian_kernel(
    product,  # [C, H] fp32
    weight,  # [V, H]
    target,  # [C] int64
    others_share,  # [C] fp32
    inverse,  # [C] fp32
    temperature,  # [C] fp32, or one number
    out,  # [C, H]
    hidden_size,
    product_stride,
    weight_stride,
    out_stride,
    ROW_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden_size
    token = tl.load(target + row)
    if ROW_TEMPERATURE:
        heat = tl.load(temperature + row)
    else:
        heat = temperature
    share = tl.load(others_share + row) / heat
    weighted = tl.load(inverse + row) / heat
    own = tl.load(weight + token * weight_stride + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(product + row * product_stride + columns, mask=inside, other=0.0)
    value = share * own - weighted * mean
    tl.store(out + row * out_stride + columns, value.to(out.dtype.element_ty), mask=inside)


def jacobian_rows(
    product_CH: Tensor,
    weight_VH: Tensor,
    target_C: Tensor,
    others_C: Tensor,
    inverse_C: Tensor,
    temperature: float | Tensor,
    out_CH: Tensor,
    *,
    block: int = JACOBIAN_BLOCK,
) -> None:
    """out = d logp / d h = (others * W[target] - inverse * product) / temperature, of product = mass @ W in fp32."""
    num_rows, hidden_size = product_CH.shape
    assert product_CH.dtype == torch.float32 and product_CH.stride(1) == 1
    assert weight_VH.shape[1] == hidden_size and weight_VH.stride(1) == 1
    assert out_CH.shape == product_CH.shape and out_CH.stride(1) == 1
    assert target_C.is_contiguous() and others_C.is_contiguous() and inverse_C.is_contiguous()
    row_temperature = isinstance(temperature, Tensor)
    if row_temperature:
        assert temperature.dtype == torch.float32 and temperature.is_contiguous() and temperature.shape == (num_rows,)
    if num_rows == 0 or hidden_size == 0:
        return
    with torch.cuda.device_of(product_CH):
        jacobian_kernel[(num_rows, triton.cdiv(hidden_size, block))](
            product_CH,
            weight_VH,
            target_C,
            others_C,
            inverse_C,
            temperature if row_temperature else float(temperature),
            out_CH,
            hidden_size,
            product_CH.stride(0),
            weight_VH.stride(0),
            out_CH.stride(0),
            ROW_TEMPERATURE=row_temperature,
            BLOCK=block,
            num_warps=JACOBIAN_WARPS,
        )
