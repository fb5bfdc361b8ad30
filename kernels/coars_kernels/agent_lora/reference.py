"""What `agent_lora` means: each row goes through its own agent's adapter, one agent after the other."""

import torch
from torch import Tensor


def agent_lora_reference(x: Tensor, a: Tensor, b: Tensor, agent_ids: Tensor, scale: float) -> Tensor:
    """`scale * (x @ a[agent].T) @ b[agent].T` for each row; zero where the id names no adapter. As `agent_lora`."""
    out = x.new_zeros(x.shape[0], b.shape[1])
    for agent in range(a.shape[0]):
        update = (x @ a[agent].T) @ b[agent].T * scale
        out = torch.where((agent_ids == agent)[:, None], update, out)
    return out
