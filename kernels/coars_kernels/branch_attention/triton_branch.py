"""`branch_attention` on a GPU: flash attention over two pieces of memory, all query heads of a kv head in one tile.

The rows of a tile's product are branch tokens x query heads that share a kv head: a short branch fills tiles, and the
trunk's keys are read once for all of these heads. Which branch a tile belongs to is found on the device, so the grid,
NB // tokens per tile + M tiles, is known from shapes, and nothing waits. Whole blocks of the trunk are taken without
masks, then its rest, then the branch itself with the causal mask.

Left out: branches of one sequence in one tile, which would share reads of their common trunk (the cache does), and
splitting a long trunk among programs.

Shape suffixes: M rows of a product, N keys of a block, D head size.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright reads a kernel as an ordinary function: no grid, no `num_warps`, and an int is no `tl.constexpr`.

import torch
import triton
import triton.language as tl
from torch import Tensor

from coars_kernels.paged_decode_attention.triton_paged import (
    LOG2_E,
    Tile,
    Tiles,
    block_head,
    find_owner,
    store_result,
    tile_of,
)

# As in `triton_paged.py`: chosen by the compiler's figures, not yet measured on a GPU.
BRANCH_TILES: Tiles = {
    (80, 2, 128): Tile(128, 32, 8, 3),
    (80, 2, 256): Tile(64, 16, 8, 3),
    (80, 4, 128): Tile(32, 16, 4, 3),
    (80, 4, 256): Tile(16, 16, 4, 3),
    (90, 2, 128): Tile(128, 64, 8, 3),
    (90, 2, 256): Tile(128, 32, 8, 3),
    (90, 4, 128): Tile(16, 16, 4, 3),
    (90, 4, 256): Tile(16, 16, 4, 3),
}


@triton.jit
def attend_rows(
    q,  # [M, D]
    weighted,  # [M, D] fp32: sum of exp2(score - peak) * value so far
    peak,  # [M] fp32
    total,  # [M] fp32: sum of exp2(score - peak)
    first,
    last,
    visible,  # [M]: row m sees the keys below visible[m]
    k,  # key 0 of the kv head, as the next
    v,
    row_stride,
    scale_log2,
    HEAD_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    MASKED: tl.constexpr,  # false: every row sees whole blocks
):
    """Take the keys [first, last) into (weighted, peak, total): the online softmax of flash attention."""
    column = tl.arange(0, BLOCK_HEAD)[None, :]
    for start in tl.range(first, last, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        at = key.to(tl.int64)[:, None] * row_stride + column
        if MASKED:
            inside = (key < last)[:, None]
            if HEAD_SIZE < BLOCK_HEAD:
                inside = inside & (column < HEAD_SIZE)
            keys, values = tl.load(k + at, mask=inside, other=0.0), tl.load(v + at, mask=inside, other=0.0)
        elif HEAD_SIZE < BLOCK_HEAD:
            inside = column < HEAD_SIZE
            keys, values = tl.load(k + at, mask=inside, other=0.0), tl.load(v + at, mask=inside, other=0.0)
        else:
            keys, values = tl.load(k + at), tl.load(v + at)
        product = tl.dot(q, tl.trans(keys), input_precision="ieee")
        if MASKED:
            product = tl.where(key[None, :] < visible[:, None], product, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(product, axis=1) * scale_log2)
        # a row that has seen no key yet: -inf minus -inf would be NaN
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weight = tl.exp2(product * scale_log2 - base[:, None])
        faded = tl.exp2(peak - base)
        total = total * faded + tl.sum(weight, axis=1)
        weighted = tl.dot(weight.to(values.dtype), values, weighted * faded[:, None], input_precision="ieee")
        peak = new_peak
    return weighted, peak, total


@triton.jit(do_not_specialize=["kv_heads", "head_group", "num_branches"])
def branch_kernel(
    out,  # [NB, Hq, D]
    q,  # [NB, Hq, D]
    k,  # [NB, Hkv, D]
    v,
    trunk_k,  # [N, Hkv, D]
    trunk_v,
    cu_branch,  # [M+1] int32
    trunk_start,  # [M] int32
    trunk_len,  # [M] int32
    num_branches,
    q_row_stride,
    q_head_stride,
    row_stride,
    head_stride,
    trunk_row_stride,
    trunk_head_stride,
    kv_heads,
    head_group,
    scale_log2,
    HEAD_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,  # power of two that the query heads of a kv head fit into
):
    """Program (tile of a branch's tokens and kv head)."""
    TOKENS: tl.constexpr = BLOCK_ROWS // BLOCK_GROUP
    kv_head = tl.program_id(0) % kv_heads
    branch, first_token, end_token = find_owner(cu_branch, tl.program_id(0) // kv_heads, num_branches, TOKENS)
    if first_token >= end_token:
        return
    member = tl.arange(0, BLOCK_ROWS)
    token = first_token + member // BLOCK_GROUP
    is_row = (member % BLOCK_GROUP < head_group) & (token < end_token)
    head = kv_head * head_group + member % BLOCK_GROUP
    token = tl.minimum(token, end_token - 1)
    column = tl.arange(0, BLOCK_HEAD)[None, :]
    q_at = q + token.to(tl.int64)[:, None] * q_row_stride + head[:, None] * q_head_stride + column
    query = tl.load(q_at, mask=is_row[:, None] & (column < HEAD_SIZE), other=0.0)

    length = tl.load(trunk_len + branch)
    whole = length // BLOCK_KEYS * BLOCK_KEYS
    trunk_at = tl.load(trunk_start + branch).to(tl.int64) * trunk_row_stride + kv_head * trunk_head_stride
    everything = tl.zeros([BLOCK_ROWS], tl.int32) + length
    weighted, peak, total = attend_rows(
        query,
        tl.zeros([BLOCK_ROWS, BLOCK_HEAD], tl.float32),
        tl.full([BLOCK_ROWS], -float("inf"), tl.float32),
        tl.zeros([BLOCK_ROWS], tl.float32),
        0, whole, everything, trunk_k + trunk_at, trunk_v + trunk_at, trunk_row_stride, scale_log2,
        HEAD_SIZE, BLOCK_KEYS, BLOCK_HEAD, False,
    )  # fmt: skip
    weighted, peak, total = attend_rows(
        query, weighted, peak, total,
        whole, length, everything, trunk_k + trunk_at, trunk_v + trunk_at, trunk_row_stride, scale_log2,
        HEAD_SIZE, BLOCK_KEYS, BLOCK_HEAD, True,
    )  # fmt: skip
    begin = tl.load(cu_branch + branch)
    own_at = begin.to(tl.int64) * row_stride + kv_head * head_stride
    last = tl.minimum(first_token + TOKENS, end_token) - begin
    weighted, peak, total = attend_rows(
        query, weighted, peak, total,
        0, last, token - begin + 1, k + own_at, v + own_at, row_stride, scale_log2,
        HEAD_SIZE, BLOCK_KEYS, BLOCK_HEAD, True,
    )  # fmt: skip
    place = token.to(tl.int64) * kv_heads * head_group + head
    store_result(out, None, place, is_row, True, weighted, peak, total, HEAD_SIZE)


def _alike(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with the same strides and neighbouring numbers of a head."""
    if k.stride(2) == 1 and k.stride() == v.stride():
        return k, v
    return k.contiguous(), v.contiguous()


def branch_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    trunk_k: Tensor,
    trunk_v: Tensor,
    cu_branch: Tensor,
    trunk_start: Tensor,
    trunk_len: Tensor,
    scale: float,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """[NB, Hq, D]; arguments as the public function's, already checked. One launch, no waiting; `tile` for tuning."""
    (num_tokens, num_heads, head_size), kv_heads, num_branches = q.shape, k.shape[1], len(trunk_len)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    q = q if q.stride(2) == 1 else q.contiguous()
    k, v = _alike(k, v)
    trunk_k, trunk_v = _alike(trunk_k, trunk_v)
    head_group = num_heads // kv_heads
    tile = tile or tile_of(BRANCH_TILES, q, head_group)
    block_group = triton.next_power_of_2(head_group)
    num_tiles = num_tokens // (tile.block_rows // block_group) + num_branches
    # Kernels go to the current device, which need not be the tensors'.
    with torch.cuda.device_of(q):
        branch_kernel[(num_tiles * kv_heads,)](
            out, q, k, v, trunk_k, trunk_v, cu_branch.contiguous(), trunk_start.contiguous(), trunk_len.contiguous(),
            num_branches, *q.stride()[:2], *k.stride()[:2], *trunk_k.stride()[:2], kv_heads, head_group,
            scale * LOG2_E,
            HEAD_SIZE=head_size, BLOCK_ROWS=tile.block_rows, BLOCK_KEYS=tile.block_keys,
            BLOCK_HEAD=block_head(head_size), BLOCK_GROUP=block_group,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out
