"""Inputs for `branch_attention`, what it must give in float64, and how far from it a result may be.

Trunk rows that no branch may read hold NaN: whatever reads more than it should shows up in the result.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.kernels.paged_cases import ALLOWANCE


@dataclass
class Branches:
    """Arguments of the operation."""

    q: Tensor
    k: Tensor
    v: Tensor
    trunk_k: Tensor
    trunk_v: Tensor
    cu_branch: Tensor
    trunk_start: Tensor
    trunk_len: Tensor
    scale: float | None = None

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return tuple(value for name, value in vars(self).items() if name != "scale")

    def to(self, place: Any) -> "Branches":
        """On another device, or in another dtype."""
        moved = {
            name: value.to(place)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and (value.is_floating_point() or not isinstance(place, torch.dtype))
        }
        return replace(self, **moved)


def make_branches(
    branches: list[tuple[int, int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    head_size: int = 16,
    dtype: torch.dtype = torch.float32,
    scale: float | None = None,
    seed: int = 0,
) -> Branches:
    """Branches of (sequence, fork, tokens); a sequence is as long as its latest fork, and three rows of NaN longer."""
    generator = torch.Generator().manual_seed(seed)
    query_heads, kv_heads = heads
    longest: dict[int, int] = {}
    for sequence, fork, _ in branches:
        longest[sequence] = max(longest.get(sequence, 0), fork)
    starts, trunk = {}, []
    for sequence, length in sorted(longest.items()):
        starts[sequence] = sum(map(len, trunk))
        rows = torch.randn(length, 2, kv_heads, head_size, generator=generator)
        trunk += [rows, torch.full((3, 2, kv_heads, head_size), torch.nan)]
    keys = torch.cat(trunk) if trunk else torch.zeros(0, 2, kv_heads, head_size)
    num_tokens = sum(tokens for _, _, tokens in branches)
    # scores of several units: weights that differ, as in a trained model
    q = 3 * torch.randn(num_tokens, query_heads, head_size, generator=generator)
    k, v = torch.randn(2, num_tokens, kv_heads, head_size, generator=generator)
    case = Branches(
        q, k, v, keys[:, 0].contiguous(), keys[:, 1].contiguous(),
        torch.tensor([0, *(tokens for _, _, tokens in branches)]).cumsum(0).int(),
        torch.tensor([starts[sequence] for sequence, _, _ in branches], dtype=torch.int32),
        torch.tensor([fork for _, fork, _ in branches], dtype=torch.int32), scale,
    )  # fmt: skip
    return case.to(dtype)


def expected(case: Branches) -> Tensor:
    """Token by token in float64, by another way than the reference."""
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    scale = case.q.shape[2] ** -0.5 if case.scale is None else case.scale
    group, bounds = case.q.shape[1] // case.k.shape[1], case.cu_branch.tolist()
    for m, (start, length) in enumerate(zip(case.trunk_start.tolist(), case.trunk_len.tolist(), strict=True)):
        for token in range(bounds[m], bounds[m + 1]):
            own = slice(bounds[m], token + 1)
            k, v = (
                torch.cat([trunk[start : start + length], mine[own]]).double().repeat_interleave(group, 1)
                for trunk, mine in ((case.trunk_k, case.k), (case.trunk_v, case.v))
            )
            score = torch.einsum("hd,lhd->hl", case.q[token].double(), k) * scale
            out[token] = torch.einsum("hl,lhd->hd", score.softmax(-1), v)
    return out


def assert_accurate(found: Tensor, case: Branches, reference: Tensor) -> None:
    """The error may exceed that of the reference in the same dtype by what the dtype explains, and no more."""
    assert found.dtype == case.q.dtype and found.shape == case.q.shape and bool(found.isfinite().all())
    exact = expected(case)
    both = torch.cat([case.v.flatten(), case.trunk_v.flatten()]).nan_to_num(0.0).abs()
    largest = float(both.amax()) if both.numel() else 0.0
    allowance = ALLOWANCE[found.dtype] * torch.finfo(found.dtype).eps * largest
    error, usual = (float((x.double() - exact).abs().amax()) if x.numel() else 0.0 for x in (found, reference))
    assert error <= usual + allowance, f"error {error:.3g}, the reference's {usual:.3g}, allowance {allowance:.3g}"
