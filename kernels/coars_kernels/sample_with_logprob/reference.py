"""What `sample_with_logprob` means: stateless noise from an integer hash, and a race that the sampled token wins.

Noise. A 64-bit key, held as two 32-bit words, is hashed from (seed, sequence id, position); each vocabulary index v
then gives 32 random bits, `mix(mix(v ^ key0) ^ key1)`. `mix` is the 32-bit finaliser "lowbias32" (Ellis,
hash-prospector). No state, so a token's noise does not depend on which other sequences share its batch, nor on the
order of sampling.

Sampling. With E_v independent and exponential, argmax_v p_v / E_v is distributed as p: this is the Gumbel-max rule
argmax_v (log p_v - log E_v) without its logarithm. A token of probability 0 can never win.

Words are 32-bit values held in int64 tensors, masked after each product, so that the same few lines serve any backend.
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIER_1, MULTIPLIER_2 = 0x7FEB352D, 0x846CA68B
# Start values of the two words: fractional digits of the golden ratio and of the square root of 3.
KEY_START = (0x9E3779B9, 0xBB67AE85)
LARGEST_UNIFORM = 1.0 - 2.0**-24


def mix_int(word: int) -> int:
    """`mix_` for one Python int in [0, 2**32)."""
    word ^= word >> 16
    word = word * MULTIPLIER_1 & MASK
    word ^= word >> 15
    word = word * MULTIPLIER_2 & MASK
    return word ^ (word >> 16)


def mix_(words: Tensor) -> Tensor:
    """lowbias32 on 32-bit words in int64, in place: a bijection of [0, 2**32) in which every bit moves every other."""
    # one scratch tensor for the three shifts: fresh memory costs more here than the arithmetic
    shifted = words >> 16
    words.bitwise_xor_(shifted).mul_(MULTIPLIER_1).bitwise_and_(MASK)
    words.bitwise_xor_(torch.bitwise_right_shift(words, 15, out=shifted)).mul_(MULTIPLIER_2).bitwise_and_(MASK)
    return words.bitwise_xor_(torch.bitwise_right_shift(words, 16, out=shifted))


def key_starts(seed: int) -> list[int]:
    """What the two key words begin with, from the low 64 bits of the seed."""
    return [mix_int(mix_int(start ^ (seed & MASK)) ^ (seed >> 32 & MASK)) for start in KEY_START]


def noise_keys(seed: int | Tensor, sequence_id: Tensor, position: Tensor) -> Tensor:
    """[2, B, 1] int64: two 32-bit key words per row, from 64 bits of seed, 64 of id and the low 32 of position."""
    sequence_id, position = sequence_id.long(), position.long()
    # filled, not copied from the host: a CUDA graph could not record a copy that the host waits for
    starts = KEY_START if isinstance(seed, Tensor) else key_starts(seed)
    keys = torch.stack([torch.full_like(sequence_id, start) for start in starts])
    if isinstance(seed, Tensor):
        for word in (seed & MASK, seed >> 32 & MASK):
            keys = mix_(keys ^ word)
    for word in (sequence_id & MASK, sequence_id >> 32 & MASK, position & MASK):
        keys = mix_(keys ^ word)
    return keys[:, :, None]


def uniform_noise(seed: int | Tensor, sequence_id: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """[B, V] fp32 in (0, 1): a function of (seed, sequence id, position, vocabulary index) and of nothing else."""
    keys = noise_keys(seed, sequence_id, position)
    words = torch.arange(vocab_size, dtype=torch.int64, device=sequence_id.device) ^ keys[0]
    words = mix_(mix_(words).bitwise_xor_(keys[1]))
    # fp32 keeps its relative precision near 0, where the winners are; near 1 it would round up to 1
    return words.to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=LARGEST_UNIFORM)


def sample_with_logprob_reference(
    logits: Tensor, *, seed: int | Tensor, sequence_id: Tensor, position: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(token [B] int64, logp [B] fp32); the signature of `sample_with_logprob`."""
    scaled = logits.detach().float()
    if temperature not in (0.0, 1.0):
        scaled = scaled / temperature
    peak = scaled.amax(dim=-1, keepdim=True)
    mass = (scaled - peak).exp_()
    total = mass.sum(dim=-1, keepdim=True)
    if temperature == 0.0:
        token = scaled.argmax(dim=-1, keepdim=True)
    else:
        negative_exponential = uniform_noise(seed, sequence_id, position, scaled.shape[1]).neg_().log1p_()
        token = mass.div_(negative_exponential).argmin(dim=-1, keepdim=True)
    logp = (scaled.gather(1, token) - peak) - total.log()
    return token.squeeze(1), logp.squeeze(1)
