"""`sample_with_logprob` in plain torch, bit for bit as `reference.py`, in blocks of rows that stay in the cache.

The reference holds 32-bit words in int64 so that it reads like the hash that it is. Here they are int32, whose products
wrap as the hash wants them: half the memory, and products that every CPU has. A right shift of int32 brings the sign
along, which a mask takes off. Noise stays the same to the last bit: words are read as uint32 where they become numbers,
and numbers are only ever scaled by powers of two.

Shape suffixes: B rows, V vocabulary, C rows of a block.
"""

import torch
from torch import Tensor

from coars_kernels.sample_with_logprob.reference import LARGEST_UNIFORM, MULTIPLIER_1, MULTIPLIER_2, noise_keys

BLOCK_ELEMENTS = 2**17
"""Logits worked on at a time on a CPU: three buffers of 512 KiB."""
GROUP = 128
"""Columns whose smallest value is found first: torch finds a smallest value ten times as fast as its place."""


def _signed(word: int) -> int:
    """A 32-bit word as int32 holds it."""
    return word - 2**32 if word >= 2**31 else word


def _mix_(words: Tensor, scratch: Tensor) -> None:
    """`reference.mix_` on int32 words, in place."""
    for shift, multiplier in ((16, MULTIPLIER_1), (15, MULTIPLIER_2), (16, None)):
        torch.bitwise_right_shift(words, shift, out=scratch)
        words.bitwise_xor_(scratch.bitwise_and_(2 ** (32 - shift) - 1))
        if multiplier is not None:
            words.mul_(_signed(multiplier))


def _minus_noise(keys_2C1: Tensor, indices_V: Tensor, words_CV: Tensor, scratch_CV: Tensor) -> Tensor:
    """[C, V] fp32, each token's exponential noise with a minus, in the memory of `scratch`; overwrites both buffers."""
    torch.bitwise_xor(indices_V, keys_2C1[0], out=words_CV)
    _mix_(words_CV, scratch_CV)
    words_CV.bitwise_xor_(keys_2C1[1])
    _mix_(words_CV, scratch_CV)
    half = torch.full((), -(2.0**-33), device=words_CV.device)
    noise_CV = scratch_CV.view(torch.float32).copy_(words_CV.view(torch.uint32))
    # -(word + 0.5) / 2**32: a factor that is a power of two moves no rounding
    torch.add(half, noise_CV, alpha=-(2.0**-32), out=noise_CV)
    return noise_CV.clamp_(min=-LARGEST_UNIFORM).log1p_()


def _place_of_smallest(padded_CV: Tensor) -> Tensor:
    """[C, 1] int64, the first column with the smallest value; the number of columns is a multiple of `GROUP`."""
    groups = padded_CV.view(padded_CV.shape[0], -1, GROUP)
    group_C1 = groups.amin(-1).argmin(-1, keepdim=True)
    inside_CG = groups.gather(1, group_C1[:, :, None].expand(-1, -1, GROUP)).squeeze(1)
    return group_C1 * GROUP + inside_CG.argmin(-1, keepdim=True)


def sample_with_logprob_torch(
    logits: Tensor, *, seed: int | Tensor, sequence_id: Tensor, position: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(token [B] int64, logp [B] fp32) of checked arguments; builds no autograd graph."""
    (num_rows, vocab_size), device = logits.shape, logits.device
    token_B1 = torch.empty(num_rows, 1, dtype=torch.int64, device=device)
    logp_B1 = torch.empty(num_rows, 1, dtype=torch.float32, device=device)
    if not num_rows:
        return token_B1.squeeze(1), logp_B1.squeeze(1)
    size = num_rows
    if device.type == "cpu":
        # Two rows at least: the sum of a single row is split among threads, and rounds in another way.
        num_blocks = -(-num_rows // max(2, BLOCK_ELEMENTS // vocab_size))
        size = max(min(2, num_rows), -(-num_rows // num_blocks))
    words_CV, scratch_CV = torch.empty(2, size, vocab_size, dtype=torch.int32, device=device)
    race_CV = torch.full((size, -(-vocab_size // GROUP) * GROUP), torch.inf, device=device)
    indices_V = torch.arange(vocab_size, dtype=torch.int32, device=device)
    keys_2B1 = noise_keys(seed, sequence_id, position)
    keys_2B1 = ((keys_2B1 ^ 2**31) - 2**31).int()  # signed
    for start in range(0, num_rows, size):
        block = slice(min(start, num_rows - size), min(start, num_rows - size) + size)
        scaled_CV = logits[block].float()
        if temperature not in (0.0, 1.0):
            scaled_CV = scaled_CV / temperature
        # before the masses, which take the memory of its words
        noise_CV = None if not temperature else _minus_noise(keys_2B1[:, block], indices_V, words_CV, scratch_CV)
        peak_C1 = scaled_CV.amax(-1, keepdim=True)
        mass_CV = torch.sub(scaled_CV, peak_C1, out=words_CV.view(torch.float32)).exp_()
        total_C1 = mass_CV.sum(-1, keepdim=True)
        if noise_CV is None:
            place_C1 = scaled_CV.argmax(-1, keepdim=True)
        else:
            torch.div(mass_CV, noise_CV, out=race_CV[:, :vocab_size])
            place_C1 = _place_of_smallest(race_CV)
        token_B1[block] = place_C1
        logp_B1[block] = (scaled_CV.gather(1, place_C1) - peak_C1) - total_C1.log()
    return token_B1.squeeze(1), logp_B1.squeeze(1)
