"""What `fused_linear_divergence` means, in plain torch with full [R, V] logits: the specification, for tests.

Shape suffixes: R rows, V vocabulary, H hidden size.
"""

import math

import torch
from torch import Tensor

KINDS = ("forward_kl", "reverse_kl", "js")


def fused_linear_divergence_reference(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    *,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """[R] divergences; the signature of `fused_linear_divergence`. 16-bit inputs are widened to fp32 first; float64
    stays float64, for use as the yardstick. `chunk_rows` is ignored."""
    del chunk_rows
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_p_RV, log_t_RV = (
        torch.log_softmax(hidden.to(dtype) @ weight.to(dtype).T / temperature, -1)
        for hidden in (student, teacher.detach())
    )
    if kind == "forward_kl":
        return (log_t_RV.exp() * (log_t_RV - log_p_RV)).sum(-1)
    if kind == "reverse_kl":
        return (log_p_RV.exp() * (log_p_RV - log_t_RV)).sum(-1)
    log_m_RV = torch.logaddexp(log_p_RV, log_t_RV) - math.log(2.0)
    both_RV = log_p_RV.exp() * (log_p_RV - log_m_RV) + log_t_RV.exp() * (log_t_RV - log_m_RV)
    return both_RV.sum(-1) / 2
