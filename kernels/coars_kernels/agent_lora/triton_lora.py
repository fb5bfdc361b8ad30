"""`agent_lora` for few rows, as in decoding: two launches on the factors where they lie, without a mask in memory.

    first kernel    x a[agent]^T of the rows that an agent has, the inputs split among programs; fp32 partial sums
    second kernel   their sum, rounded to the inputs' dtype as a library's product is, times b[agent]^T and the scale

With few rows it is launches and reads of the factors that take the time. Two products of the library want their
factors stacked and a mask between them, five launches; and one launch for all would read the first factors again for
each part of the outputs. Each row has one adapter, so a partial sum has `rank` columns whatever the number of agents,
and a program reads an agent's factors only if one of its rows is the agent's. Foreign values are never added: rows
without an adapter are exactly zero, and a broken adapter stays with its agent.

Left out: gradients, float64, and many rows (`op.LARGEST_ROWS`). Sizes are chosen by the compiler's figures, not yet
measured on a GPU.

Shape suffixes: M rows of a product, K inputs of a step, R rank, O outputs of a program, S splits.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright reads a kernel as an ordinary function: no grid, no `num_warps`, and an int is no `tl.constexpr`.

import torch
import triton
import triton.language as tl
from torch import Tensor

from coars_kernels import aot_library
from coars_kernels.dispatch import num_processors

aot_library.install()  # where COARS_KERNELS_AOT is set; before the first launch

BLOCK_ROWS = 16
# Bytes of an input row in a step, and of a second factor's columns in a program: 16-bit numbers by 128.
STEP_BYTES, OUT_BYTES = 256, 256
NUM_WARPS, NUM_STAGES = 4, 4
# Programs for each multiprocessor, on which several fit at a time; and a bound on what the second kernel adds up.
PROGRAMS, LARGEST_SPLITS = 2, 32


@triton.jit(do_not_specialize=["num_rows", "num_agents"])
def first_kernel(
    partial,  # [S, N, r] fp32; rows without an adapter are not written
    x,  # [N, in]
    a,  # [A, r, in]
    agent_ids,  # [N] integers
    num_rows,
    num_agents,
    in_features,
    x_stride,
    split_size,  # inputs of a split, a multiple of BLOCK_IN
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Program (rows and agent, split)."""
    agent, split = tl.program_id(0) % num_agents, tl.program_id(1)
    row = tl.program_id(0) // num_agents * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    own = tl.load(agent_ids + row, mask=row < num_rows, other=-1) == agent
    if tl.max(own.to(tl.int32), axis=0) == 0:
        return
    rank = tl.arange(0, BLOCK_RANK)
    x_at = x + row.to(tl.int64)[:, None] * x_stride
    a_at = a + (agent * RANK + rank).to(tl.int64)[None, :] * in_features
    total = tl.zeros([BLOCK_ROWS, BLOCK_RANK], tl.float32)
    begin = split * split_size
    for start in tl.range(begin, tl.minimum(begin + split_size, in_features), BLOCK_IN):
        column = start + tl.arange(0, BLOCK_IN)
        inside = column < in_features
        values = tl.load(x_at + column[None, :], mask=own[:, None] & inside[None, :], other=0.0)
        factor = tl.load(a_at + column[:, None], mask=inside[:, None] & (rank < RANK)[None, :], other=0.0)
        total = tl.dot(values, factor, total, input_precision="ieee")
    at = partial + (split * num_rows + row).to(tl.int64)[:, None] * RANK + rank[None, :]
    tl.store(at, total, mask=own[:, None] & (rank < RANK)[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_agents", "num_splits"])
def second_kernel(
    out,  # [N, out]
    partial,  # [S, N, r] fp32, of the first kernel
    b,  # [A, out, r]
    agent_ids,  # [N] integers
    scale,  # fp32
    num_rows,
    num_agents,
    num_splits,
    out_features,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Program (outputs, rows)."""
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    agents = tl.load(agent_ids + row, mask=row < num_rows, other=-1)
    rank, column = tl.arange(0, BLOCK_RANK), tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    adapted = ((agents >= 0) & (agents < num_agents))[:, None] & (rank < RANK)[None, :]
    at = partial + row[:, None] * RANK + rank[None, :]
    down = tl.zeros([BLOCK_ROWS, BLOCK_RANK], tl.float32)
    for split in range(num_splits):
        down += tl.load(at + split * num_rows * RANK, mask=adapted, other=0.0)
    down = down.to(b.dtype.element_ty)
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
    for agent in range(num_agents):
        own = agents == agent
        if tl.max(own.to(tl.int32), axis=0) > 0:
            b_at = b + (agent * out_features + column.to(tl.int64))[None, :] * RANK + rank[:, None]
            factor = tl.load(b_at, mask=(column < out_features)[None, :] & (rank < RANK)[:, None], other=0.0)
            update = tl.dot(down, factor, input_precision="ieee")
            total = tl.where(own[:, None], update, total)
    place = row.to(tl.int64)[:, None] * out_features + column[None, :]
    mask = (row < num_rows)[:, None] & (column < out_features)[None, :]
    tl.store(out + place, (total * scale).to(out.dtype.element_ty), mask=mask)


def splits_of(x: Tensor, num_agents: int, block_in: int) -> tuple[int, int]:
    """(splits, inputs of each), from sizes alone."""
    steps = -(-x.shape[1] // block_in)
    blocks = -(-len(x) // BLOCK_ROWS) * num_agents
    most = max(1, min(steps, LARGEST_SPLITS, -(-PROGRAMS * num_processors(x.device) // blocks)))
    each = -(-steps // most)
    return -(-steps // each), each * block_in


def agent_lora_triton(x: Tensor, a: Tensor, b: Tensor, agent_ids: Tensor, scale: float) -> Tensor:
    """[N, out]; arguments as the public function's, already checked. Two launches, no waiting."""
    (num_rows, in_features), (num_agents, out_features, rank) = x.shape, b.shape
    out = torch.empty(num_rows, out_features, dtype=x.dtype, device=x.device)
    if not (num_rows and out_features and rank and in_features):
        return out.zero_()
    x = x if x.stride(1) == 1 else x.contiguous()
    a, b, agent_ids = a.contiguous(), b.contiguous(), agent_ids.contiguous()
    block_in, block_out = STEP_BYTES // x.element_size(), OUT_BYTES // x.element_size()
    num_splits, split_size = splits_of(x, num_agents, block_in)
    partial = torch.empty(num_splits, num_rows, rank, dtype=torch.float32, device=x.device)
    blocks = triton.cdiv(num_rows, BLOCK_ROWS)
    sizes = {"RANK": rank, "BLOCK_RANK": max(16, triton.next_power_of_2(rank)), "BLOCK_ROWS": BLOCK_ROWS}
    options = {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES}
    # Kernels go to the current device, which need not be the tensors'.
    with torch.cuda.device_of(x):
        first_kernel[(blocks * num_agents, num_splits)](
            partial, x, a, agent_ids, num_rows, num_agents, in_features, x.stride(0), split_size,
            **sizes, BLOCK_IN=block_in, **options,
        )  # fmt: skip
        second_kernel[(triton.cdiv(out_features, block_out), blocks)](
            out, partial, b, agent_ids, scale, num_rows, num_agents, num_splits, out_features,
            **sizes, BLOCK_OUT=block_out, **options,
        )  # fmt: skip
    return out
