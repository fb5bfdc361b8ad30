"""`sample_with_logprob` on a GPU: the logits are read once, whatever the vocabulary, and nothing of their size is made.

    slab kernel    1024 logits of a row in registers: their peak and sum of masses, and the winner of their race
    merge kernel   a row's slabs: the log-sum-exp, and the winner of the winners

A slab is the same part of the vocabulary whatever the batch is, and slabs are merged in one order. So a token and its
log-prob do not depend on the batch, to the last bit, and one row of 152k logits is work for 149 programs.

The noise has the reference's bits: uint32 wraps as the hash wants, and its way to a number in (0, 1) rounds alike. The
race within a slab is the reference's too, mass / noise from the slab's peak; between slabs it is decided by logarithms,
log(mass / noise) + peak. Rounding differs from the reference's in the last places, so a race that is as close as that
may end otherwise: one token in about a million.

The compiler makes about 110 instructions of a logit, most of them for its noise: by that count arithmetic takes some
three times as long as reading fp32 logits. Not measured.

A row with NaN has the log-prob NaN, and so has one with +inf or without a finite logit; its token is in the vocabulary.
Left out: float64, filters (top-k, top-p).

Shape suffixes: B rows, V vocabulary, S slabs of a row.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright reads a kernel as an ordinary function: no grid, no `num_warps`, and an int is no `tl.constexpr`.

import torch
import triton
import triton.language as tl
from torch import Tensor

from coars_kernels import aot_library
from coars_kernels.linear_logprob.triton_rows import log1p
from coars_kernels.sample_with_logprob import reference

aot_library.install()  # where COARS_KERNELS_AOT is set; before the first launch

# 8 logits for each thread. Chosen so that one row fills a GPU, not measured.
SLAB, SLAB_WARPS = 1024, 4
MERGE_SLABS, MERGE_WARPS = 256, 4

MULTIPLIER_1, MULTIPLIER_2 = tl.constexpr(reference.MULTIPLIER_1), tl.constexpr(reference.MULTIPLIER_2)
UNIT, LARGEST_UNIFORM = tl.constexpr(2.0**-32), tl.constexpr(reference.LARGEST_UNIFORM)
# Rows of the partial results.
PEAK, TOTAL, SCORE, CHOSEN, NUM_SUMS = map(tl.constexpr, range(5))


@triton.jit
def mix(words):
    """`reference.mix_` of uint32."""
    words = words ^ (words >> 16)
    words = words * MULTIPLIER_1
    words = words ^ (words >> 15)
    words = words * MULTIPLIER_2
    return words ^ (words >> 16)


@triton.jit
def hashed(key, number):
    """The key with 64 bits more in it."""
    return mix(mix(key ^ number.to(tl.uint32)) ^ (number >> 32).to(tl.uint32))


@triton.jit
def noise_key(start, seed, sequence_id, position):
    """One of `reference.noise_keys`, of a row; where `seed` is None, `start` has it in it."""
    key = start.to(tl.uint32)
    if seed is not None:
        key = hashed(key, tl.load(seed))
    return mix(hashed(key, sequence_id) ^ position.to(tl.uint32))


@triton.jit
def uniform(key_0, key_1, index):
    """`reference.uniform_noise` at some indices of the vocabulary."""
    words = mix(mix(index.to(tl.uint32) ^ key_0) ^ key_1)
    return tl.minimum((words.to(tl.float32) + 0.5) * UNIT, LARGEST_UNIFORM)


@triton.jit(do_not_specialize=["num_slabs", "start_0", "start_1"])
def slab_kernel(
    sums,  # [B, 4, S] fp32: peak, sum of exp(logit - peak), score of the winner, logit of the winner
    places,  # [B, S] int32: the winner's place in the vocabulary
    logits,  # [B, V]
    sequence_id,  # [B] int64 or int32
    position,  # [B] int64 or int32
    seed,  # [1] int64, or None
    num_slabs,
    vocab_size,
    logits_stride,
    start_0,  # int32: the two words that the keys begin with
    start_1,
    inverse_temperature,  # fp32, 1 where GREEDY
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, slab), one dimension: other dimensions of a grid end at 65,535."""
    row, slab = (tl.program_id(0) // num_slabs).to(tl.int64), tl.program_id(0) % num_slabs
    index = slab * BLOCK + tl.arange(0, BLOCK)
    inside = index < vocab_size
    row_logits = logits + row * logits_stride
    scaled = tl.load(row_logits + index, mask=inside, other=-float("inf")).to(tl.float32) * inverse_temperature
    peak = tl.max(scaled, axis=0)  # passes NaN over
    base = tl.where(peak == -float("inf"), 0.0, peak)
    mass = tl.exp(scaled - base)
    if GREEDY:
        race = scaled
    else:
        id = tl.load(sequence_id + row).to(tl.int64)
        place = tl.load(position + row).to(tl.int64)
        keys = noise_key(start_0, seed, id, place), noise_key(start_1, seed, id, place)
        noise = -log1p(-uniform(keys[0], keys[1], index))
        race = mass / noise
    # what is no number wins here, so that the token is in the vocabulary
    race = tl.where(mass == mass, race, float("inf"))
    best, winner = tl.max(tl.where(inside, race, -float("inf")), axis=0, return_indices=True)
    token = slab * BLOCK + winner
    if not GREEDY:
        # the reference's masses are then all NaN, and the first one wins
        token = tl.where((best == float("inf")) & (peak < float("inf")), 0, token)
    at = sums + row * NUM_SUMS * num_slabs + slab
    tl.store(at + PEAK * num_slabs, peak)
    tl.store(at + TOTAL * num_slabs, tl.sum(mass, axis=0))
    tl.store(at + SCORE * num_slabs, best if GREEDY else tl.log(best) + base)
    tl.store(at + CHOSEN * num_slabs, tl.load(row_logits + token).to(tl.float32) * inverse_temperature)
    tl.store(places + row * num_slabs + slab, token)


@triton.jit(do_not_specialize=["num_slabs"])
def merge_kernel(
    token,  # [B] int64
    logp,  # [B] fp32
    sums,  # [B, 4, S] fp32, of the slab kernel
    places,  # [B, S] int32
    num_slabs,
    BLOCK: tl.constexpr,
):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    at, places_at = sums + row * NUM_SUMS * num_slabs, places + row * num_slabs
    peak, total, best, chosen = -float("inf"), 0.0, -float("inf"), -float("inf")
    winner = 0
    for start in range(0, num_slabs, BLOCK):
        slab = start + tl.arange(0, BLOCK)
        inside = slab < num_slabs
        peaks = tl.load(at + PEAK * num_slabs + slab, mask=inside, other=-float("inf"))
        totals = tl.load(at + TOTAL * num_slabs + slab, mask=inside, other=0.0)
        scores = tl.load(at + SCORE * num_slabs + slab, mask=inside, other=-float("inf"))
        new_peak = tl.maximum(peak, tl.max(peaks, axis=0))
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        total = total * tl.exp(peak - base) + tl.sum(totals * tl.exp(peaks - base), axis=0)
        peak = new_peak
        score, first = tl.max(scores, axis=0, return_indices=True)
        if (score > best) | (start == 0):
            best = score
            winner = tl.load(places_at + start + first)
            chosen = tl.load(at + CHOSEN * num_slabs + start + first)
    tl.store(token + row, winner)
    tl.store(logp + row, (chosen - peak) - tl.log(total))


def signed(word: int) -> int:
    """A word of 32 bits as an argument of 32 bits is in Triton."""
    return (word ^ 2**31) - 2**31


def sample_with_logprob_triton(
    logits: Tensor,
    *,
    seed: int | Tensor,
    sequence_id: Tensor,
    position: Tensor,
    temperature: float = 1.0,
    slab: int = SLAB,
    merge_slabs: int = MERGE_SLABS,
) -> tuple[Tensor, Tensor]:
    """(token [B] int64, logp [B] fp32) of checked arguments. Two launches, no waiting; `slab` and `merge_slabs` are the
    kernels' blocks, for tests and tuning."""
    num_rows, vocab_size = logits.shape
    token = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    logp = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if not num_rows:
        return token, logp
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    num_slabs = triton.cdiv(vocab_size, slab)
    sums = torch.empty(num_rows, NUM_SUMS.value, num_slabs, dtype=torch.float32, device=logits.device)
    places = torch.empty(num_rows, num_slabs, dtype=torch.int32, device=logits.device)
    fixed = not isinstance(seed, Tensor)
    starts = reference.key_starts(seed) if fixed else reference.KEY_START
    # Kernels go to the current device, which need not be the tensors'.
    with torch.cuda.device_of(logits):
        slab_kernel[(num_rows * num_slabs,)](
            sums, places, logits, sequence_id.contiguous(), position.contiguous(),
            None if fixed or not temperature else seed,
            num_slabs, vocab_size, logits.stride(0), *map(signed, starts), 1.0 / temperature if temperature else 1.0,
            GREEDY=not temperature, BLOCK=slab, num_warps=SLAB_WARPS,
        )  # fmt: skip
        merge_kernel[(num_rows,)](token, logp, sums, places, num_slabs, BLOCK=merge_slabs, num_warps=MERGE_WARPS)
    return token, logp
