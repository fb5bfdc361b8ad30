"""`agent_lora`: the adapters of all agents in two dense matrix products (design, section 5).

    mask(x [A1; A2]^T) [B1 B2]^T * scale

Few rows without gradients on a GPU, as in decoding, are the operator `coars_kernels::agent_lora`: the kernels of
`triton_lora.py`, two launches. Everything else is two products of the library:

Every row passes through every adapter's first factor (rank r is small), foreign results are masked, and the second
product sums what is left. No sorting, no gather, no data-dependent shape: four launches, safe to capture in a CUDA
graph. The mask is an integer of all ones or all zeros, laid over the bits of the number: a foreign NaN becomes zero as
everything else does, and a CPU does it ten times as fast as it fills by a boolean.

Left out: a derivative of the gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from coars_kernels.agent_lora.reference import agent_lora_reference
from coars_kernels.checks import MATRIX_DTYPES, require, require_device
from coars_kernels.dispatch import has_triton

AGENT_ID_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64)
LARGEST_ROWS, LARGEST_RANK = 128, 128
"""What the Triton kernels take. With more rows the library's tiles, which read a factor once for 128 rows and not for
16, must win; where exactly is not measured, since no kernel has been run on a GPU yet."""
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer that is as wide as a number of so many bytes."""


class AgentRows:
    """The adapter of each row, prepared for many calls of `agent_lora` on the same rows: the projections of one forward
    pass share the mask that each would make of its own. It holds for the ids as they were when it was first used.

    Args:
        agent_ids: [N], as `agent_lora` takes them.
        num_agents: A.

    Raises:
        ValueError: `agent_ids` has the wrong shape or dtype, or `num_agents` is below 1.
    """

    def __init__(self, agent_ids: Tensor, num_agents: int):
        require(agent_ids.dim() == 1, "agent_ids", f"expected [N], got shape {list(agent_ids.shape)}")
        require(agent_ids.dtype in AGENT_ID_DTYPES, "agent_ids", f"expected a signed integer, got {agent_ids.dtype}")
        require(num_agents >= 1, "num_agents", f"must be at least 1, got {num_agents}")
        self.agent_ids, self.num_agents = agent_ids, num_agents
        self._masks: dict[tuple[int, int], Tensor] = {}

    def mask(self, rank: int, itemsize: int) -> Tensor:
        """[N, A * rank] integers of `itemsize` bytes: all ones in the columns of the row's own adapter, else 0."""
        if (rank, itemsize) not in self._masks:
            ids, columns = self.agent_ids, self.num_agents * rank
            agents = torch.arange(columns, device=ids.device).div_(rank, rounding_mode="floor")
            mask = torch.empty(ids.shape[0], columns, dtype=BITS[itemsize], device=ids.device)
            self._masks[rank, itemsize] = torch.eq(ids[:, None], agents, out=mask).neg_()
        return self._masks[rank, itemsize]


def _fits(x: Tensor, a: Tensor, b: Tensor, rows: AgentRows) -> bool:
    """Whether `_refuse` has nothing to say; a small call of this operation takes no longer than asking it would."""
    ids = rows.agent_ids
    return (
        x.dim() == 2
        and a.dim() == b.dim() == 3
        and a.shape[2] == x.shape[1]
        and (b.shape[0], b.shape[2]) == a.shape[:2]
        and ids.shape[0] == x.shape[0]
        and rows.num_agents == a.shape[0]
        and x.dtype == a.dtype == b.dtype
        and x.device == a.device == b.device == ids.device
    )


def _refuse(x: Tensor, a: Tensor, b: Tensor, rows: AgentRows) -> None:
    """Raise what is wrong with the arguments."""
    require(x.dim() == 2, "x", f"expected [N, in], got shape {list(x.shape)}")
    require(a.dim() == 3, "a", f"expected [A, r, in], got shape {list(a.shape)}")
    require(a.shape[2] == x.shape[1], "a", f"expected [A, r, {x.shape[1]}], got {list(a.shape)}")
    require(b.dim() == 3, "b", f"expected [A, out, r], got shape {list(b.shape)}")
    num_agents, rank, _ = a.shape
    matches = b.shape[0] == num_agents and b.shape[2] == rank
    require(matches, "b", f"expected [{num_agents}, out, {rank}] to match a, got {list(b.shape)}")
    found = rows.agent_ids.shape
    require(found == x.shape[:1], "agent_ids", f"expected [{x.shape[0]}], got {list(found)}")
    require(rows.num_agents == num_agents, "agent_ids", f"prepared for {rows.num_agents} agents, a has {num_agents}")
    for argument, tensor in (("a", a), ("b", b)):
        require(tensor.dtype == x.dtype, argument, f"expected x's dtype {x.dtype}, got {tensor.dtype}")
        require_device(tensor, argument, x, "x")
    require_device(rows.agent_ids, "agent_ids", x, "x")


def _mask_(values: Tensor, mask: Tensor) -> Tensor:
    values.view(mask.dtype).bitwise_and_(mask)
    return values


def _products(x: Tensor, a: Tensor, b: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(update, masked result of the first product) with the factors stacked: a [A * r, in], b [A * r, out]."""
    down = _mask_(torch.mm(x, a.T), mask)
    # alpha carries the scale for free; beta=0 means that the first argument is never read
    return torch.addmm(x.new_empty(1), down, b, beta=0, alpha=scale), down


class _AgentLora(torch.autograd.Function):
    """The update of `_products` with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, mask: Tensor, scale: float) -> Tensor:
        out, down = _products(x, a, b, mask, scale)
        ctx.save_for_backward(x, a, b, down, mask)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,), (x, a, b, down, mask) = grad_outputs, ctx.saved_tensors
        need_x, need_a, need_b = ctx.needs_input_grad[:3]
        grad_x = grad_a = None
        if need_x or need_a:
            grad_down = _mask_(torch.mm(grad, b.T).mul_(ctx.scale), mask)
            grad_x = torch.mm(grad_down, a) if need_x else None
            grad_a = torch.mm(grad_down.T, x) if need_a else None
        grad_b = torch.mm(down.T, grad).mul_(ctx.scale) if need_b else None
        return grad_x, grad_a, grad_b, None, None


@torch.library.custom_op("coars_kernels::agent_lora", mutates_args=())
def _few_rows(x: Tensor, a: Tensor, b: Tensor, agent_ids: Tensor, scale: float) -> Tensor:
    if has_triton(x):
        from coars_kernels.agent_lora.triton_lora import agent_lora_triton

        return agent_lora_triton(x, a, b, agent_ids, scale)
    return agent_lora_reference(x, a, b, agent_ids, scale)


@_few_rows.register_fake
def _(x: Tensor, a: Tensor, b: Tensor, *arguments: object) -> Tensor:
    return x.new_empty(x.shape[0], b.shape[1])


def takes_kernels(x: Tensor, a: Tensor) -> bool:
    """Whether the Triton kernels compute an update without gradients."""
    small = x.shape[0] <= LARGEST_ROWS and a.shape[1] <= LARGEST_RANK
    return has_triton(x) and small and x.dtype in MATRIX_DTYPES


def agent_lora(x: Tensor, a: Tensor, b: Tensor, agent_ids: Tensor | AgentRows, scale: float) -> Tensor:
    """The adapters' update `scale * (x @ a[agent].T) @ b[agent].T` of each row, to be added to the base layer's output.

    Differentiable in `x`, `a` and `b`. The update of a row does not depend on other rows' values, but on a GPU its last
    bits may depend on N, which decides who computes it and in how many parts. Autocast is off inside.

    Args:
        x: [N, in] floating: inputs of the adapted linear layer, rows of all agents mixed.
        a: [A, r, in], same dtype: first factors, one per agent.
        b: [A, out, r], same dtype: second factors.
        agent_ids: [N] int8 to int64: 0 recommender, 1 user; -1, or any id outside [0, A), means no adapter. Callers
            with many layers pass `AgentRows(agent_ids, A)`, made once per forward pass.
        scale: alpha / r.

    Returns:
        [N, out] in `x`'s dtype; rows without an adapter are exactly zero, whatever `x` holds there.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; the message begins with its name.
    """
    rows = agent_ids if isinstance(agent_ids, AgentRows) else AgentRows(agent_ids, max(a.shape[0], 1))
    if not _fits(x, a, b, rows):
        _refuse(x, a, b, rows)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return agent_lora(x, a, b, rows, scale)
    if not torch.is_grad_enabled() and takes_kernels(x, a):
        return _few_rows(x, a, b, rows.agent_ids, float(scale))
    num_agents, rank, in_features = a.shape
    stacked_a = a.reshape(num_agents * rank, in_features)
    stacked_b = b.transpose(1, 2).reshape(num_agents * rank, b.shape[1])
    mask = rows.mask(rank, x.itemsize)
    if not torch.is_grad_enabled():
        return _products(x, stacked_a, stacked_b, mask, scale)[0]
    return _AgentLora.apply(x, stacked_a, stacked_b, mask, scale)  # pyright: ignore[reportReturnType]
