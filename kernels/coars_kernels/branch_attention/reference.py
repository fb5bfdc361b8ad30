"""What `branch_attention` means: each branch's keys are the trunk's rows up to its fork, then its own.

This is also the way of a CPU, and of a GPU without Triton. A call of `scaled_dot_product_attention` per branch was
measured against padded groups of branches, against one call for all branches of a trunk, and against two parts merged
by their log-sum-exp: on a CPU it was the fastest or within noise of it, from 45 to 2,300 keys (docs/log.md).

Shape suffixes: L tokens of a branch, K its keys, Hq/Hkv heads of queries and of keys, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def branch_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    trunk_k: Tensor,
    trunk_v: Tensor,
    cu_branch: Tensor,
    trunk_start: Tensor,
    trunk_len: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """[NB, Hq, D] in q's dtype; the signature of `branch_attention`. Reads the bounds on the host."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grouped = q.shape[1] != k.shape[1]
    bounds = cu_branch.tolist()
    for m, (start, length) in enumerate(zip(trunk_start.tolist(), trunk_len.tolist(), strict=True)):
        first, last = bounds[m], bounds[m + 1]
        if first == last:
            continue
        trunk, own = slice(start, start + length), slice(first, last)
        q_HLD = q[own].transpose(0, 1)
        k_HKD = torch.cat([trunk_k[trunk], k[own]]).transpose(0, 1)
        v_HKD = torch.cat([trunk_v[trunk], v[own]]).transpose(0, 1)
        mask_LK = torch.ones(last - first, length + last - first, dtype=torch.bool, device=q.device).tril_(length)
        attended = F.scaled_dot_product_attention(
            q_HLD[None], k_HKD[None], v_HKD[None], attn_mask=mask_LK, enable_gqa=grouped, scale=scale
        )
        out[own] = attended[0].transpose(0, 1)
    return out
