"""`paged_decode_attention`: the public function, its checks, and the one operator behind it.

`coars_kernels::paged_decode_attention` is the Triton kernels of `triton_paged.py` on a GPU, and elsewhere, or where
Triton is not installed, the reference. Forward only: a backward pass through it is an error.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from coars_kernels.checks import (
    MATRIX_DTYPES,
    require,
    require_device,
    require_dtype,
    require_range,
    require_shape,
    values_are_visible,
)
from coars_kernels.dispatch import has_triton
from coars_kernels.paged_decode_attention.reference import paged_decode_attention_reference

LARGEST_HEAD_SIZE, LARGEST_HEAD_GROUP = 256, 128


@dataclass(frozen=True, eq=False)
class PrefixGroups:
    """Which neighbouring rows of a batch begin with the same pages.

    A CUDA graph fixes the shapes only: a batch with fewer groups than were captured repeats the last offset, and rows
    that share nothing are a group of their own, or together one with a prefix of 0.
    """

    row_offsets: Tensor
    """[G+1] int32: group g is rows [row_offsets[g], row_offsets[g+1]); from 0 to B, without descending."""
    prefix_length: Tensor
    """[G] int32: so many first keys of the group's rows lie in the same pages; a multiple of the page size. Rows that
    are shorter share what they have, so a row that has ended (length 0) may stay where it is."""


def check_paged(q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor) -> None:
    """Raise unless queries [N, Hq, D], pages, page table and lengths fit together, which both paged operations need."""
    require(q.dim() == 3, "q", f"expected [rows, heads, head size], got shape {list(q.shape)}")
    require_dtype(q, "q", MATRIX_DTYPES)
    num_heads, head_size = q.shape[1:]
    fits = 1 <= head_size <= LARGEST_HEAD_SIZE
    require(fits, "q", f"head size must be 1 to {LARGEST_HEAD_SIZE}, got {head_size}")
    require(k_pages.dim() == 4, "k_pages", f"expected [P, page size, Hkv, D], got shape {list(k_pages.shape)}")
    num_pages, page_size, kv_heads, _ = k_pages.shape
    require(k_pages.shape[3] == head_size, "k_pages", f"head size {k_pages.shape[3]}, but q's is {head_size}")
    require(page_size > 0 and kv_heads > 0, "k_pages", f"no slots or no heads in shape {list(k_pages.shape)}")
    require(num_heads % kv_heads == 0, "q", f"{num_heads} heads are no multiple of the {kv_heads} of k_pages")
    shared = num_heads // kv_heads
    require(1 <= shared <= LARGEST_HEAD_GROUP, "q", f"{shared} heads for one of k_pages; at most {LARGEST_HEAD_GROUP}")
    require_shape(v_pages, "v_pages", tuple(k_pages.shape))
    require(page_table.dim() == 2, "page_table", f"expected [B, W], got shape {list(page_table.shape)}")
    require_shape(lengths, "lengths", (page_table.shape[0],))
    for argument, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        require(pages.dtype == q.dtype, argument, f"expected q's dtype {q.dtype}, got {pages.dtype}")
        require_device(pages, argument, q, "q")
    require(k_pages.stride(3) == 1, "k_pages", "numbers of one head must be neighbours in memory (stride 1)")
    places = zip(k_pages.shape, k_pages.stride(), v_pages.stride(), strict=True)
    alike = all(size == 1 or ours == theirs for size, ours, theirs in places)
    require(alike, "v_pages", f"expected the strides of k_pages {k_pages.stride()}, got {v_pages.stride()}")
    for argument, tensor in (("page_table", page_table), ("lengths", lengths)):
        require_dtype(tensor, argument, (torch.int32,))
        require_device(tensor, argument, q, "q")
    require_range(lengths, "lengths", 0, page_table.shape[1] * page_size + 1)
    if values_are_visible(page_table):
        column_W = torch.arange(page_table.shape[1], device=page_table.device)
        used_BW = column_W * page_size < lengths[:, None]
        outside_BW = used_BW & ((page_table < 0) | (page_table >= num_pages))
        if bool(outside_BW.any()):
            row, column = outside_BW.nonzero()[0].tolist()
            page = int(page_table[row, column])
            raise ValueError(
                f"page_table: row {row} needs its page {column}, which is {page}, outside 0..{num_pages - 1}"
            )


def scale_of(q: Tensor, scale: float | None) -> float:
    """The scores' factor, 1 / sqrt(D) unless the caller names one."""
    if scale is not None and not 0.0 < scale < math.inf:
        raise ValueError(f"scale: must be finite and above 0, got {scale}")
    return 1.0 / math.sqrt(q.shape[2]) if scale is None else float(scale)


def _check_groups(groups: PrefixGroups, page_table: Tensor, lengths: Tensor, page_size: int) -> None:
    offsets, prefixes = groups.row_offsets, groups.prefix_length
    for argument, tensor in (("row_offsets", offsets), ("prefix_length", prefixes)):
        require(tensor.dim() == 1, f"prefix_groups.{argument}", f"expected one dimension, got {list(tensor.shape)}")
        require_dtype(tensor, f"prefix_groups.{argument}", (torch.int32,))
        require_device(tensor, f"prefix_groups.{argument}", lengths, "lengths")
    require(len(prefixes) > 0, "prefix_groups.prefix_length", "no groups; pass None instead")
    require_shape(offsets, "prefix_groups.row_offsets", (len(prefixes) + 1,))
    if not values_are_visible(offsets):
        return
    bounds, lengths_G = offsets.tolist(), prefixes.tolist()
    spans = bounds[0] == 0 and bounds[-1] == len(lengths) and bounds == sorted(bounds)
    rule = f"must run from 0 to B = {len(lengths)} without descending"
    require(spans, "prefix_groups.row_offsets", f"{rule}, got {bounds[0]}..{bounds[-1]}")
    for group, prefix in enumerate(lengths_G):
        whole = prefix >= 0 and prefix % page_size == 0
        require(whole, "prefix_groups.prefix_length", f"group {group}: {prefix} is no multiple of {page_size}")
        rows = slice(bounds[group], bounds[group + 1])
        if prefix > 0 and rows.stop > rows.start:
            lengths_B, table_BW = lengths[rows], page_table[rows, : prefix // page_size]
            column_W = torch.arange(table_BW.shape[1], device=table_BW.device)
            differs = (table_BW != table_BW[lengths_B.argmax()]) & (column_W * page_size < lengths_B[:, None])
            same = not bool(differs.any())
            require(same, "prefix_groups.prefix_length", f"group {group}: rows differ within their first {prefix} keys")


@torch.library.custom_op("coars_kernels::paged_decode_attention", mutates_args=())
def _attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    row_offsets: Tensor | None,
    prefix_length: Tensor | None,
    scale: float,
) -> Tensor:
    if has_triton(q):
        from coars_kernels.paged_decode_attention.triton_paged import paged_decode_triton

        return paged_decode_triton(q, k_pages, v_pages, page_table, lengths, row_offsets, prefix_length, scale)
    return paged_decode_attention_reference(q, k_pages, v_pages, page_table, lengths, scale=scale)


@_attend.register_fake
def _(q: Tensor, *arguments: object) -> Tensor:
    return q.new_empty(q.shape)


def paged_decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    prefix_groups: PrefixGroups | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v of one query token per row over the row's keys, which lie in pages (design, section 6).

    On a GPU the keys of a row are split among programs whose partial results are merged by their log-sum-exp. All sizes
    of the launch follow from shapes, never from values, and nothing waits for the device: a CUDA graph of it stays
    valid while lengths, page table and groups change in place. With `prefix_groups` the common prefix of a group is
    read once for all of its rows, and the result is the same up to rounding. Forward only.

    Args:
        q: [B, Hq, D] bf16, fp16 or fp32, D at most 256: the newest token's queries, position already applied.
        k_pages, v_pages: [P, page size, Hkv, D], same dtype and strides, Hq a multiple of Hkv (flash-attn's layout of
            pages). Only the last stride must be 1, so layers may share one memory. Slots without a key may hold
            anything, NaN included. On a GPU a page size that is a multiple of 64 is faster.
        page_table: [B, W] int32: key j of row b is slot j % page size of page page_table[b, j // page size]. What a row
            does not need is never read, and may be -1. Needed pages must exist (checked on CPU only).
        lengths: [B] int32, keys of each row with the newest one, at most W * page size (checked on CPU only); a row of
            length 0 gets zeros.
        prefix_groups: rows with common first pages, see `PrefixGroups`; its values are checked on CPU only.
        scale: of the scores, above 0; by default 1 / sqrt(D).

    Returns:
        [B, Hq, D] in q's dtype; sums are fp32. A row does not depend on other rows' values, but on a GPU its last bits
        may depend on B, which decides the number of splits.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range; the message begins with its name.
    """
    check_paged(q, k_pages, v_pages, page_table, lengths)
    require(q.shape[0] == page_table.shape[0], "q", f"{q.shape[0]} rows, but page_table has {page_table.shape[0]}")
    row_offsets = prefix_length = None
    if prefix_groups is not None:
        _check_groups(prefix_groups, page_table, lengths, k_pages.shape[1])
        row_offsets, prefix_length = prefix_groups.row_offsets, prefix_groups.prefix_length
    return _attend(q, k_pages, v_pages, page_table, lengths, row_offsets, prefix_length, scale_of(q, scale))
