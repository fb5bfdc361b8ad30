"""`paged_prefill_attention` as it runs on a CPU, against float64; its checks, its registration, and forward only."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coars_kernels import paged_prefill_attention
from coars_kernels.paged_prefill_attention import reference
from coars_kernels.paged_prefill_attention.op import _attend
from tests.kernels.paged_cases import Paged, expected, make_paged

PAGE = 8
# A whole prompt, an extend, one token, none, none of an empty sequence, and a page's end before, on and behind it.
LENGTHS = [19, 30, 12, 5, 0, PAGE - 1, PAGE, PAGE + 1]
NEW = [19, 7, 1, 0, 0, 3, PAGE, 2]


def run(case: Paged) -> torch.Tensor:
    return paged_prefill_attention(*case.arguments, **case.options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "head_size"), [((14, 2), 64), ((4, 4), 24), ((8, 1), 128)])
def test_equals_float64(dtype: torch.dtype, heads: tuple[int, int], head_size: int) -> None:
    case = make_paged(LENGTHS, new=NEW, heads=heads, head_size=head_size, page_size=PAGE, dtype=dtype)
    exact, found = expected(case), run(case).double()
    bound = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert (found - exact).abs().max() <= bound * case.v_pages.nan_to_num(0.0).abs().max()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=7),
    page_size=st.sampled_from([1, 7, 16]),
    heads=st.sampled_from([(1, 1), (6, 2), (5, 5)]),
    head_size=st.sampled_from([1, 3, 24]),
    scale=st.sampled_from([None, 0.3]),
    block=st.sampled_from([1, 500, 2**18]),
    seed=st.integers(0, 1000),
)
def test_any_layout(rows: list[tuple[int, int]], block: int, **options: Any) -> None:
    case = make_paged([before + new for before, new in rows], new=[new for _, new in rows], **options)
    whole, reference.BLOCK_NUMBERS = reference.BLOCK_NUMBERS, block
    try:
        torch.testing.assert_close(run(case).double(), expected(case), rtol=0, atol=2e-5)
    finally:
        reference.BLOCK_NUMBERS = whole


def test_a_prompt_in_pieces_is_the_whole_prompt() -> None:
    case = make_paged([29], new=[29], page_size=PAGE)
    whole, pieces = run(case), []
    for first, last in ((0, 10), (10, 11), (11, 29)):
        bounds, lengths = torch.tensor([0, last - first]).int(), torch.tensor([last]).int()
        pieces.append(paged_prefill_attention(case.q[first:last], *case.arguments[1:4], bounds, lengths))
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=2e-6)


def test_later_tokens_are_not_seen() -> None:
    case = make_paged([17], new=[17], page_size=PAGE)
    found = run(case)
    page = case.page_table[0, 1].long()
    case.k_pages[page, 1:], case.v_pages[page, 1:] = 7.0, 70.0  # keys from 9 on
    again = run(case)
    assert torch.equal(found[:9], again[:9]) and not torch.equal(found[9], again[9])


def test_nothing_to_do() -> None:
    assert run(make_paged([], new=[])).shape == (0, 4, 16)
    assert run(make_paged([0, 3], new=[0, 0])).shape == (0, 4, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    case = make_paged([9, 4, 0], new=[3, 4, 0], dtype=dtype)
    torch.library.opcheck(_attend, (*case.arguments, 0.3))


def test_compiles_without_a_break() -> None:
    torch.compiler.reset()
    compiled = torch.compile(paged_prefill_attention, fullgraph=True, backend="aot_eager")
    for lengths, new in (([9, 4, 2], [3, 4, 1]), ([9, 4, 0, 7], [1, 2, 0, 7])):
        case = make_paged(lengths, new=new)
        assert torch.equal(compiled(*case.arguments), run(case))


def test_a_backward_pass_is_an_error() -> None:
    case = make_paged([3], new=[2])
    with pytest.raises(RuntimeError, match="autograd"):
        paged_prefill_attention(case.q.requires_grad_(), *case.arguments[1:]).sum().backward()


def int32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(6, 5, 16)}, "q: 5 heads are no multiple of the 2"),
        ({"cu_q": int32(0, 6)}, "cu_q: expected shape"),
        ({"cu_q": torch.tensor([0, 2, 6])}, "cu_q: expected dtype"),
        ({"cu_q": int32(0, 2, 5)}, "cu_q: must run from 0 to N = 6, got 0..5"),
        ({"cu_q": int32(1, 2, 6)}, "cu_q: must run from 0 to N = 6, got 1..6"),
        ({"cu_q": int32(0, 7, 6)}, "cu_q: must not descend"),
        ({"lengths": int32(8, 3)}, "lengths: sequence 1 has 4 new tokens, but 3 keys in all"),
        ({"lengths": int32(9, 4)}, "lengths: values must lie in"),
        ({"page_table": int32([0, 1], [99, 3])}, "page_table: row 1 needs its page 0, which is 99"),
        ({"scale": -1.0}, "scale: must be finite and above 0, got -1.0"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    case = {
        "q": torch.zeros(6, 4, 16), "k_pages": torch.zeros(9, 4, 2, 16), "v_pages": torch.zeros(9, 4, 2, 16),
        "page_table": int32([0, 1], [2, 3]), "cu_q": int32(0, 2, 6), "lengths": int32(5, 8),
    }  # fmt: skip
    paged_prefill_attention(**case)
    with pytest.raises(ValueError, match=f"^{message}"):
        paged_prefill_attention(**(case | change))
