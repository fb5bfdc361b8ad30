"""`paged_prefill_attention`: the public function, its checks, and the one operator behind it.

`coars_kernels::paged_prefill_attention` is the Triton kernel of `triton_prefill.py` on a GPU, and elsewhere, or where
Triton is not installed, the reference. Forward only: a backward pass through it is an error. Where flash-attn or
torch's `varlen_attn` take pages, those are the first choice of a rollout.
"""

import torch
from torch import Tensor

from coars_kernels.checks import require, require_device, require_dtype, require_shape, values_are_visible
from coars_kernels.dispatch import has_triton
from coars_kernels.paged_decode_attention.op import check_paged, scale_of
from coars_kernels.paged_prefill_attention.reference import paged_prefill_attention_reference


def _check_bounds(cu_q: Tensor, lengths: Tensor, num_tokens: int) -> None:
    require_shape(cu_q, "cu_q", (len(lengths) + 1,))
    require_dtype(cu_q, "cu_q", (torch.int32,))
    require_device(cu_q, "cu_q", lengths, "lengths")
    if values_are_visible(cu_q):
        first, last = int(cu_q[0]), int(cu_q[-1])
        spans = first == 0 and last == num_tokens
        require(spans, "cu_q", f"must run from 0 to N = {num_tokens}, got {first}..{last}")
        new_B = cu_q.diff()
        require(bool((new_B >= 0).all()), "cu_q", "must not descend")
        more_B = new_B > lengths
        if bool(more_B.any()):
            row = int(more_B.nonzero()[0])
            new, keys = int(new_B[row]), int(lengths[row])
            raise ValueError(f"lengths: sequence {row} has {new} new tokens, but {keys} keys in all")


@torch.library.custom_op("coars_kernels::paged_prefill_attention", mutates_args=())
def _attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_q: Tensor,
    lengths: Tensor,
    scale: float,
) -> Tensor:
    if has_triton(q):
        from coars_kernels.paged_prefill_attention.triton_prefill import paged_prefill_triton

        return paged_prefill_triton(q, k_pages, v_pages, page_table, cu_q, lengths, scale)
    return paged_prefill_attention_reference(q, k_pages, v_pages, page_table, cu_q, lengths, scale=scale)


@_attend.register_fake
def _(q: Tensor, *arguments: object) -> Tensor:
    return q.new_empty(q.shape)


def paged_prefill_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_q: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of each sequence's new tokens over all of its keys, new ones included, which lie in pages.

    New token i of n of a sequence with `length` keys sees its first length - n + i + 1 keys (the mask ends at the
    bottom right). Nothing waits for the device, and all sizes of the launch follow from shapes. Forward only.

    Args:
        q: [N, Hq, D] bf16, fp16 or fp32, D at most 256: the new tokens of all sequences, packed, position applied.
        k_pages, v_pages: [P, page size, Hkv, D], as `paged_decode_attention` has them.
        page_table: [B, W] int32, likewise.
        cu_q: [B+1] int32: sequence b owns tokens [cu_q[b], cu_q[b+1]), possibly none. Must run from 0 to N without
            descending (checked on CPU only).
        lengths: [B] int32, keys of each sequence, at least its new tokens and at most W * page size (checked on CPU
            only).
        scale: of the scores, above 0; by default 1 / sqrt(D).

    Returns:
        [N, Hq, D] in q's dtype; sums are fp32.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range; the message begins with its name.
    """
    check_paged(q, k_pages, v_pages, page_table, lengths)
    _check_bounds(cu_q, lengths, q.shape[0])
    return _attend(q, k_pages, v_pages, page_table, cu_q, lengths, scale_of(q, scale))
