"""What `paged_prefill_attention` means: each sequence's keys out of its pages, and a causal mask that ends at the end.

This is also the way of a CPU, and of a GPU without Triton. Neighbouring sequences are padded to one length and share a
call of `scaled_dot_product_attention`, as many as fit a block: short extends of many sequences are few calls, long
prompts a call each.

Shape suffixes: N packed tokens, B sequences, Q new tokens of the longest sequence of a block, L keys, Hq/Hkv heads of
queries and of keys, D head size.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from coars_kernels.paged_decode_attention.reference import BLOCK_NUMBERS, gather, key_slots


def _blocks(num_new: list[int], lengths: list[int], numbers_per_key: int) -> Iterator[tuple[int, int]]:
    """Ranges of sequences that share a call: neither their gathered keys nor the scores of a head are too many."""
    first, widest, longest = 0, numbers_per_key, 0
    for index, (new, length) in enumerate(zip(num_new, lengths, strict=True)):
        widest, longest = max(widest, new), max(longest, length)
        if index > first and (index + 1 - first) * widest * longest > BLOCK_NUMBERS:
            yield first, index
            first, widest, longest = index, max(numbers_per_key, new), length
    if num_new:
        yield first, len(num_new)


def paged_prefill_attention_reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_q: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """[N, Hq, D] in q's dtype; the signature of `paged_prefill_attention`. Reads `cu_q` and `lengths` on the host."""
    out = q.new_zeros(q.shape)
    bounds, new_B = cu_q.tolist(), cu_q.diff()
    for first, last in _blocks(new_B.tolist(), lengths.tolist(), k_pages.shape[2] * k_pages.shape[3]):
        block, tokens = slice(first, last), slice(bounds[first], bounds[last])
        if tokens.stop > tokens.start:
            out[tokens] = _block(
                q[tokens], k_pages, v_pages, page_table[block], new_B[block].long(), lengths[block], scale
            )
    return out


def _block(
    q_ND: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    new_B: Tensor,
    lengths_B: Tensor,
    scale: float | None,
) -> Tensor:
    """Some sequences, padded to the longest of them."""
    (num_tokens, num_heads, head_size), (_, page_size, kv_heads, _) = q_ND.shape, k_pages.shape
    num_rows, widest, num_keys = len(new_B), int(new_B.max()), int(lengths_B.max())
    if num_keys == 0:
        return torch.zeros_like(q_ND)
    sequence_N = torch.repeat_interleave(new_B, output_size=num_tokens)
    place_N = torch.arange(num_tokens, device=q_ND.device) - (new_B.cumsum(0) - new_B)[sequence_N]
    padded = q_ND.new_zeros(num_rows, widest, num_heads, head_size)
    padded[sequence_N, place_N] = q_ND
    folded = (num_rows, kv_heads, num_heads // kv_heads * widest, head_size)
    heads_first = padded.view(num_rows, widest, kv_heads, -1, head_size).permute(0, 2, 3, 1, 4)

    # the new token at place i of n, after `length` keys in all, sees the first length - n + i + 1
    visible_BQ = (lengths_B - new_B)[:, None] + torch.arange(1, widest + 1, device=q_ND.device)
    mask_BQL = torch.arange(num_keys, device=q_ND.device) < visible_BQ[:, :, None]
    slots_BL = key_slots(page_table, lengths_B, page_size, num_keys)
    attended = F.scaled_dot_product_attention(
        heads_first.reshape(folded), gather(k_pages, slots_BL), gather(v_pages, slots_BL),
        attn_mask=mask_BQL.repeat(1, num_heads // kv_heads, 1)[:, None], scale=scale,
    )  # fmt: skip
    attended = attended.view(num_rows, kv_heads, -1, widest, head_size).permute(0, 3, 1, 2, 4)
    out = attended.reshape(num_rows, widest, num_heads, head_size)[sequence_N, place_N]
    return torch.where((visible_BQ[sequence_N, place_N] > 0)[:, None, None], out, 0.0)
