"""Rows of logits -> log-probabilities and what the gradient needs of them, in plain torch: the CPU's half of the sweep.

With logits z, target y and the row's maximum m (never a running one that starts at 0: strongly negative rows would
give NaN):

    mass_v = exp(z_v - m) for v != y,  mass_y = 0,     others = sum_v mass_v,     total = others + exp(z_y - m)
    log p_y = z_y - m - log(total)                   d log p_y / d z_v = [v = y] others / total - mass_v / total

The target is left out by its index, so neither log p_y nor 1 - p_y cancels where p_y is close to 1, and log p_y is
never above zero. The division by `total` comes after the product with the weight: no pass over the vocabulary is spent
on it.

Shape suffixes: C rows of a chunk, V vocabulary, B rows of a block, 1 a single column.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**18
"""Logits worked on at a time, 1 MiB: all passes but the first find them in the cache."""


class RowMasses(NamedTuple):
    """What one row of logits comes to, all [C] fp32. d logp / dh = (others W_y - inverse (mass @ W)) / temperature."""

    logp_C: Tensor
    others_C: Tensor  # probability of all tokens but the target
    inverse_C: Tensor  # 1 / total: mass * inverse is the other tokens' probability
    entropy_C: Tensor | None  # nats


def row_masses_(
    logits_CV: Tensor,
    target_C: Tensor,
    bias_V: Tensor | None,
    temperature: float | Tensor,
    *,
    want_entropy: bool = False,
) -> RowMasses:
    """Turn fp32 `logits` (before bias and temperature) into masses, in place.

    Args:
        logits_CV: [C, V] fp32 `hidden @ weight.T`; holds the masses afterwards.
        target_C: [C] int64.
        bias_V: [V] fp32 or None; -inf forbids a token.
        temperature: float, or [C] fp32.
        want_entropy: the entropy too.

    A row without any allowed token gives logp -inf, and 0 for everything else.
    """
    logp_C, others_C, inverse_C = (logits_CV.new_empty(len(logits_CV)) for _ in range(3))
    entropy_C = logits_CV.new_empty(len(logits_CV)) if want_entropy else None
    rows = max(BLOCK_ELEMENTS // logits_CV.shape[1], 1)
    for start in range(0, len(logits_CV), rows):
        block = slice(start, start + rows)
        z_BV, target_B1 = logits_CV[block], target_C[block, None]
        if bias_V is not None:
            z_BV.add_(bias_V)
        if isinstance(temperature, Tensor):
            z_BV.div_(temperature[block, None])
        elif temperature != 1.0:
            z_BV.div_(temperature)
        peak_B1 = z_BV.amax(1, keepdim=True)
        z_BV.sub_(peak_B1.masked_fill_(peak_B1 == -torch.inf, 0.0))
        masses = _exponentiate_(z_BV, target_B1, want_entropy)
        logp_C[block], others_C[block], inverse_C[block] = masses.logp_C, masses.others_C, masses.inverse_C
        if entropy_C is not None and masses.entropy_C is not None:
            entropy_C[block] = masses.entropy_C
    return RowMasses(logp_C, others_C, inverse_C, entropy_C)


def _exponentiate_(z_BV: Tensor, target_B1: Tensor, want_entropy: bool) -> RowMasses:
    """`row_masses_` of one block whose maximum has been subtracted."""
    shifted_B1 = z_BV.gather(1, target_B1)
    shifted_BV = z_BV.clone() if want_entropy else None
    mass_BV = z_BV.exp_()
    mass_BV.scatter_(1, target_B1, 0.0)
    own_B1, others_B1 = shifted_B1.exp(), mass_BV.sum(1, keepdim=True)
    total_B1 = own_B1 + others_B1
    log_total_B1 = torch.where(shifted_B1 == 0.0, others_B1.log1p(), total_B1.log())
    logp_B1 = torch.where(shifted_B1 == -torch.inf, shifted_B1, shifted_B1 - log_total_B1)
    inverse_B1 = torch.where(total_B1 == 0.0, 0.0, total_B1.reciprocal())
    entropy_B = None
    if shifted_BV is not None:
        # -sum p log p = log(total) - sum mass (z - m) / total; where the mass is 0, z - m may be -inf
        weighted_B1 = shifted_BV.mul_(mass_BV).masked_fill_(mass_BV == 0.0, 0.0).sum(1, keepdim=True)
        weighted_B1 += torch.where(own_B1 == 0.0, 0.0, own_B1 * shifted_B1)
        entropy_B = torch.where(total_B1 == 0.0, 0.0, log_total_B1 - weighted_B1 * inverse_B1).squeeze(1)
    return RowMasses(logp_B1.squeeze(1), (others_B1 * inverse_B1).squeeze(1), inverse_B1.squeeze(1), entropy_B)
