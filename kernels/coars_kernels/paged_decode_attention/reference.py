"""What `paged_decode_attention` means: gather each row's keys and values from its pages, then ordinary attention.

This is also the way of a CPU, and of a GPU without Triton. Query heads that share a kv head stand in the query length,
so that keys are never repeated. Rows go in blocks whose gathered keys stay in the processor's cache: fresh memory for
all of them costs more than the arithmetic.

Shape suffixes: B rows, W columns of the page table, L keys, P pages, Hq/Hkv heads of queries and of keys, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_NUMBERS = 2**18
"""Gathered keys of a block, in numbers; a row with more is a block of its own."""


def longest(lengths_B: Tensor, page_table_BW: Tensor, page_size: int) -> int:
    """A number of keys that no row exceeds: the largest length on a CPU; elsewhere reading it would wait for the
    device, so what the page table can hold."""
    if lengths_B.device.type == "cpu":
        return int(lengths_B.max()) if lengths_B.numel() else 0
    return page_table_BW.shape[1] * page_size


def key_slots(page_table_BW: Tensor, lengths_B: Tensor, page_size: int, num_keys: int) -> Tensor:
    """[B, L] int64: where key j of row b lies, as page * page_size + slot in the page.

    Places beyond a row's length repeat its key 0 and must be masked: what its unused slots hold is never read, since
    even a masked NaN would make the result NaN. The first pages of rows without keys are not looked at either.
    """
    position_L = torch.arange(num_keys, device=page_table_BW.device)
    pages_BL = page_table_BW.long()[:, position_L // page_size]
    slots_BL = pages_BL * page_size + position_L % page_size
    used_BL = position_L < lengths_B[:, None]
    return torch.where(used_BL, slots_BL, torch.where(used_BL[:, :1], slots_BL[:, :1], 0))


def gather(pages: Tensor, slots_BL: Tensor) -> Tensor:
    """[B, Hkv, L, D] of pages [P, page_size, Hkv, D]."""
    _, page_size, num_heads, head_size = pages.shape
    if pages.is_contiguous():
        rows = pages.view(-1, num_heads * head_size).index_select(0, slots_BL.flatten())
    else:  # a view of one layer of a larger memory: flattening it would copy all of it
        rows = pages[slots_BL // page_size, slots_BL % page_size]
    return rows.view(*slots_BL.shape, num_heads, head_size).transpose(1, 2)


def paged_decode_attention_reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    prefix_groups: object = None,
    scale: float | None = None,
) -> Tensor:
    """[B, Hq, D] in q's dtype; the signature of `paged_decode_attention`. Groups do not change what is computed."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    most_keys = longest(lengths, page_table, k_pages.shape[1])
    step = max(1, BLOCK_NUMBERS // max(1, most_keys * k_pages.shape[2] * k_pages.shape[3]))
    for first in range(0, len(q), step):
        rows = slice(first, first + step)
        out[rows] = _block(q[rows], k_pages, v_pages, page_table[rows], lengths[rows], scale)
    return out


def _block(
    q_BHD: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths_B: Tensor, scale: float | None
) -> Tensor:
    """Some rows, by one call of `scaled_dot_product_attention`."""
    (num_rows, num_heads, head_size), (_, page_size, kv_heads, _) = q_BHD.shape, k_pages.shape
    num_keys = longest(lengths_B, page_table, page_size)
    if num_keys == 0:
        return torch.zeros_like(q_BHD)
    slots_BL = key_slots(page_table, lengths_B, page_size, num_keys)
    mask_BL = torch.arange(num_keys, device=q_BHD.device) < lengths_B[:, None]
    folded = (num_rows, kv_heads, num_heads // kv_heads)
    out = F.scaled_dot_product_attention(
        q_BHD.reshape(*folded, head_size), gather(k_pages, slots_BL), gather(v_pages, slots_BL),
        attn_mask=mask_BL[:, None, None].expand(num_rows, 1, folded[2], num_keys), scale=scale,
    )  # fmt: skip
    return torch.where(lengths_B[:, None, None] > 0, out.reshape(q_BHD.shape), 0.0)
