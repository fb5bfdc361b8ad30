"""`agent_lora`: the adapters of all agents in two dense matrix products (design, section 5).

    mask(x [A1; A2]^T) [B1 B2]^T * scale

Every row passes through every adapter's first factor (rank r is small), foreign results are masked, and the second
product sums what is left. No sorting, no gather, no data-dependent shape: five launches, safe to capture in a CUDA
graph.
"""

import torch
from torch import Tensor

from coars_kernels.checks import require, require_device

AGENT_ID_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64)


def _check(x: Tensor, a: Tensor, b: Tensor, agent_ids: Tensor) -> None:
    require(x.dim() == 2, "x", f"expected [N, in], got shape {list(x.shape)}")
    require(a.dim() == 3, "a", f"expected [A, r, in], got shape {list(a.shape)}")
    require(a.shape[2] == x.shape[1], "a", f"expected [A, r, {x.shape[1]}], got {list(a.shape)}")
    require(b.dim() == 3, "b", f"expected [A, out, r], got shape {list(b.shape)}")
    num_agents, rank, _ = a.shape
    matches = b.shape[0] == num_agents and b.shape[2] == rank
    require(matches, "b", f"expected [{num_agents}, out, {rank}] to match a, got {list(b.shape)}")
    require(agent_ids.shape == x.shape[:1], "agent_ids", f"expected [{x.shape[0]}], got {list(agent_ids.shape)}")
    require(agent_ids.dtype in AGENT_ID_DTYPES, "agent_ids", f"expected a signed integer dtype, got {agent_ids.dtype}")
    for argument, tensor in (("a", a), ("b", b)):
        require(tensor.dtype == x.dtype, argument, f"expected x's dtype {x.dtype}, got {tensor.dtype}")
        require_device(tensor, argument, x, "x")
    require_device(agent_ids, "agent_ids", x, "x")


def agent_lora(x: Tensor, a: Tensor, b: Tensor, agent_ids: Tensor, scale: float) -> Tensor:
    """The adapters' update `scale * (x @ a[agent].T) @ b[agent].T` of each row, to be added to the base layer's output.

    Differentiable in `x`, `a` and `b`. The update of a row does not depend on other rows.

    Args:
        x: [N, in] floating: inputs of the adapted linear layer, rows of all agents mixed.
        a: [A, r, in], same dtype: first factors, one per agent.
        b: [A, out, r], same dtype: second factors.
        agent_ids: [N] int8 to int64: 0 recommender, 1 user; -1, or any id outside [0, A), means no adapter.
        scale: alpha / r.

    Returns:
        [N, out] in `x`'s dtype; rows without an adapter are exactly zero, whatever `x` holds there.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; the message begins with its name.
    """
    _check(x, a, b, agent_ids)
    num_agents, rank, in_features = a.shape
    out_features = b.shape[1]
    stacked_a = a.reshape(num_agents * rank, in_features)
    stacked_b = b.transpose(1, 2).reshape(num_agents * rank, out_features)
    down = torch.mm(x, stacked_a.T).view(-1, num_agents, rank)
    agents = torch.arange(num_agents, device=x.device, dtype=agent_ids.dtype)
    # masked_fill and not a product with 0: a masked NaN must not survive
    masked = down.masked_fill((agent_ids[:, None] != agents)[:, :, None], 0.0).view(-1, num_agents * rank)
    # alpha carries the scale for free; beta=0 means that the first argument is never read
    return torch.addmm(x.new_empty(1), masked, stacked_b, beta=0, alpha=scale)
