"""The head in one persistent Triton product: tiles of logits become masses and partial sums, and are never stored.

    z_y             one dot product per row, the anchor
    tiles           [student rows; teacher rows] @ W.T, fp32 accumulation; the epilogue of a tile forms exp(z - z_y),
                    leaves the target out by its index, writes the student's masses, and one partial sum per row
    finish          the partial sums of a row, in a fixed order, become logp, shares and entropy
    repair          rows whose masses could overflow are computed again, slowly; programs of good rows leave at once

The equations are those of `triton_rows.py`. Student and teacher rows stay in their two tensors: tiles of rows alternate
between them, so that both meet a tile of W while the L2 cache holds it. Every launch is made whatever the data, so the
host never waits.

What is left out: the product of the masses with W, which is the library's, and chunking. fp16 masses overflow where
logp < -11 and are then repaired, but lose digits where all other tokens together are below 1e-4 of the target; with
fp16 rows `triton_rows.py`, which always puts the largest mass at 1, is the better choice.

Shape suffixes: C rows of a chunk (of each of the S = 1 or 2 streams), V vocabulary, H hidden size, T tiles of V.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright reads a kernel as an ordinary function: `num_warps` is no parameter of it, and an int is no `tl.constexpr`.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from coars_kernels.dispatch import num_processors
from coars_kernels.linear_logprob.rows import RowMasses
from coars_kernels.linear_logprob.triton_rows import LARGEST_SUM, LN_2, LOG2_E, finish_rows, largest_anchor


class FusedConfig(NamedTuple):
    """Sizes of a tile, and how it is run."""

    block_rows: int
    block_vocab: int
    block_hidden: int
    """Columns of both operands that one step of the product's loop loads."""
    group_rows: int
    """Tiles of rows, both streams counted, that sweep the vocabulary together; their rows should fit the L2 cache."""
    num_warps: int
    num_stages: int
    programs_per_processor: int = 1


# By (compute capability, bytes per number). Chosen by the compiler's figures (registers, shared memory, spills), not
# yet measured on a GPU. fp32 is multiplied exactly, without tensor cores, so its tiles are small.
CONFIGS = {
    (80, 2): FusedConfig(128, 256, 32, 16, 8, 4),
    (80, 4): FusedConfig(64, 64, 16, 16, 8, 3),
    (90, 2): FusedConfig(128, 256, 64, 16, 8, 4),
    (90, 4): FusedConfig(64, 64, 16, 16, 8, 3),
}
ANCHOR_BLOCK, ANCHOR_WARPS = 1024, 4
FINISH_ROWS, FINISH_TILES, FINISH_WARPS = 32, 32, 4
REPAIR_VOCAB, REPAIR_HIDDEN, REPAIR_WARPS = 32, 128, 8
# The last chunk has other numbers of rows than the rest: it must not compile everything again.
NOT_SPECIALIZED = ["num_rows", "others_stride"]


@triton.jit
def _heat_of(temperature, rows, ROW_TEMPERATURE: tl.constexpr):
    if ROW_TEMPERATURE:
        return tl.load(temperature + rows)
    else:
        return temperature


@triton.jit
def _rows_of_stream(student, teacher, student_stride, teacher_stride, stream, row):
    """The address of a row of the student (stream 0) or the teacher (stream 1)."""
    address = student + row * student_stride
    if teacher is not None:
        if stream == 1:
            address = teacher + row * teacher_stride
    return address


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def anchor_kernel(
    student,  # [C, H]
    teacher,  # [C, H], or None
    weight,  # [V, H]
    bias,  # [V] fp32, or None
    target,  # [C] int64
    anchor,  # [S, C] fp32
    num_rows,
    hidden_size,
    student_stride,
    teacher_stride,
    weight_stride,
    BLOCK: tl.constexpr,
):
    """anchor = the target's logit before the temperature; one program per row and stream."""
    row = tl.program_id(0).to(tl.int64)
    stream = tl.program_id(1)
    token = tl.load(target + row)
    hidden = _rows_of_stream(student, teacher, student_stride, teacher_stride, stream, row)
    weight += token * weight_stride
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, hidden_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < hidden_size
        left = tl.load(hidden + columns, mask=inside, other=0.0).to(tl.float32)
        products += left * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    own = tl.sum(products, axis=0)
    if bias is not None:
        own += tl.load(bias + token)
    own = tl.where(own == float("inf"), float("nan"), own)  # an overflow upstream is no certainty
    tl.store(anchor + stream.to(tl.int64) * num_rows + row, own)


@triton.jit
def _tile_of(tile, row_tiles, vocab_tiles, GROUP_ROWS: tl.constexpr):
    """(tile of rows, tile of V): groups of row tiles sweep V together, rows fastest, so that a tile of W is reused."""
    per_group = GROUP_ROWS * vocab_tiles
    first = tile // per_group * GROUP_ROWS
    height = tl.minimum(row_tiles - first, GROUP_ROWS)
    within = tile % per_group
    return first + within % height, within // height


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def fused_masses_kernel(
    student,  # [C, H]
    teacher,  # [C, H], or None
    weight,  # [V, H]
    bias,  # [V] fp32, or None
    target,  # [C] int64
    temperature,  # [C] fp32, or one number
    anchor,  # [S, C] fp32
    mass,  # [C, V or a little more], or None
    others,  # [T, S * C] fp32: partial sums of the masses
    rounded,  # [T, C] fp32: the student's, as stored; or None
    weighted,  # [T, C] fp32: the student's mass * exponent; or None
    num_rows,
    vocab_size,
    hidden_size,
    student_stride,
    teacher_stride,
    weight_stride,
    mass_stride,
    mass_columns,
    ROW_TEMPERATURE: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,  # H is a multiple of BLOCK_HIDDEN
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    STREAMS: tl.constexpr = 1 if teacher is None else 2
    row_tiles = tl.cdiv(num_rows, BLOCK_ROWS) * STREAMS
    vocab_tiles = tl.cdiv(vocab_size, BLOCK_VOCAB)
    for tile in tl.range(tl.program_id(0), row_tiles * vocab_tiles, tl.num_programs(0)):
        row_tile, vocab_tile = _tile_of(tile, row_tiles, vocab_tiles, GROUP_ROWS)
        stream = row_tile % STREAMS
        first_row = row_tile // STREAMS * BLOCK_ROWS
        first_token = vocab_tile * BLOCK_VOCAB
        # rows and tokens past the end repeat the last one; the epilogue leaves them out
        rows = tl.minimum(tl.arange(0, BLOCK_ROWS), num_rows - 1 - first_row)
        tokens = tl.minimum(tl.arange(0, BLOCK_VOCAB), vocab_size - 1 - first_token)
        columns = tl.arange(0, BLOCK_HIDDEN)
        hidden = _rows_of_stream(student, teacher, student_stride, teacher_stride, stream, first_row.to(tl.int64))
        stride = student_stride
        if teacher is not None:
            stride = tl.where(stream == 1, teacher_stride, student_stride)
        left_at = hidden + rows[:, None] * stride + columns[None, :]
        first_of_tile = weight + first_token.to(tl.int64) * weight_stride
        right_at = first_of_tile + tokens[:, None] * weight_stride + columns[None, :]
        product = tl.zeros([BLOCK_ROWS, BLOCK_VOCAB], tl.float32)
        for start in range(0, hidden_size, BLOCK_HIDDEN):
            if WHOLE_STEPS:
                left, right = tl.load(left_at), tl.load(right_at)
            else:
                inside = columns[None, :] < hidden_size - start
                left = tl.load(left_at, mask=inside, other=0.0)
                right = tl.load(right_at, mask=inside, other=0.0)
            product = tl.dot(left, tl.trans(right), product, input_precision="ieee")
            left_at += BLOCK_HIDDEN
            right_at += BLOCK_HIDDEN

        rows = first_row + tl.arange(0, BLOCK_ROWS)
        tokens = first_token + tl.arange(0, BLOCK_VOCAB)
        is_row = rows < num_rows
        place = stream * num_rows + rows  # both streams count S * C rows, far below 2^31
        # tokens past the end get logits of -inf: a comparison with V for each mass would spill registers
        if bias is None:
            extra = tl.where(tokens < vocab_size, 0.0, -float("inf"))
        else:
            extra = tl.load(bias + tokens, mask=tokens < vocab_size, other=-float("inf"))
        product += extra[None, :]
        scale = LOG2_E / _heat_of(temperature, tl.minimum(rows, num_rows - 1), ROW_TEMPERATURE)
        own = tl.load(anchor + place, mask=is_row, other=0.0)
        target_token = tl.load(target + rows, mask=is_row, other=0).to(tl.int32)
        if ROW_TEMPERATURE:
            exponent = (product - own[:, None]) * scale[:, None]
        else:
            exponent = (product - own[:, None]) * scale
        value = tl.where(tokens[None, :] == target_token[:, None], 0.0, tl.exp2(exponent))
        partial = vocab_tile.to(tl.int64) * num_rows
        tl.store(others + partial * STREAMS + place, tl.sum(value, axis=1), mask=is_row)
        if weighted is not None:
            # a forbidden token has mass 0 and exponent -inf; for both streams, since a branch here spills registers
            sums = tl.sum(value * tl.maximum(exponent, -1e30), axis=1)
            tl.store(weighted + partial + rows, sums, mask=is_row & (stream == 0))
        if mass is not None:
            if stream == 0:
                stored = value.to(mass.dtype.element_ty)
                tl.store(rounded + partial + rows, tl.sum(stored.to(tl.float32), axis=1), mask=is_row)
                mass_at = mass + rows.to(tl.int64)[:, None] * mass_stride + tokens[None, :]
                # a mask that ends at an odd column breaks all stores into single numbers, hence columns beyond V
                tl.store(mass_at, stored, mask=is_row[:, None] & (tokens[None, :] < mass_columns))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def finish_kernel(
    others,  # [T, S * C] fp32
    rounded,  # [T, C] fp32, or None
    weighted,  # [T, C] fp32, or None
    logp,  # [C] fp32
    others_share,  # [C] fp32, or None for the teacher, as the two below
    inverse,
    entropy,
    num_rows,
    vocab_tiles,
    others_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """Sum the partial sums of a block of rows. logp = NaN marks a row for repair."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = rows < num_rows
    others_sum = tl.zeros([BLOCK_TILES, BLOCK_ROWS], tl.float32)
    rounded_sum = tl.zeros([BLOCK_TILES, BLOCK_ROWS], tl.float32)
    weighted_sum = tl.zeros([BLOCK_TILES, BLOCK_ROWS], tl.float32)
    for start in range(0, vocab_tiles, BLOCK_TILES):
        tiles = (start + tl.arange(0, BLOCK_TILES))[:, None]
        inside = (tiles < vocab_tiles) & is_row[None, :]
        others_sum += tl.load(others + tiles.to(tl.int64) * others_stride + rows[None, :], mask=inside, other=0.0)
        place = tiles.to(tl.int64) * num_rows + rows[None, :]
        if rounded is not None:
            rounded_sum += tl.load(rounded + place, mask=inside, other=0.0)
        if weighted is not None:
            weighted_sum += tl.load(weighted + place, mask=inside, other=0.0)
    other_mass = tl.sum(others_sum, axis=0)
    fits = other_mass <= LARGEST_SUM  # false for NaN too
    stored_mass = other_mass
    if rounded is not None:
        stored_mass = tl.sum(rounded_sum, axis=0)
        fits &= stored_mass <= LARGEST_SUM  # a mass beyond fp16 was stored as inf
    lead = tl.zeros([BLOCK_ROWS], tl.float32)
    row_logp, row_share, row_inverse, row_entropy = finish_rows(
        lead, other_mass, stored_mass, tl.sum(weighted_sum, axis=0) * LN_2
    )
    tl.store(logp + rows, tl.where(fits, row_logp, float("nan")), mask=is_row)
    if others_share is not None:
        tl.store(others_share + rows, row_share, mask=is_row)
        tl.store(inverse + rows, row_inverse, mask=is_row)
    if entropy is not None:
        tl.store(entropy + rows, row_entropy, mask=is_row)


@triton.jit
def _logits_of_block(
    hidden, weight, bias, tokens, vocab_size, hidden_size, weight_stride,
    BLOCK_VOCAB: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """Logits of one row for a block of tokens; -inf past the end of the vocabulary."""
    is_token = tokens < vocab_size
    weight += tokens.to(tl.int64)[:, None] * weight_stride
    products = tl.zeros([BLOCK_VOCAB, BLOCK_HIDDEN], tl.float32)
    for start in range(0, hidden_size, BLOCK_HIDDEN):
        columns = start + tl.arange(0, BLOCK_HIDDEN)
        inside = columns < hidden_size
        left = tl.load(hidden + columns, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(weight + columns[None, :], mask=is_token[:, None] & inside[None, :], other=0.0)
        products += left[None, :] * right.to(tl.float32)
    logits = tl.sum(products, axis=1)
    if bias is not None:
        logits += tl.load(bias + tokens, mask=is_token, other=0.0)
    return tl.where(is_token, logits, -float("inf"))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def repair_kernel(
    student,  # [C, H]
    teacher,  # [C, H], or None
    weight,  # [V, H]
    bias,  # [V] fp32, or None
    target,  # [C] int64
    temperature,  # [C] fp32, or one number
    anchor,  # [S, C] fp32
    mass,  # [C, V or a little more], or None
    logp,  # [S, C] fp32
    others_share,  # [C] fp32, as the two below
    inverse,
    entropy,  # or None
    num_rows,
    vocab_size,
    hidden_size,
    student_stride,
    teacher_stride,
    weight_stride,
    mass_stride,
    mass_columns,
    ROW_TEMPERATURE: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """Rows marked by NaN again, anchored at their largest logit: two sweeps over W by one program."""
    row = tl.program_id(0).to(tl.int64)
    stream = tl.program_id(1)
    place = stream.to(tl.int64) * num_rows + row
    known = tl.load(logp + place)
    if known == known:
        return
    hidden = _rows_of_stream(student, teacher, student_stride, teacher_stride, stream, row)
    token = tl.load(target + row)
    own = tl.load(anchor + place)
    heat = _heat_of(temperature, row, ROW_TEMPERATURE)

    largest = tl.full([BLOCK_VOCAB], -float("inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK_VOCAB):
        tokens = start + tl.arange(0, BLOCK_VOCAB)
        logits = _logits_of_block(
            hidden, weight, bias, tokens, vocab_size, hidden_size, weight_stride, BLOCK_VOCAB, BLOCK_HIDDEN
        )
        largest = tl.maximum(largest, logits)  # another token's: a row led by its target needs no repair
    peak = largest_anchor(tl.max(largest, axis=0), own)

    others = tl.zeros([BLOCK_VOCAB], tl.float32)
    rounded = tl.zeros([BLOCK_VOCAB], tl.float32)
    weighted = tl.zeros([BLOCK_VOCAB], tl.float32)
    for start in range(0, vocab_size, BLOCK_VOCAB):
        tokens = start + tl.arange(0, BLOCK_VOCAB)
        logits = _logits_of_block(
            hidden, weight, bias, tokens, vocab_size, hidden_size, weight_stride, BLOCK_VOCAB, BLOCK_HIDDEN
        )
        exponent = (logits - peak) * (LOG2_E / heat)
        value = tl.where(tokens == token, 0.0, tl.exp2(exponent))
        stored = value
        if mass is not None:
            if stream == 0:
                mass_at = mass + row * mass_stride + tokens
                tl.store(mass_at, value.to(mass.dtype.element_ty), mask=tokens < mass_columns)
            stored = value.to(mass.dtype.element_ty).to(tl.float32)
        others += value
        rounded += stored
        weighted += tl.where(value == 0.0, 0.0, value * exponent)
    row_logp, row_share, row_inverse, row_entropy = finish_rows(
        (own - peak) / heat, tl.sum(others, axis=0), tl.sum(rounded, axis=0), tl.sum(weighted, axis=0) * LN_2
    )
    tl.store(logp + place, row_logp)
    if stream == 0:
        tl.store(others_share + row, row_share)
        tl.store(inverse + row, row_inverse)
        if entropy is not None:
            tl.store(entropy + row, row_entropy)


def config_of(weight_VH: Tensor) -> FusedConfig:
    """The table's entry for the weight's device and dtype; the interpreter takes the smallest tiles."""
    if not weight_VH.is_cuda:
        return CONFIGS[80, 4]
    # 8.6, 8.9 and 12.x have 99 KiB of shared memory for a block, which the tiles for 8.0 need less of
    large = torch.cuda.get_device_capability(weight_VH.device)[0] in (9, 10)
    return CONFIGS[90 if large else 80, weight_VH.element_size()]


def fused_masses(
    student_CH: Tensor,
    teacher_CH: Tensor | None,
    weight_VH: Tensor,
    target_C: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mass_CV: Tensor | None = None,
    want_entropy: bool = False,
    config: FusedConfig | None = None,
) -> tuple[RowMasses, Tensor | None]:
    """The student's masses and statistics, and the teacher's log-probabilities [C]; five or six launches, no waiting.

    Args:
        student_CH, teacher_CH, weight_VH: of one 16-bit dtype or fp32, columns of unit stride, rows at any distance.
            Where H and the distances are multiples of 16, loads are wide. The teacher may be None.
        target_C: int64, in [0, V).
        bias_V: fp32 or None; -inf forbids a token.
        temperature: a number, or [C] fp32; both streams share it.
        mass_CV: where the student's masses go, in the dtype of the product with W; None if no gradient is wanted.
            Where V is no multiple of 16, stores are wide only if this has V rounded up to 16 columns, whose last
            then become 0, and such a row stride.
        want_entropy: also return the student's entropy.
        config: sizes of the tiles, for tuning; by default from the table.
    """
    (num_rows, hidden_size), vocab_size = student_CH.shape, weight_VH.shape[0]
    num_streams = 1 if teacher_CH is None else 2
    _check(student_CH, teacher_CH, weight_VH, target_C, bias_V, temperature, mass_CV)
    config = config or config_of(weight_VH)
    row_temperature = isinstance(temperature, Tensor)
    heat = temperature if row_temperature else float(temperature)
    vocab_tiles = triton.cdiv(vocab_size, config.block_vocab)

    def fp32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=weight_VH.device)

    anchor_SC, logp_SC = fp32(num_streams, num_rows), fp32(num_streams, num_rows)
    others_C, inverse_C = fp32(2, num_rows).unbind()
    entropy_C = fp32(num_rows) if want_entropy else None
    others_TC = fp32(vocab_tiles, num_streams * num_rows)
    rounded_TC = None if mass_CV is None else fp32(vocab_tiles, num_rows)
    weighted_TC = fp32(vocab_tiles, num_rows) if want_entropy else None
    operands = (student_CH, teacher_CH, weight_VH, bias_V, target_C)
    strides = (student_CH.stride(0), 0 if teacher_CH is None else teacher_CH.stride(0), weight_VH.stride(0))
    mass_stride, mass_columns = (0, 0) if mass_CV is None else (mass_CV.stride(0), mass_CV.shape[1])
    result = RowMasses(logp_SC[0], others_C, inverse_C, entropy_C)
    teacher_logp_C = None if teacher_CH is None else logp_SC[1]
    if num_rows == 0:
        return result, teacher_logp_C

    with torch.cuda.device_of(weight_VH):
        per_row = (num_rows, num_streams)
        anchor_kernel[per_row](
            *operands, anchor_SC, num_rows, hidden_size, *strides, BLOCK=ANCHOR_BLOCK, num_warps=ANCHOR_WARPS
        )
        num_tiles = triton.cdiv(num_rows, config.block_rows) * num_streams * vocab_tiles
        programs = min(num_tiles, num_processors(weight_VH.device) * config.programs_per_processor)
        fused_masses_kernel[(programs,)](
            *operands, heat, anchor_SC, mass_CV, others_TC, rounded_TC, weighted_TC,
            num_rows, vocab_size, hidden_size, *strides, mass_stride, mass_columns,
            ROW_TEMPERATURE=row_temperature,
            WHOLE_STEPS=hidden_size % config.block_hidden == 0,
            BLOCK_ROWS=config.block_rows,
            BLOCK_VOCAB=config.block_vocab,
            BLOCK_HIDDEN=config.block_hidden,
            GROUP_ROWS=config.group_rows,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )  # fmt: skip
        sizes = (num_rows, vocab_tiles, num_streams * num_rows)
        blocks = {"BLOCK_ROWS": FINISH_ROWS, "BLOCK_TILES": FINISH_TILES, "num_warps": FINISH_WARPS}
        finish = finish_kernel[(triton.cdiv(num_rows, FINISH_ROWS),)]
        finish(others_TC, rounded_TC, weighted_TC, *result, *sizes, **blocks)
        if teacher_logp_C is not None:
            finish(others_TC[:, num_rows:], None, None, teacher_logp_C, None, None, None, *sizes, **blocks)
        repair_kernel[per_row](
            *operands, heat, anchor_SC, mass_CV, logp_SC, others_C, inverse_C, entropy_C,
            num_rows, vocab_size, hidden_size, *strides, mass_stride, mass_columns,
            ROW_TEMPERATURE=row_temperature,
            BLOCK_VOCAB=REPAIR_VOCAB,
            BLOCK_HIDDEN=REPAIR_HIDDEN,
            num_warps=REPAIR_WARPS,
        )  # fmt: skip
    return result, teacher_logp_C


def _check(
    student_CH: Tensor,
    teacher_CH: Tensor | None,
    weight_VH: Tensor,
    target_C: Tensor,
    bias_V: Tensor | None,
    temperature: float | Tensor,
    mass_CV: Tensor | None,
) -> None:
    num_rows, vocab_size = student_CH.shape[0], weight_VH.shape[0]
    for matrix in (student_CH, weight_VH) if teacher_CH is None else (student_CH, teacher_CH, weight_VH):
        assert matrix.dtype == weight_VH.dtype and matrix.shape[1] == weight_VH.shape[1] and matrix.stride(1) == 1
    assert teacher_CH is None or teacher_CH.shape == student_CH.shape
    assert target_C.dtype == torch.int64 and target_C.is_contiguous() and target_C.shape == (num_rows,)
    assert bias_V is None or (bias_V.dtype == torch.float32 and bias_V.is_contiguous())
    if isinstance(temperature, Tensor):
        assert temperature.dtype == torch.float32 and temperature.is_contiguous() and temperature.shape == (num_rows,)
    if mass_CV is not None:
        assert mass_CV.shape[0] == num_rows and mass_CV.stride(1) == 1
        assert vocab_size <= mass_CV.shape[1] <= triton.cdiv(vocab_size, 16) * 16
