"""The Triton kernels of both paged operations in the interpreter against float64, with tiles that rows outgrow."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coars_kernels.paged_decode_attention.reference import paged_decode_attention_reference
from coars_kernels.paged_decode_attention.triton_paged import Tile, paged_decode_triton, splits_of
from coars_kernels.paged_prefill_attention.reference import paged_prefill_attention_reference
from coars_kernels.paged_prefill_attention.triton_prefill import paged_prefill_triton
from tests.kernels.credit_cases import poisoned_memory
from tests.kernels.paged_cases import Paged, assert_accurate, make_paged

PAGE, KEYS = 32, 16
# No key, one, a block's and a page's end before, on and behind it, and several pages.
LENGTHS = [0, 1, KEYS - 1, KEYS, KEYS + 1, PAGE - 1, PAGE, PAGE + 1, 4 * PAGE + 7, 0]
TILE = Tile(16, KEYS, 4, 3)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def decode(case: Paged, *, splits: tuple[int, int], tile: Tile = TILE) -> Tensor:
    groups = (None, None) if case.groups is None else (case.groups.row_offsets, case.groups.prefix_length)
    scale = case.q.shape[2] ** -0.5 if case.scale is None else case.scale
    found = paged_decode_triton(*case.arguments, *groups, scale, splits=splits, tiles=(tile, tile))
    assert_accurate(found, case, paged_decode_attention_reference(*case.arguments, scale=scale))
    return found


def prefill(case: Paged, tile: Tile = TILE) -> Tensor:
    scale = case.q.shape[2] ** -0.5 if case.scale is None else case.scale
    found = paged_prefill_triton(*case.arguments, scale, tile=tile)
    assert_accurate(found, case, paged_prefill_attention_reference(*case.arguments, scale=scale))
    return found


@pytest.mark.parametrize(
    ("heads", "head_size", "splits"),
    [((14, 2), 24, 1), ((4, 4), 16, 2), ((20, 1), 64, 5), ((6, 2), 1, 3), ((4, 1), 16, 17)],
)
def test_decode(heads: tuple[int, int], head_size: int, splits: int) -> None:
    tile = TILE._replace(block_rows=32 if heads[0] // heads[1] > 16 else 16)
    decode(make_paged(LENGTHS, heads=heads, head_size=head_size, page_size=PAGE), splits=(0, splits), tile=tile)


@pytest.mark.parametrize("page_size", [1, 24])
def test_pages_smaller_than_a_block(page_size: int) -> None:
    case = make_paged(LENGTHS, page_size=page_size, groups=[(5, 1), (5, 2)])
    decode(case, splits=(2, 3))
    prefill(make_paged(LENGTHS, page_size=page_size, new=[length // 2 for length in LENGTHS]))


@pytest.mark.parametrize("rows", range(1, 9))
def test_groups(rows: int) -> None:
    # a row that ended, one that ends within the prefix, and one at its end; then rows that share nothing, and no rows
    lengths = [
        *[0, PAGE + 5, 3 * PAGE, 5 * PAGE, 4 * PAGE + 1, 3 * PAGE + 9, 4 * PAGE, 6 * PAGE][-rows:],
        7,
        0,
        2 * PAGE,
    ]
    case = make_paged(lengths, heads=(6, 2), page_size=PAGE, groups=[(rows, 3), (0, 2), (2, 0), (1, 1), (0, 0)])
    grouped = decode(case, splits=(1 + rows % 3, 1 + rows % 2))
    case.groups = None
    alone = decode(case, splits=(0, 1))
    torch.testing.assert_close(grouped, alone, rtol=0, atol=5e-6)


def test_a_group_fills_several_tiles() -> None:
    # 8 heads, so 2 rows to a tile; the first tile's rows are both shorter than the others
    lengths = [PAGE + 3, 9, *range(4 * PAGE, 4 * PAGE + 5), 0, 0, 0]
    case = make_paged(lengths, heads=(8, 1), page_size=PAGE, groups=[(10, 4)])
    decode(case, splits=(2, 1))


@settings(max_examples=10, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.lists(st.sampled_from([0, 1, 7, 8, 9, 16, 40, 57]), max_size=4), st.integers(0, 3)), max_size=4
    ),
    splits=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    heads=st.sampled_from([(1, 1), (6, 2), (5, 1)]),
    head_size=st.sampled_from([3, 16]),
    page_size=st.sampled_from([8, 16]),
    spare_columns=st.integers(0, 2),
    scale=st.sampled_from([None, 0.4]),
    seed=st.integers(0, 1000),
)
def test_any_decode(groups: list[tuple[list[int], int]], splits: tuple[int, int], **options: Any) -> None:
    lengths = [length for rows, _ in groups for length in rows]
    shared = [(len(rows), common) for rows, common in groups] or [(0, 0)]
    decode(make_paged(lengths, groups=shared, **options), splits=splits)
    decode(make_paged(lengths, **options), splits=(0, splits[1]))


@pytest.mark.parametrize(("heads", "head_size"), [((14, 2), 24), ((4, 4), 16), ((20, 1), 1)])
def test_prefill(heads: tuple[int, int], head_size: int) -> None:
    tile = TILE._replace(block_rows=32)
    new = [0, 1, KEYS - 1, 5, 2, PAGE - 1, PAGE, 1, PAGE + 5, 0]
    prefill(make_paged(LENGTHS, new=new, heads=heads, head_size=head_size, page_size=PAGE), tile)


@settings(max_examples=10, deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from([0, 1, 7, 8, 30]), st.sampled_from([0, 1, 7, 16, 17, 40])), max_size=5),
    heads=st.sampled_from([(1, 1), (6, 2), (5, 1)]),
    head_size=st.sampled_from([3, 16]),
    page_size=st.sampled_from([8, 16]),
    scale=st.sampled_from([None, 0.4]),
    seed=st.integers(0, 1000),
)
def test_any_prefill(rows: list[tuple[int, int]], **options: Any) -> None:
    prefill(make_paged([before + new for before, new in rows], new=[new for _, new in rows], **options))


def test_views_of_a_larger_memory() -> None:
    case = make_paged(LENGTHS, page_size=PAGE)
    memory = torch.stack([case.k_pages, case.v_pages], 1)
    wide = torch.stack([case.page_table, case.page_table], 2)[:, :, 0]
    view = Paged(torch.stack([case.q, case.q], 1)[:, 1], memory[:, 0], memory[:, 1], wide, case.lengths)
    assert torch.equal(decode(view, splits=(0, 2)), decode(case, splits=(0, 2)))


def test_huge_scores_and_nan() -> None:
    case = make_paged([3 * PAGE, 2 * PAGE], page_size=PAGE)
    case.q *= 1e4
    decode(case, splits=(0, 3))
    case.q[0, 0] = torch.nan
    found = paged_decode_triton(*case.arguments, None, None, 0.25, splits=(0, 3), tiles=(TILE, TILE))
    assert found[0, 0].isnan().all() and found[0, 1:].isfinite().all() and found[1].isfinite().all()


def test_splits_follow_from_shapes() -> None:
    q = torch.empty(8, 4, 16)
    assert splits_of(q, 2, 0, 10_000) == (0, 1)  # 16 programs for 3 processors are enough
    assert splits_of(q[:1], 2, 0, 10_000) == (0, 6)
    assert splits_of(q[:1], 2, 0, 300) == (0, 2)  # no more than there are keys for
    assert splits_of(q[:1], 2, 1, 10_000) == (3, 6)
    assert splits_of(q[:1], 2, 0, 0) == (0, 1)
