"""`paged_prefill_attention` on a GPU: flash attention with keys in pages, all query heads of a kv head in one tile.

The rows of a tile's product are new tokens x query heads that share a kv head: a short extend (some dozens of tokens)
fills tiles, and keys are read once for all of these heads. Which sequence a tile belongs to is found on the device, so
the grid, N // tokens per tile + B tiles, is known from shapes, and nothing waits. Keys that every token of a tile sees
are taken without masks; then those about the diagonal.

Left out: splitting the keys of one sequence among programs. A few new tokens after a very long prefix are slower here
than they could be; one token is `paged_decode_attention`'s.

Shape suffixes as in `triton_paged.py`.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright reads a kernel as an ordinary function: no grid, no `num_warps`, and an int is no `tl.constexpr`.

import torch
import triton
import triton.language as tl
from torch import Tensor

from coars_kernels.paged_decode_attention.triton_paged import (
    LOG2_E,
    NOT_SPECIALIZED,
    Tile,
    Tiles,
    attend,
    constants,
    find_owner,
    paging,
    store_result,
    tile_of,
)

# As in `triton_paged.py`.
PREFILL_TILES: Tiles = {
    (80, 2, 128): Tile(128, 32, 8, 5),
    (80, 2, 256): Tile(64, 16, 8, 5),
    (80, 4, 128): Tile(32, 16, 4, 5),
    (80, 4, 256): Tile(16, 16, 4, 5),
    (90, 2, 128): Tile(128, 64, 8, 5),
    (90, 2, 256): Tile(128, 32, 8, 5),
    (90, 4, 128): Tile(16, 16, 4, 5),
    (90, 4, 256): Tile(16, 16, 4, 5),
}


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "num_sequences"])
def prefill_kernel(
    out,  # [N, Hq, D]
    q,  # [N, Hq, D]
    k_pages,  # [P, page size, Hkv, D]
    v_pages,
    page_table,  # [B, W] int32
    cu_q,  # [B+1] int32
    lengths,  # [B] int32
    num_sequences,
    q_row_stride,
    q_head_stride,
    table_stride,
    page_stride,
    slot_stride,
    kv_head_stride,
    page_size,
    kv_heads,
    head_group,
    scale_log2,
    HEAD_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,  # power of two that the query heads of a kv head fit into
    ONE_PAGE: tl.constexpr,
):
    """Program (tile of a sequence's new tokens and kv head)."""
    TOKENS: tl.constexpr = BLOCK_ROWS // BLOCK_GROUP
    kv_head = tl.program_id(0) % kv_heads
    sequence, first_token, end_token = find_owner(cu_q, tl.program_id(0) // kv_heads, num_sequences, TOKENS)
    if first_token >= end_token:
        return
    member = tl.arange(0, BLOCK_ROWS)
    token = first_token + member // BLOCK_GROUP
    is_row = (member % BLOCK_GROUP < head_group) & (token < end_token)
    head = kv_head * head_group + member % BLOCK_GROUP
    token = tl.minimum(token, end_token - 1).to(tl.int64)
    column = tl.arange(0, BLOCK_HEAD)[None, :]
    q_at = q + token[:, None] * q_row_stride + head[:, None] * q_head_stride + column
    query = tl.load(q_at, mask=is_row[:, None] & (column < HEAD_SIZE), other=0.0)

    # token i sees the keys below length - (end of the new tokens - i) + 1
    length = tl.load(lengths + sequence)
    visible = (token - end_token).to(tl.int32) + (length + 1)
    last = tl.minimum(first_token + TOKENS, end_token) - end_token + length
    whole = tl.maximum(first_token - end_token + length + 1, 0) // BLOCK_KEYS * BLOCK_KEYS
    table = page_table + sequence.to(tl.int64) * table_stride
    k_pages += kv_head * kv_head_stride
    v_pages += kv_head * kv_head_stride
    weighted, peak, total = attend(
        query,
        tl.zeros([BLOCK_ROWS, BLOCK_HEAD], tl.float32),
        tl.full([BLOCK_ROWS], -float("inf"), tl.float32),
        tl.zeros([BLOCK_ROWS], tl.float32),
        0, whole, visible, table, k_pages, v_pages,
        page_stride, slot_stride, page_size, scale_log2,
        HEAD_SIZE, BLOCK_KEYS, BLOCK_HEAD, ONE_PAGE, False,
    )  # fmt: skip
    weighted, peak, total = attend(
        query, weighted, peak, total,
        whole, last, visible, table, k_pages, v_pages,
        page_stride, slot_stride, page_size, scale_log2,
        HEAD_SIZE, BLOCK_KEYS, BLOCK_HEAD, ONE_PAGE, True,
    )  # fmt: skip
    place = token * kv_heads * head_group + head
    store_result(out, None, place, is_row, True, weighted, peak, total, HEAD_SIZE)


def paged_prefill_triton(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_q: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """[N, Hq, D]; arguments as the public function's, already checked. One launch, no waiting; `tile` for tuning."""
    (num_tokens, num_heads, head_size), kv_heads, num_sequences = q.shape, k_pages.shape[2], len(lengths)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    q = q if q.stride(2) == 1 else q.contiguous()
    page_table = page_table if page_table.stride(1) == 1 else page_table.contiguous()
    head_group = num_heads // kv_heads
    tile = tile or tile_of(PREFILL_TILES, q, head_group)
    block_group = triton.next_power_of_2(head_group)
    num_tiles = num_tokens // (tile.block_rows // block_group) + num_sequences
    # Kernels go to the current device, which need not be the tensors'.
    with torch.cuda.device_of(q):
        prefill_kernel[(num_tiles * kv_heads,)](
            out, q, k_pages, v_pages, page_table, cu_q.contiguous(), lengths.contiguous(), num_sequences,
            *q.stride()[:2], *paging(k_pages, page_table), kv_heads, head_group, scale * LOG2_E,
            BLOCK_GROUP=block_group, **constants(tile, head_size, k_pages),
        )  # fmt: skip
    return out
