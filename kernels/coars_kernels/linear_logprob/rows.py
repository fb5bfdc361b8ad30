"""Rows of logits -> log-probabilities and what the gradient needs of them, in plain torch: the CPU's half of the sweep.

With logits z, target y and the row's maximum m:

    mass_v = exp(z_v - m) for v != y,  mass_y = 0,     others = sum_v mass_v,     total = others + exp(z_y - m)
    log p_y = z_y - m - log(total)                   d log p_y / d z_v = [v = y] others / total - mass_v / total

The target is left out by its index, so neither log p_y nor 1 - p_y cancels where p_y is close to 1, and log p_y is
never above zero. torch's softmax does nearly all of it in one pass over a row that stays in the cache, already divided
by `total`; the few rows whose target is too small for its result are done again by the equations.

Shape suffixes: C rows of a chunk, V vocabulary, F rows done again, B rows of a block, 1 a single column.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST = 1e-30
"""Below this a probability is not taken from the softmax: its logarithm would lose digits, and at 1e-38 everything."""
BLOCK_ELEMENTS = 2**18
"""Logits worked on at a time for the entropy, 1 MiB."""


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
    again: Callable[[Tensor], Tensor],
    want_entropy: bool = False,
) -> RowMasses:
    """Turn fp32 `logits` (before bias and temperature) into masses, in place; they are divided by `total` already.

    Args:
        logits_CV: [C, V] fp32 `hidden @ weight.T`; holds the masses afterwards.
        target_C: [C] int64.
        bias_V: [V] fp32 or None; -inf forbids a token.
        temperature: float, or [C] fp32.
        again: rows' numbers [F] int64 -> their logits [F, V] once more, for rows that are done again.
        want_entropy: the entropy too.

    A row without any allowed token gives logp -inf, and 0 for everything else.
    """
    target_C1 = target_C[:, None]
    mass_CV = torch.softmax(_scaled_(logits_CV, bias_V, temperature), -1, out=logits_CV)
    own_C1 = mass_CV.gather(1, target_C1)
    entropy_C = _entropy(mass_CV) if want_entropy else None
    others_C1 = mass_CV.scatter_(1, target_C1, 0.0).sum(1, keepdim=True)
    logp_C = torch.where(others_C1 < 0.5, torch.log1p(-others_C1), own_C1.log()).squeeze(1)
    others_C = others_C1.squeeze(1)
    small_C1 = own_C1 <= SMALLEST
    if bias_V is not None:  # where all tokens are forbidden, the softmax is NaN
        small_C1 |= own_C1.isnan()
    rows_F = small_C1.squeeze(1).nonzero().squeeze(1)
    if len(rows_F):
        row_temperature = temperature[rows_F] if isinstance(temperature, Tensor) else temperature
        z_FV = _scaled_(again(rows_F), bias_V, row_temperature)
        mass_FV, logp_C[rows_F], others_C[rows_F], entropy_F = _carefully(z_FV, target_C[rows_F, None])
        mass_CV[rows_F] = mass_FV
        if entropy_C is not None:
            entropy_C[rows_F] = entropy_F
    return RowMasses(logp_C, others_C, torch.ones_like(logp_C), entropy_C)


def _scaled_(logits_CV: Tensor, bias_V: Tensor | None, temperature: float | Tensor) -> Tensor:
    """(logits + bias) / temperature, in place."""
    if bias_V is not None:
        logits_CV.add_(bias_V)
    if isinstance(temperature, Tensor):
        logits_CV.div_(temperature[:, None])
    elif temperature != 1.0:
        logits_CV.div_(temperature)
    return logits_CV


def _entropy(probability_CV: Tensor) -> Tensor:
    """-sum p log p of each row [C], in blocks that stay in the cache."""
    rows = max(BLOCK_ELEMENTS // probability_CV.shape[1], 1)
    return torch.cat([torch.special.entr(block_BV).sum(1) for block_BV in probability_CV.split(rows)])


def _carefully(z_FV: Tensor, target_F1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(masses divided by total, logp, others / total, entropy) by the equations above; `z` is overwritten."""
    peak_F1 = z_FV.amax(1, keepdim=True)
    z_FV.sub_(peak_F1.masked_fill_(peak_F1 == -torch.inf, 0.0))
    lead_F1 = z_FV.gather(1, target_F1)
    mass_FV = z_FV.exp_().scatter_(1, target_F1, 0.0)
    own_F1, others_F1 = lead_F1.exp(), mass_FV.sum(1, keepdim=True)
    total_F1 = own_F1 + others_F1
    logp_F1 = torch.where(lead_F1 == -torch.inf, lead_F1, lead_F1 - total_F1.log())
    inverse_F1 = torch.where(total_F1 == 0.0, 0.0, total_F1.reciprocal())
    mass_FV.mul_(inverse_F1)
    entropy_F = _entropy(mass_FV) + torch.special.entr(own_F1 * inverse_F1).squeeze(1)
    return mass_FV, logp_F1.squeeze(1), (others_F1 * inverse_F1).squeeze(1), entropy_F
