"""Both paged operations on a GPU, where their Triton kernels run, against float64 on the CPU."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from coars_kernels import PrefixGroups, paged_decode_attention, paged_prefill_attention
from coars_kernels.checks import checked_values
from coars_kernels.paged_decode_attention.reference import paged_decode_attention_reference
from coars_kernels.paged_prefill_attention.reference import paged_prefill_attention_reference
from tests.kernels.credit_cases import poisoned_memory
from tests.kernels.paged_cases import Paged, assert_accurate, make_paged

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (query heads, kv heads), head size: Qwen2.5-7B, Qwen3-8B and 0.6B, Gemma, Qwen2.5-0.5B, the tiny base, many to one.
HEADS = [((28, 4), 128), ((32, 8), 128), ((16, 8), 128), ((8, 4), 256), ((14, 2), 64), ((4, 4), 24), ((32, 1), 96)]
LENGTHS = [0, 1, 63, 64, 65, 255, 256, 257, 1500, 0]


def on_gpu(case: Paged) -> Tensor:
    operation = paged_decode_attention if case.cu_q is None else paged_prefill_attention
    there = case.to("cuda")
    with poisoned_memory():
        found, again = (operation(*there.arguments, **there.options).cpu() for _ in range(2))
    assert torch.equal(found, again)
    return found


def check(case: Paged) -> Tensor:
    found = on_gpu(case)
    reference = paged_decode_attention_reference if case.cu_q is None else paged_prefill_attention_reference
    assert_accurate(found, case, reference(*case.arguments, **case.options))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_size"), HEADS)
def test_decode(dtype: torch.dtype, heads: tuple[int, int], head_size: int) -> None:
    check(make_paged(LENGTHS, heads=heads, head_size=head_size, page_size=256, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_size"), HEADS)
def test_prefill(dtype: torch.dtype, heads: tuple[int, int], head_size: int) -> None:
    new = [0, 1, 63, 2, 65, 100, 256, 1, 300, 0]
    check(make_paged(LENGTHS, new=new, heads=heads, head_size=head_size, page_size=256, dtype=dtype))


@pytest.mark.parametrize("page_size", [1, 16, 24, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_page_sizes(dtype: torch.dtype, page_size: int) -> None:
    lengths = [0, 1, 63, 64, 65, 200]
    check(make_paged(lengths, head_size=64, page_size=page_size, dtype=dtype, groups=[(2, 0), (4, 1)]))
    check(make_paged(lengths, head_size=64, page_size=page_size, dtype=dtype, new=[0, 1, 20, 64, 1, 150]))


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize(("heads", "head_size"), HEADS)
def test_groups(rows: int, heads: tuple[int, int], head_size: int) -> None:
    lengths = [*[0, 256, 900, 700, 512, 640, 1030, 600][-rows:], 7, 0, 300]
    shared = [(rows, 2), (0, 3), (2, 0), (1, 1), (0, 0)]
    case = make_paged(lengths, heads=heads, head_size=head_size, page_size=256, dtype=torch.bfloat16, groups=shared)
    grouped, alone = check(case), check(replace(case, groups=None))
    torch.testing.assert_close(grouped, alone, rtol=2**-7, atol=2**-8)


def test_groups_that_fill_several_tiles() -> None:
    lengths = [300 + 11 * row for row in range(40)] + [5] * 3
    check(
        make_paged(lengths, heads=(28, 4), head_size=128, page_size=256, dtype=torch.bfloat16, groups=[(40, 1), (3, 0)])
    )


def test_pages_may_be_a_view_of_a_larger_memory() -> None:
    case = make_paged(LENGTHS, heads=(28, 4), head_size=128, page_size=256, dtype=torch.bfloat16)
    memory = torch.stack([case.k_pages, case.v_pages], 1).cuda()
    there = case.to("cuda")
    found = paged_decode_attention(there.q, memory[:, 0], memory[:, 1], *there.arguments[3:])
    assert torch.equal(found.cpu(), on_gpu(case))


def test_a_graph_follows_lengths_pages_and_groups() -> None:
    first = make_paged([0, 600, 700, 90, 5], page_size=256, groups=[(1, 0), (2, 2), (2, 0)], dtype=torch.bfloat16)
    cases = [
        make_paged([513, 700, 0, 800, 801], page_size=256, groups=[(2, 1), (1, 0), (2, 3)], spare_columns=1, seed=1),
        make_paged([0, 0, 0, 0, 1], page_size=256, groups=[(5, 0), (0, 0), (0, 0)], spare_columns=4, seed=2),
        first,
    ]
    pages = max(len(case.k_pages) for case in cases)
    columns = max(case.page_table.shape[1] for case in cases)

    def padded(case: Paged) -> Paged:
        case = case.to(torch.bfloat16)
        empty = case.k_pages.new_full((pages - len(case.k_pages), *case.k_pages.shape[1:]), torch.nan)
        table = case.page_table.new_full((5, columns), -1)
        table[:, : case.page_table.shape[1]] = case.page_table
        more = {name: torch.cat([getattr(case, name), empty]) for name in ("k_pages", "v_pages")}
        return replace(case, page_table=table, **more)

    static = padded(first).to("cuda")
    assert static.groups is not None
    paged_decode_attention(*static.arguments, **static.options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_decode_attention(*static.arguments, **static.options)
    for case in map(padded, cases):
        assert case.groups is not None
        for mine, theirs in zip(static.arguments, case.arguments, strict=True):
            mine.copy_(theirs)
        for name in ("row_offsets", "prefix_length"):
            getattr(static.groups, name).copy_(getattr(case.groups, name))
        out.fill_(torch.nan)
        graph.replay()
        assert_accurate(out.cpu(), case, paged_decode_attention_reference(*case.arguments))


@pytest.mark.parametrize("new", [None, [1, 5, 64]])
def test_does_not_wait_for_the_device(new: list[int] | None) -> None:
    groups = [(3, 0)] if new is None else None
    case = make_paged([10, 300, 64], page_size=64, new=new, groups=groups).to("cuda")
    operation = paged_decode_attention if new is None else paged_prefill_attention
    operation(*case.arguments, **case.options)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        operation(*case.arguments, **case.options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles_without_a_break() -> None:
    case = make_paged([10, 300, 64], page_size=64, groups=[(2, 0), (1, 1)]).to("cuda")
    compiled = torch.compile(paged_decode_attention, fullgraph=True)
    assert torch.equal(
        compiled(*case.arguments, **case.options), paged_decode_attention(*case.arguments, **case.options)
    )
    case = make_paged([10, 300, 64], page_size=64, new=[3, 4, 64]).to("cuda")
    compiled = torch.compile(paged_prefill_attention, fullgraph=True)
    assert torch.equal(compiled(*case.arguments), paged_prefill_attention(*case.arguments))


def test_more_than_2_to_the_31_numbers() -> None:
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free device memory")
    small = make_paged([600, 300], heads=(28, 4), head_size=128, page_size=256, dtype=torch.bfloat16)
    num_pages = 2**31 // (256 * 4 * 128) + 8
    there, far = small.to("cuda"), num_pages - len(small.k_pages)
    k_pages = torch.full((num_pages, 256, 4, 128), torch.nan, dtype=torch.bfloat16, device="cuda")
    v_pages = k_pages.clone()
    k_pages[far:], v_pages[far:] = there.k_pages, there.v_pages
    table = torch.where(there.page_table < len(small.k_pages), there.page_table + far, -1)
    assert far * k_pages.stride(0) > 2**30 and num_pages * k_pages.stride(0) > 2**31
    found = paged_decode_attention(there.q, k_pages, v_pages, table, there.lengths)
    assert torch.equal(found.cpu(), on_gpu(small))
    bounds = torch.tensor([0, 1, 2], dtype=torch.int32, device="cuda")
    prefill = paged_prefill_attention(there.q, k_pages, v_pages, table, bounds, there.lengths)
    reference = paged_prefill_attention_reference(*small.arguments[:4], bounds.cpu(), small.lengths)
    assert_accurate(prefill.cpu(), small, reference)


def test_values_are_checked_on_request() -> None:
    case = make_paged([5, 9], page_size=4).to("cuda")
    case.page_table[1, 0] = 99
    with checked_values(), pytest.raises(ValueError, match="^page_table: row 1 needs its page 0, which is 99"):
        paged_decode_attention(*case.arguments)
    groups = PrefixGroups(*(torch.tensor(values, dtype=torch.int32, device="cuda") for values in ([0, 1], [0])))
    with checked_values(), pytest.raises(ValueError, match="^prefix_groups.row_offsets: must run"):
        paged_decode_attention(*make_paged([5, 9], page_size=4).to("cuda").arguments, prefix_groups=groups)
