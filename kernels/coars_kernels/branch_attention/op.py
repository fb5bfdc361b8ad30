"""`branch_attention`: the public function, its checks, and the one operator behind it.

`coars_kernels::branch_attention` is the Triton kernel of `triton_branch.py` on a GPU, and elsewhere, for float64, or
where Triton is not installed, the reference. Forward only: a backward pass through it is an error.
"""

import torch
from torch import Tensor

from coars_kernels.branch_attention.reference import branch_attention_reference
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
from coars_kernels.paged_decode_attention.op import LARGEST_HEAD_GROUP, LARGEST_HEAD_SIZE, scale_of


def _check_heads(q: Tensor, k: Tensor, v: Tensor, trunk_k: Tensor, trunk_v: Tensor) -> None:
    require(q.dim() == 3, "q", f"expected [NB, Hq, D], got shape {list(q.shape)}")
    require_dtype(q, "q", (*MATRIX_DTYPES, torch.float64))
    num_tokens, num_heads, head_size = q.shape
    fits = 1 <= head_size <= LARGEST_HEAD_SIZE
    require(fits, "q", f"head size must be 1 to {LARGEST_HEAD_SIZE}, got {head_size}")
    require(k.dim() == 3, "k", f"expected [NB, Hkv, D], got shape {list(k.shape)}")
    kv_heads = k.shape[1]
    require_shape(k, "k", (num_tokens, kv_heads, head_size))
    require(kv_heads > 0 and num_heads % kv_heads == 0, "q", f"{num_heads} heads are no multiple of k's {kv_heads}")
    shared = num_heads // kv_heads
    require(1 <= shared <= LARGEST_HEAD_GROUP, "q", f"{shared} heads for one of k; at most {LARGEST_HEAD_GROUP}")
    require_shape(v, "v", tuple(k.shape))
    require(trunk_k.dim() == 3, "trunk_k", f"expected [N, Hkv, D], got shape {list(trunk_k.shape)}")
    require_shape(trunk_k, "trunk_k", (trunk_k.shape[0], kv_heads, head_size))
    require_shape(trunk_v, "trunk_v", tuple(trunk_k.shape))
    for argument, tensor in (("k", k), ("v", v), ("trunk_k", trunk_k), ("trunk_v", trunk_v)):
        require(tensor.dtype == q.dtype, argument, f"expected q's dtype {q.dtype}, got {tensor.dtype}")
        require_device(tensor, argument, q, "q")


def _check_branches(q: Tensor, trunk_k: Tensor, cu_branch: Tensor, trunk_start: Tensor, trunk_len: Tensor) -> None:
    require(trunk_start.dim() == 1, "trunk_start", f"expected [M], got shape {list(trunk_start.shape)}")
    require_shape(trunk_len, "trunk_len", tuple(trunk_start.shape))
    require_shape(cu_branch, "cu_branch", (len(trunk_start) + 1,))
    for argument, tensor in (("cu_branch", cu_branch), ("trunk_start", trunk_start), ("trunk_len", trunk_len)):
        require_dtype(tensor, argument, (torch.int32,))
        require_device(tensor, argument, q, "q")
    num_rows = trunk_k.shape[0]
    if values_are_visible(cu_branch):
        first, last = int(cu_branch[0]), int(cu_branch[-1])
        spans = first == 0 and last == q.shape[0]
        require(spans, "cu_branch", f"must run from 0 to NB = {q.shape[0]}, got {first}..{last}")
        require(bool((cu_branch.diff() >= 0).all()), "cu_branch", "must not descend")
    require_range(trunk_start, "trunk_start", 0, num_rows + 1)
    require_range(trunk_len, "trunk_len", 0, num_rows + 1)
    if values_are_visible(trunk_len):
        beyond_M = trunk_start.long() + trunk_len > num_rows
        if bool(beyond_M.any()):
            branch = int(beyond_M.nonzero()[0])
            start, length = int(trunk_start[branch]), int(trunk_len[branch])
            raise ValueError(
                f"trunk_len: branch {branch} reads trunk rows {start}..{start + length - 1}, but there are {num_rows}"
            )


@torch.library.custom_op("coars_kernels::branch_attention", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    trunk_k: Tensor,
    trunk_v: Tensor,
    cu_branch: Tensor,
    trunk_start: Tensor,
    trunk_len: Tensor,
    scale: float,
) -> Tensor:
    if has_triton(q) and q.dtype != torch.float64:
        from coars_kernels.branch_attention.triton_branch import branch_attention_triton

        return branch_attention_triton(q, k, v, trunk_k, trunk_v, cu_branch, trunk_start, trunk_len, scale)
    return branch_attention_reference(q, k, v, trunk_k, trunk_v, cu_branch, trunk_start, trunk_len, scale=scale)


@_attend.register_fake
def _(q: Tensor, *arguments: object) -> Tensor:
    return q.new_empty(q.shape)


def branch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    trunk_k: Tensor,
    trunk_v: Tensor,
    cu_branch: Tensor,
    trunk_start: Tensor,
    trunk_len: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention of packed branches, each of which continues a sequence of a packed trunk (design, section 7).

    Token i of branch m sees the trunk's rows trunk_start[m] to trunk_start[m] + trunk_len[m] - 1, which are read where
    they lie, and the branch's own tokens up to itself. So a teacher that scores [context, reference, response] computes
    the tokens of reference and response only. Nothing waits for the device, and all sizes of the launch follow from
    shapes. Forward only.

    Args:
        q: [NB, Hq, D] bf16, fp16, fp32 (or float64, without a kernel), D at most 256: all branches packed, position
            applied (a branch's positions begin at its fork).
        k, v: [NB, Hkv, D], same dtype, Hq a multiple of Hkv: the branches' own.
        trunk_k, trunk_v: [N, Hkv, D], same dtype: the packed trunk's, position applied.
        cu_branch: [M+1] int32: branch m owns tokens [cu_branch[m], cu_branch[m+1]), possibly none. Must run from 0 to
            NB without descending (checked on CPU only).
        trunk_start: [M] int32, first row of the sequence that the branch leaves.
        trunk_len: [M] int32, rows before its fork, possibly 0; they must exist (checked on CPU only).
        scale: of the scores, above 0; by default 1 / sqrt(D).

    Returns:
        [NB, Hq, D] in q's dtype; sums are fp32 (float64 for float64). A branch does not depend on other branches.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range; the message begins with its name.
    """
    _check_heads(q, k, v, trunk_k, trunk_v)
    _check_branches(q, trunk_k, cu_branch, trunk_start, trunk_len)
    return _attend(q, k, v, trunk_k, trunk_v, cu_branch, trunk_start, trunk_len, scale_of(q, scale))
