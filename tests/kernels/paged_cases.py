"""Inputs for the paged operations, what they must give in float64, and how far from it a result may be.

Every slot without a key holds NaN, in all pages, and what rows do not need of the page table is no page: whatever reads
more than it should shows up in the result.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from coars_kernels import PrefixGroups

# In units in the last place of the largest value: 16-bit weights and results are rounded once each (half a unit); fp32
# scores gather some roundings of their products before they become weights.
ALLOWANCE = {torch.float32: 8.0, torch.bfloat16: 1.0, torch.float16: 1.0}


@dataclass
class Paged:
    """Arguments of both operations, with queries for one of them."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    lengths: Tensor
    cu_q: Tensor | None = None
    groups: PrefixGroups | None = None
    scale: float | None = None

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        middle = () if self.cu_q is None else (self.cu_q,)
        return self.q, self.k_pages, self.v_pages, self.page_table, *middle, self.lengths

    @property
    def options(self) -> dict[str, Any]:
        groups = {} if self.groups is None else {"prefix_groups": self.groups}
        return groups | {"scale": self.scale}

    def to(self, place: Any) -> "Paged":
        """On another device, or with queries and pages in another dtype."""
        if isinstance(place, torch.dtype):
            return replace(self, **{name: getattr(self, name).to(place) for name in ("q", "k_pages", "v_pages")})
        moved = {name: value.to(place) for name, value in vars(self).items() if isinstance(value, Tensor)}
        if self.groups is not None:
            moved["groups"] = PrefixGroups(*(value.to(place) for value in vars(self.groups).values()))
        return replace(self, **moved)


def make_paged(
    lengths: list[int],
    *,
    heads: tuple[int, int] = (4, 2),
    head_size: int = 16,
    page_size: int = 4,
    dtype: torch.dtype = torch.float32,
    groups: list[tuple[int, int]] | None = None,
    new: list[int] | None = None,
    spare_columns: int = 2,
    scale: float | None = None,
    seed: int = 0,
) -> Paged:
    """Rows with so many keys in shuffled pages.

    Args:
        groups: (rows, pages in common) of each prefix group; together all rows.
        new: new tokens of each row, for a prefill; otherwise the queries are those of a decode.
    """
    generator = torch.Generator().manual_seed(seed)
    query_heads, kv_heads = heads
    num_rows, needed = len(lengths), [-(-length // page_size) for length in lengths]
    num_pages = sum(needed) + 3
    order = iter(torch.randperm(num_pages, generator=generator).tolist())
    # no page at all, or one far outside
    table = torch.tensor([-1, 2**30])[
        torch.randint(2, (num_rows, max([0, *needed]) + spare_columns), generator=generator)
    ]
    shape = (num_pages, page_size, kv_heads, head_size)
    keys, values = (torch.full(shape, torch.nan) for _ in range(2))
    first = 0
    for rows, common in groups or [(1, 0)] * num_rows:
        members = range(first, first + rows)
        shared = [next(order) for _ in range(min(common, max((needed[row] for row in members), default=0)))]
        for row in members:
            pages = shared[: needed[row]] + [next(order) for _ in range(needed[row] - len(shared))]
            table[row, : needed[row]] = torch.tensor(pages, dtype=torch.int64)
            for key in range(lengths[row]):
                page, slot = pages[key // page_size], key % page_size
                if keys[page, slot].isnan().any():
                    keys[page, slot] = torch.randn(kv_heads, head_size, generator=generator)
                    values[page, slot] = torch.randn(kv_heads, head_size, generator=generator)
        first += rows
    prefix = None
    if groups is not None:
        offsets = torch.tensor([0, *(rows for rows, _ in groups)]).cumsum(0).int()
        prefix = PrefixGroups(offsets, torch.tensor([common * page_size for _, common in groups]).int())
    bounds = None if new is None else torch.tensor([0, *new]).cumsum(0).int()
    num_queries = num_rows if new is None else sum(new)
    # scores of several units: weights that differ, as in a trained model
    q = 3 * torch.randn(num_queries, query_heads, head_size, generator=generator)
    case = Paged(q, keys, values, table.int(), torch.tensor(lengths).int(), cu_q=bounds, groups=prefix, scale=scale)
    return case.to(dtype)


def expected(case: Paged) -> Tensor:
    """Token by token in float64, by another way than the reference."""
    num_heads, page_size, kv_heads = case.q.shape[1], case.k_pages.shape[1], case.k_pages.shape[2]
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    scale = case.q.shape[2] ** -0.5 if case.scale is None else case.scale
    bounds = list(range(len(case.lengths) + 1)) if case.cu_q is None else case.cu_q.tolist()
    for row, length in enumerate(case.lengths.tolist()):
        place = torch.arange(length)
        page, slot = case.page_table[row, place // page_size].long(), place % page_size
        # [L, Hq, D]
        k, v = (
            p[page, slot].double().repeat_interleave(num_heads // kv_heads, 1) for p in (case.k_pages, case.v_pages)
        )
        for token in range(bounds[row], bounds[row + 1]):
            seen = length - (bounds[row + 1] - token) + 1
            if seen > 0:
                score = torch.einsum("hd,lhd->hl", case.q[token].double(), k[:seen]) * scale
                out[token] = torch.einsum("hl,lhd->hd", score.softmax(-1), v[:seen])
    return out


def assert_accurate(found: Tensor, case: Paged, reference: Tensor) -> None:
    """The error may exceed that of the reference in the same dtype by what the dtype explains, and no more."""
    assert found.dtype == case.q.dtype and found.shape == case.q.shape and bool(found.isfinite().all())
    exact = expected(case)
    largest = float(case.v_pages.nan_to_num(0.0).abs().amax()) if case.v_pages.numel() else 0.0
    allowance = ALLOWANCE[found.dtype] * torch.finfo(found.dtype).eps * largest
    error, usual = (float((x.double() - exact).abs().amax()) if x.numel() else 0.0 for x in (found, reference))
    assert error <= usual + allowance, f"error {error:.3g}, the reference's {usual:.3g}, allowance {allowance:.3g}"
    exact_zero = exact == 0.0
    assert not found[exact_zero].any()
