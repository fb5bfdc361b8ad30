"""`paged_decode_attention` as it runs on a CPU, against float64; its checks, its registration, and forward only."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coars_kernels import PrefixGroups, paged_decode_attention, paged_prefill_attention
from coars_kernels.paged_decode_attention import reference
from coars_kernels.paged_decode_attention.op import _attend
from coars_kernels.paged_decode_attention.reference import paged_decode_attention_reference
from tests.kernels.paged_cases import Paged, assert_accurate, expected, make_paged

PAGE = 8
# No key, one, and a page's end before, on and behind it.
LENGTHS = [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 5 * PAGE + 3, 0]


def run(case: Paged) -> torch.Tensor:
    return paged_decode_attention(*case.arguments, **case.options)


def check(case: Paged) -> None:
    assert_accurate(run(case), case, paged_decode_attention_reference(*case.arguments, **case.options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "head_size"), [((14, 2), 64), ((4, 4), 24), ((8, 1), 128), ((2, 1), 256)])
def test_equals_float64(dtype: torch.dtype, heads: tuple[int, int], head_size: int) -> None:
    case = make_paged(LENGTHS, heads=heads, head_size=head_size, page_size=PAGE, dtype=dtype)
    exact, found = expected(case), run(case).double()
    # the reference is the standard of the kernels, so here the bound is its own
    bound = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert (found - exact).abs().max() <= bound * case.v_pages.nan_to_num(0.0).abs().max()
    assert not found[0].any() and not found[-1].any()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=7),
    page_size=st.sampled_from([1, 2, 7, 16]),
    heads=st.sampled_from([(1, 1), (6, 2), (5, 5)]),
    head_size=st.sampled_from([1, 3, 24]),
    spare_columns=st.integers(0, 3),
    scale=st.sampled_from([None, 0.3]),
    block=st.sampled_from([1, 500, 2**18]),
    seed=st.integers(0, 1000),
)
def test_any_layout(lengths: list[int], block: int, **options: Any) -> None:
    case = make_paged(lengths, **options)
    whole, reference.BLOCK_NUMBERS = reference.BLOCK_NUMBERS, block
    try:
        torch.testing.assert_close(run(case).double(), expected(case), rtol=0, atol=2e-5)
    finally:
        reference.BLOCK_NUMBERS = whole


@pytest.mark.parametrize("rows", range(1, 9))
def test_groups_change_nothing(rows: int) -> None:
    lengths = [4 * PAGE + 3 * row for row in range(rows)] + [5, 2 * PAGE, 0]
    case = make_paged(lengths, page_size=PAGE, groups=[(rows, 3), (1, 0), (2, 1)])
    assert torch.equal(run(case), paged_decode_attention(*case.arguments))
    check(case)


def test_pages_may_be_a_view_of_a_larger_memory() -> None:
    case = make_paged(LENGTHS, page_size=PAGE)
    memory = torch.stack([case.k_pages, case.v_pages], 1)  # [P, 2, page, Hkv, D]
    view = Paged(case.q, memory[:, 0], memory[:, 1], case.page_table, case.lengths)
    assert not view.k_pages.is_contiguous() and torch.equal(run(view), run(case))
    strided = torch.stack([case.q, case.q], 1)[:, 1]
    assert torch.equal(paged_decode_attention(strided, *case.arguments[1:]), run(case))


def test_a_row_does_not_depend_on_the_others() -> None:
    case = make_paged([20, 3, 33], page_size=PAGE)
    found = run(case)
    case.k_pages[case.page_table[1, 0].long()] = torch.nan
    again = run(case)
    assert again[1].isnan().all() and torch.equal(found[[0, 2]], again[[0, 2]])


def test_nothing_to_do() -> None:
    assert run(make_paged([])).shape == (0, 4, 16)
    assert not run(make_paged([0, 0], spare_columns=0)).any()


def test_is_a_prefill_of_one_token() -> None:
    case = make_paged(LENGTHS[1:-1], page_size=PAGE)
    bounds = torch.arange(len(case.lengths) + 1).int()
    prefill = paged_prefill_attention(*case.arguments[:4], bounds, case.lengths)
    torch.testing.assert_close(run(case), prefill, rtol=0, atol=2e-6)


# ------------------------------------------------------------------------------------------------------- registration


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    case = make_paged([9, 9, 0, 3], page_size=4, dtype=dtype, groups=[(2, 2), (2, 0)])
    assert case.groups is not None
    torch.library.opcheck(_attend, (*case.arguments, None, None, 0.3))
    torch.library.opcheck(_attend, (*case.arguments, case.groups.row_offsets, case.groups.prefix_length, 0.3))


def test_compiles_without_a_break() -> None:
    torch.compiler.reset()
    compiled = torch.compile(paged_decode_attention, fullgraph=True, backend="aot_eager")
    for lengths, groups in (([9, 9, 0], [(2, 2), (1, 0)]), ([1, 5, 40, 8], [(4, 0)]), ([1, 5, 40, 8, 2], None)):
        case = make_paged(lengths, groups=groups)
        assert torch.equal(compiled(*case.arguments, **case.options), run(case))


def test_a_backward_pass_is_an_error() -> None:
    case = make_paged([3])
    with pytest.raises(RuntimeError, match="autograd"):
        paged_decode_attention(case.q.requires_grad_(), *case.arguments[1:]).sum().backward()


# --------------------------------------------------------------------------------------------------------------- checks

Change = dict[str, Any]


def int32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 4)}, "q: expected"),
        ({"q": torch.zeros(3, 4, 16, dtype=torch.float64)}, "q: expected dtype"),
        ({"q": torch.zeros(2, 4, 16)}, "q: 2 rows, but page_table has 3"),
        ({"q": torch.zeros(3, 5, 16)}, "q: 5 heads are no multiple of the 2"),
        ({"q": torch.zeros(3, 4, 300)}, "q: head size must be 1 to 256, got 300"),
        ({"q": torch.zeros(3, 4, 8)}, "k_pages: head size 16, but q's is 8"),
        ({"k_pages": torch.zeros(9, 4, 16)}, "k_pages: expected"),
        ({"k_pages": torch.zeros(9, 0, 2, 16)}, "k_pages: no slots"),
        ({"v_pages": torch.zeros(9, 4, 1, 16)}, "v_pages: expected shape"),
        ({"v_pages": torch.zeros(9, 4, 2, 16).bfloat16()}, "v_pages: expected q's dtype"),
        ({"v_pages": torch.zeros(4, 9, 2, 16).transpose(0, 1)}, "v_pages: expected the strides of k_pages"),
        ({"k_pages": torch.zeros(9, 4, 16, 2).transpose(2, 3)}, "k_pages: numbers of one head"),
        ({"k_pages": torch.zeros(9, 4, 2, 16, device="meta")}, "k_pages: on meta"),
        ({"page_table": torch.zeros(3, dtype=torch.int32)}, "page_table: expected"),
        ({"page_table": torch.zeros(3, 4)}, "page_table: expected dtype"),
        ({"page_table": int32([0, 1], [2, 3], [9, 0])}, "page_table: row 2 needs its page 0, which is 9, outside 0..8"),
        ({"page_table": int32([0, -1], [2, 3], [1, 0])}, "page_table: row 0 needs its page 1, which is -1"),
        ({"lengths": int32(1, 2)}, "lengths: expected shape"),
        ({"lengths": torch.tensor([1, 2, 3])}, "lengths: expected dtype"),
        ({"lengths": int32(1, 9, 1)}, "lengths: values must lie in"),
        ({"lengths": int32(1, -1, 1)}, "lengths: values must lie in"),
        ({"scale": 0.0}, "scale: must be finite and above 0, got 0.0"),
        ({"scale": float("nan")}, "scale: must be finite"),
    ],
)
def test_bad_arguments(change: Change, message: str) -> None:
    case: Change = {
        "q": torch.zeros(3, 4, 16), "k_pages": torch.zeros(9, 4, 2, 16), "v_pages": torch.zeros(9, 4, 2, 16),
        "page_table": int32([0, 1], [2, 3], [4, 5]), "lengths": int32(5, 8, 1),
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"^{message}"):
        paged_decode_attention(**(case | change))


@pytest.mark.parametrize(
    ("offsets", "prefixes", "message"),
    [
        (int32(0, 2, 3), int32(4), "row_offsets: expected shape"),
        (int32(0), int32(), "prefix_length: no groups"),
        (int32([0, 3]), int32(4), "row_offsets: expected one dimension"),
        (torch.tensor([0, 3]), int32(4), "row_offsets: expected dtype"),
        (int32(0, 2), int32(4), "row_offsets: must run from 0 to B = 3 without descending, got 0..2"),
        (int32(1, 3), int32(4), "row_offsets: must run from 0"),
        (int32(0, 2, 1, 3), int32(4, 0, 0), "row_offsets: must run from 0"),
        (int32(0, 3), int32(3), "prefix_length: group 0: 3 is no multiple of 4"),
        (int32(0, 1, 3), int32(0, -4), "prefix_length: group 1: -4"),
        (int32(0, 3), int32(8), "prefix_length: group 0: rows differ within their first 8 keys"),
        (int32(0, 2, 3), int32(8, 0), ""),  # the second row is so short that they agree
        (int32(0, 2, 2, 3), int32(4, 8, 0), ""),
    ],
)
def test_bad_groups(offsets: torch.Tensor, prefixes: torch.Tensor, message: str) -> None:
    pages, table = torch.zeros(9, 4, 2, 16), int32([0, 1, 2], [0, -1, -1], [0, 3, 4])
    call = {"lengths": int32(9, 4, 9), "prefix_groups": PrefixGroups(offsets, prefixes)}
    if message:
        with pytest.raises(ValueError, match=rf"^prefix_groups\.{message}"):
            paged_decode_attention(torch.zeros(3, 4, 16), pages, pages, table, **call)
    else:
        paged_decode_attention(torch.zeros(3, 4, 16), pages, pages, table, **call)
