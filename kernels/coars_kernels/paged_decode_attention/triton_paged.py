"""`paged_decode_attention` on a GPU: split-KV attention over pages, shared prefixes first, merged by log-sum-exp.

    prefix kernel   only with groups: rows x query heads of a kv head are the rows of a product with the group's common
                    keys, which are so read once; a partial result per row, head and split
    decode kernel   per row, kv head and split: the keys after the prefix; the rows of the product are query heads
    merge kernel    a row's partial results by their log-sum-exp; not needed where one program sees all of its keys

The number of splits follows from shapes and from the GPU's size. A program finds its share of the row's actual keys on
the device, so short rows are split evenly too, and a launch is the same whatever the lengths are. Tensor cores want 16
rows at least; where fewer heads share a kv head the rest is idle, which costs nothing while memory is the limit.

Scores are in base 2 (`exp2` is the instruction). Keys beyond a row's end are neither read nor counted. Left out:
autotuning, copies by tensor descriptor, and gradients.

Shape suffixes: B rows of the batch, M rows of a product, N keys of a block, D head size, S splits.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright reads a kernel as an ordinary function: no grid, no `num_warps`, and an int is no `tl.constexpr`.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from coars_kernels import aot_library
from coars_kernels.dispatch import num_processors

aot_library.install()  # where COARS_KERNELS_AOT is set; before the first launch


class Tile(NamedTuple):
    """Sizes of one program's products, and how it is run."""

    block_rows: int
    """At least so many; more where more query heads share a kv head."""
    block_keys: int
    num_warps: int
    num_stages: int


Tiles = dict[tuple[int, int, int], Tile]
# By (compute capability, bytes per number, head size up to). Chosen by the compiler's figures (registers, shared
# memory, no spills), not yet measured on a GPU. fp32 is multiplied exactly, without tensor cores, so its tiles are
# small. Half of the pipeline's stages load page ids, half keys and values: five keep two blocks of keys in flight.
DECODE_TILES: Tiles = {
    (80, 2, 128): Tile(16, 64, 4, 5),
    (80, 2, 256): Tile(16, 32, 4, 5),
    (80, 4, 128): Tile(16, 32, 8, 5),
    (80, 4, 256): Tile(16, 16, 8, 5),
    (90, 2, 128): Tile(16, 64, 4, 5),
    (90, 2, 256): Tile(16, 32, 4, 5),
    (90, 4, 128): Tile(16, 32, 8, 5),
    (90, 4, 256): Tile(16, 16, 8, 5),
}
PREFIX_TILES: Tiles = {
    (80, 2, 128): Tile(64, 64, 8, 5),
    (80, 2, 256): Tile(64, 16, 8, 5),
    (80, 4, 128): Tile(32, 16, 4, 5),
    (80, 4, 256): Tile(16, 16, 4, 5),
    (90, 2, 128): Tile(64, 64, 4, 5),
    (90, 2, 256): Tile(64, 32, 8, 5),
    (90, 4, 128): Tile(16, 16, 4, 5),
    (90, 4, 256): Tile(16, 16, 4, 5),
}
MERGE_SPLITS, MERGE_WARPS = 16, 2
# Programs for each multiprocessor, on which two fit at a time. A split of a row costs little, and two rounds even out
# rows of different lengths; a split of a prefix costs a partial result for all rows of its group, so one round.
DECODE_PROGRAMS, PREFIX_PROGRAMS = 4, 2
SMALLEST_SPLIT, LARGEST_SPLITS = 256, 64
LOG2_E = 1.4426950408889634
# Sizes that differ from call to call or from model to model: one compilation serves them all.
NOT_SPECIALIZED = ["table_stride", "page_size", "kv_heads", "head_group"]


@triton.jit
def find_owner(offsets, tile, num_owners, PER_TILE: tl.constexpr):
    """(owner, first, end) of a tile: owner i has [offsets[i], offsets[i+1]), in tiles of at most `PER_TILE`.

    Owner i has the tile numbers from offsets[i] // PER_TILE + i up to the next owner's. They are always enough, and the
    last may be empty (first >= end); so the number of all tiles, total // PER_TILE + owners, is known without offsets.
    """
    low = tile * 0
    high = num_owners - 1 + low
    while low < high:
        middle = (low + high + 1) // 2
        before = tl.load(offsets + middle) // PER_TILE + middle <= tile
        low, high = tl.where(before, middle, low), tl.where(before, high, middle - 1)
    start = tl.load(offsets + low)
    return low, start + (tile - (start // PER_TILE + low)) * PER_TILE, tl.load(offsets + low + 1)


@triton.jit
def share_of(begin, end, split, num_splits, BLOCK_KEYS: tl.constexpr):
    """[first, last) of the keys [begin, end) for a split: whole blocks, the same number for each, as far as they go."""
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), num_splits), BLOCK_KEYS) * BLOCK_KEYS
    first = begin + split * share
    return first, tl.minimum(first + share, end)


@triton.jit
def attend(
    q,  # [M, D]
    weighted,  # [M, D] fp32: sum of exp2(score - peak) * value so far
    peak,  # [M] fp32
    total,  # [M] fp32: sum of exp2(score - peak)
    first,
    last,
    visible,  # [M]: row m sees the keys below visible[m]
    table,  # page ids of the sequence
    k_pages,  # at the kv head, as the next
    v_pages,
    page_stride,
    slot_stride,
    page_size,
    scale_log2,
    HEAD_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    ONE_PAGE: tl.constexpr,  # no block reaches into a second page
    MASKED: tl.constexpr,  # false: every row sees whole blocks
):
    """Take the keys [first, last) into (weighted, peak, total): the online softmax of flash attention."""
    column = tl.arange(0, BLOCK_HEAD)[None, :]
    place = tl.arange(0, BLOCK_KEYS)[:, None] * slot_stride + column
    for start in tl.range(first, last, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        if ONE_PAGE:
            page = tl.load(table + start // page_size).to(tl.int64)
            at = page * page_stride + start % page_size * slot_stride
            k_at, v_at = k_pages + at + place, v_pages + at + place
        else:
            page = tl.load(table + key // page_size, mask=key < last, other=0).to(tl.int64)
            at = page * page_stride + key % page_size * slot_stride
            k_at, v_at = k_pages + at[:, None] + column, v_pages + at[:, None] + column
        # unused slots may hold NaN, which no weight of 0 would remove: they are not read
        if MASKED:
            inside = (key < last)[:, None]
            if HEAD_SIZE < BLOCK_HEAD:
                inside = inside & (column < HEAD_SIZE)
            k, v = tl.load(k_at, mask=inside, other=0.0), tl.load(v_at, mask=inside, other=0.0)
        elif HEAD_SIZE < BLOCK_HEAD:
            inside = column < HEAD_SIZE
            k, v = tl.load(k_at, mask=inside, other=0.0), tl.load(v_at, mask=inside, other=0.0)
        else:
            k, v = tl.load(k_at), tl.load(v_at)
        product = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            product = tl.where(key[None, :] < visible[:, None], product, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(product, axis=1) * scale_log2)
        # a row that has seen no key yet: -inf minus -inf would be NaN
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weight = tl.exp2(product * scale_log2 - base[:, None])
        faded = tl.exp2(peak - base)
        total = total * faded + tl.sum(weight, axis=1)
        weighted = tl.dot(weight.to(v.dtype), v, weighted * faded[:, None], input_precision="ieee")
        peak = new_peak
    return weighted, peak, total


@triton.jit
def store_result(out, lse, place, is_row, any_key, weighted, peak, total, HEAD_SIZE: tl.constexpr):
    """Write the rows' results, and their log-sum-exp (base 2) if others are merged with them; `place` counts rows of
    `out`. A row without keys is 0, or has a log-sum-exp of -inf and no result, which is then not read."""
    column = tl.arange(0, weighted.shape[1])[None, :]
    mask = is_row[:, None] & (column < HEAD_SIZE)
    if lse is not None:
        tl.store(lse + place, peak + tl.log2(total), mask=is_row)
        mask = mask & any_key
    result = weighted / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + place[:, None] * HEAD_SIZE + column, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "first_split", "all_splits"])
def decode_kernel(
    out,  # [B, Hq, S, D] fp32, or without lse [B, Hq, D]
    lse,  # [B, Hq, S] fp32, or None: this program sees all keys
    q,  # [B, Hq, D]
    k_pages,  # [P, page size, Hkv, D]
    v_pages,
    page_table,  # [B, W] int32
    lengths,  # [B] int32
    row_prefix,  # [B] int32: keys before this one are another kernel's; or None
    q_row_stride,
    q_head_stride,
    table_stride,
    page_stride,
    slot_stride,
    kv_head_stride,
    page_size,
    kv_heads,
    head_group,  # query heads of a kv head
    first_split,  # place of this kernel's splits among all
    all_splits,
    scale_log2,
    HEAD_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    ONE_PAGE: tl.constexpr,
):
    """Program (row and kv head, split)."""
    row, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), tl.program_id(0) % kv_heads
    split = tl.program_id(1)
    end = tl.load(lengths + row)
    begin = 0 if row_prefix is None else tl.load(row_prefix + row)
    first, last = share_of(begin, end, split, tl.num_programs(1), BLOCK_KEYS)

    member = tl.arange(0, BLOCK_ROWS)
    is_row = member < head_group
    head = kv_head * head_group + member
    column = tl.arange(0, BLOCK_HEAD)[None, :]
    q_at = q + row * q_row_stride + head[:, None] * q_head_stride + column
    query = tl.load(q_at, mask=is_row[:, None] & (column < HEAD_SIZE), other=0.0)
    weighted, peak, total = attend(
        query,
        tl.zeros([BLOCK_ROWS, BLOCK_HEAD], tl.float32),
        tl.full([BLOCK_ROWS], -float("inf"), tl.float32),
        tl.zeros([BLOCK_ROWS], tl.float32),
        first, last, tl.zeros([BLOCK_ROWS], tl.int32) + last, page_table + row * table_stride,
        k_pages + kv_head * kv_head_stride, v_pages + kv_head * kv_head_stride,
        page_stride, slot_stride, page_size, scale_log2,
        HEAD_SIZE, BLOCK_KEYS, BLOCK_HEAD, ONE_PAGE, True,
    )  # fmt: skip
    place = (row * kv_heads * head_group + head) * all_splits + first_split + split
    store_result(out, lse, place, is_row, first < last, weighted, peak, total, HEAD_SIZE)


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "num_groups", "all_splits"])
def prefix_kernel(
    out,  # [B, Hq, S, D] fp32
    lse,  # [B, Hq, S] fp32
    row_prefix,  # [B] int32, for the decode kernel
    q,  # [B, Hq, D]
    k_pages,  # [P, page size, Hkv, D]
    v_pages,
    page_table,  # [B, W] int32
    lengths,  # [B] int32
    row_offsets,  # [G+1] int32
    prefix_length,  # [G] int32
    num_groups,
    q_row_stride,
    q_head_stride,
    table_stride,
    page_stride,
    slot_stride,
    kv_head_stride,
    page_size,
    kv_heads,
    head_group,
    all_splits,
    scale_log2,
    HEAD_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,  # power of two that the query heads of a kv head fit into
    ONE_PAGE: tl.constexpr,
):
    """Program (tile of a group's rows and kv head, split)."""
    kv_head, split = tl.program_id(0) % kv_heads, tl.program_id(1)
    group, first_row, end_row = find_owner(
        row_offsets, tl.program_id(0) // kv_heads, num_groups, BLOCK_ROWS // BLOCK_GROUP
    )
    if first_row >= end_row:
        return
    member = tl.arange(0, BLOCK_ROWS)
    row = first_row + member // BLOCK_GROUP
    is_row = (member % BLOCK_GROUP < head_group) & (row < end_row)
    head = kv_head * head_group + member % BLOCK_GROUP
    prefix = tl.load(prefix_length + group)
    if kv_head == 0 and split == 0:
        first_of_row = is_row & (member % BLOCK_GROUP == 0)
        tl.store(row_prefix + row, tl.zeros([BLOCK_ROWS], tl.int32) + prefix, mask=first_of_row)

    # rows may be shorter than the prefix, or over (length 0): the longest one's page table has all pages
    length = tl.load(lengths + row, mask=is_row, other=-1)
    longest_row = (first_row + tl.argmax(length, axis=0) // BLOCK_GROUP).to(tl.int64)
    first, last = share_of(0, tl.minimum(prefix, tl.max(length, axis=0)), split, tl.num_programs(1), BLOCK_KEYS)
    column = tl.arange(0, BLOCK_HEAD)[None, :]
    q_at = q + row.to(tl.int64)[:, None] * q_row_stride + head[:, None] * q_head_stride + column
    query = tl.load(q_at, mask=is_row[:, None] & (column < HEAD_SIZE), other=0.0)
    weighted, peak, total = attend(
        query,
        tl.zeros([BLOCK_ROWS, BLOCK_HEAD], tl.float32),
        tl.full([BLOCK_ROWS], -float("inf"), tl.float32),
        tl.zeros([BLOCK_ROWS], tl.float32),
        first, last, tl.minimum(length, last), page_table + longest_row * table_stride,
        k_pages + kv_head * kv_head_stride, v_pages + kv_head * kv_head_stride,
        page_stride, slot_stride, page_size, scale_log2,
        HEAD_SIZE, BLOCK_KEYS, BLOCK_HEAD, ONE_PAGE, True,
    )  # fmt: skip
    place = (row.to(tl.int64) * kv_heads * head_group + head) * all_splits + split
    store_result(out, lse, place, is_row, first < last, weighted, peak, total, HEAD_SIZE)


@triton.jit(do_not_specialize=["all_splits"])
def merge_kernel(
    out,  # [B, Hq, D]
    partial,  # [B, Hq, S, D] fp32
    lse,  # [B, Hq, S] fp32, base 2
    all_splits,
    HEAD_SIZE: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """One program per row and query head."""
    place = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_HEAD)
    weighted = tl.zeros([BLOCK_HEAD], tl.float32)
    peak, total = -float("inf"), 0.0
    for start in range(0, all_splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        split_lse = tl.load(lse + place * all_splits + split, mask=split < all_splits, other=-float("inf"))
        has_keys = (split_lse != -float("inf"))[:, None]
        at = partial + (place * all_splits + split)[:, None] * HEAD_SIZE + column[None, :]
        result = tl.load(at, mask=has_keys & (column < HEAD_SIZE)[None, :], other=0.0)
        new_peak = tl.maximum(peak, tl.max(split_lse, axis=0))
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weight = tl.exp2(split_lse - base)
        faded = tl.exp2(peak - base)
        total = total * faded + tl.sum(weight, axis=0)
        weighted = weighted * faded + tl.sum(weight[:, None] * result, axis=0)
        peak = new_peak
    result = weighted / tl.where(total == 0.0, 1.0, total)
    tl.store(out + place * HEAD_SIZE + column, result.to(out.dtype.element_ty), mask=column < HEAD_SIZE)


def tile_of(tiles: Tiles, q: Tensor, head_group: int) -> Tile:
    """The table's entry for the device, dtype and head size; the interpreter takes the smallest tiles."""
    capability = torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 8
    # 8.6, 8.9 and 12.x have 99 KiB of shared memory for a block, which the tiles for 8.0 need less of
    tile = tiles[90 if capability in (9, 10) else 80, q.element_size(), 128 if q.shape[2] <= 128 else 256]
    return tile._replace(block_rows=max(tile.block_rows, triton.next_power_of_2(head_group)))


def paging(pages: Tensor, page_table: Tensor) -> tuple[int, ...]:
    """Strides and page size, in the order in which the kernels take them."""
    return page_table.stride(0), *pages.stride()[:3], pages.shape[1]


def block_head(head_size: int) -> int:
    """Columns that a product has for a head."""
    return max(16, int(triton.next_power_of_2(head_size)))


def constants(tile: Tile, head_size: int, pages: Tensor) -> dict[str, int | bool]:
    """What a tile fixes in a kernel over pages."""
    return {
        "HEAD_SIZE": head_size,
        "BLOCK_ROWS": tile.block_rows,
        "BLOCK_KEYS": tile.block_keys,
        "BLOCK_HEAD": block_head(head_size),
        "ONE_PAGE": pages.shape[1] % tile.block_keys == 0,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def splits_of(q: Tensor, kv_heads: int, num_groups: int, num_keys: int) -> tuple[int, int]:
    """(splits of a prefix, splits of the rest of a row), from sizes alone; no prefix without groups."""
    most = max(1, min(-(-num_keys // SMALLEST_SPLIT), LARGEST_SPLITS))
    processors = num_processors(q.device)
    decode = min(-(-DECODE_PROGRAMS * processors // (q.shape[0] * kv_heads)), most)
    prefix = min(max(PREFIX_PROGRAMS * processors // (num_groups * kv_heads), 1), most) if num_groups else 0
    return prefix, decode


def paged_decode_triton(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    row_offsets: Tensor | None,
    prefix_length: Tensor | None,
    scale: float,
    *,
    splits: tuple[int, int] | None = None,
    tiles: tuple[Tile, Tile] | None = None,
) -> Tensor:
    """[B, Hq, D]; arguments as the public function's, already checked. One to three launches, no waiting.

    Args:
        splits: of a group's prefix (0 without groups) and of the rest of a row, for tests and tuning.
        tiles: of the prefix and the decode kernel, likewise.
    """
    (num_rows, num_heads, head_size), kv_heads = q.shape, k_pages.shape[2]
    head_group, num_groups = num_heads // kv_heads, 0 if prefix_length is None else len(prefix_length)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_rows == 0:
        return out
    q = q if q.stride(2) == 1 else q.contiguous()
    page_table = page_table if page_table.stride(1) == 1 else page_table.contiguous()
    lengths = lengths.contiguous()
    num_keys = page_table.shape[1] * k_pages.shape[1]
    prefix_splits, decode_splits = splits or splits_of(q, kv_heads, num_groups, num_keys)
    prefix_tile, decode_tile = tiles or (tile_of(t, q, head_group) for t in (PREFIX_TILES, DECODE_TILES))
    all_splits = prefix_splits + decode_splits

    partial, lse, row_prefix = out, None, None
    if all_splits > 1:
        partial = torch.empty(num_rows, num_heads, all_splits, head_size, dtype=torch.float32, device=q.device)
        lse = torch.empty(num_rows, num_heads, all_splits, dtype=torch.float32, device=q.device)
    strides = (*q.stride()[:2], *paging(k_pages, page_table))
    # Kernels go to the current device, which need not be the tensors'.
    with torch.cuda.device_of(q):
        if row_offsets is not None and prefix_length is not None:
            row_prefix = torch.empty(num_rows, dtype=torch.int32, device=q.device)
            block_group = triton.next_power_of_2(head_group)
            num_tiles = num_rows // (prefix_tile.block_rows // block_group) + num_groups
            prefix_kernel[(num_tiles * kv_heads, prefix_splits)](
                partial, lse, row_prefix, q, k_pages, v_pages, page_table, lengths,
                row_offsets.contiguous(), prefix_length.contiguous(), num_groups,
                *strides, kv_heads, head_group, all_splits, scale * LOG2_E,
                BLOCK_GROUP=block_group, **constants(prefix_tile, head_size, k_pages),
            )  # fmt: skip
        decode_kernel[(num_rows * kv_heads, decode_splits)](
            partial, lse, q, k_pages, v_pages, page_table, lengths, row_prefix,
            *strides, kv_heads, head_group, prefix_splits, all_splits, scale * LOG2_E,
            **constants(decode_tile, head_size, k_pages),
        )  # fmt: skip
        if lse is not None:
            merge_kernel[(num_rows * num_heads,)](
                out, partial, lse, all_splits,
                HEAD_SIZE=head_size, BLOCK_HEAD=block_head(head_size), BLOCK_SPLITS=MERGE_SPLITS,
                num_warps=MERGE_WARPS,
            )  # fmt: skip
    return out
