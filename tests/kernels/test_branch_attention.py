"""`branch_attention` as it runs on a CPU, against float64; its checks, its registration, and forward only."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coars_kernels import branch_attention
from coars_kernels.branch_attention.op import _attend
from tests.kernels.branch_cases import Branches, expected, make_branches

# Two branches of one sequence, one without a trunk, one without tokens, one of a single token.
BRANCHES = [(0, 19, 7), (0, 30, 12), (1, 0, 5), (1, 8, 0), (2, 33, 1)]


def run(case: Branches) -> torch.Tensor:
    return branch_attention(*case.arguments, scale=case.scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "head_size"), [((14, 2), 64), ((4, 4), 24), ((8, 1), 128)])
def test_equals_float64(dtype: torch.dtype, heads: tuple[int, int], head_size: int) -> None:
    case = make_branches(BRANCHES, heads=heads, head_size=head_size, dtype=dtype)
    found = run(case)
    assert found.dtype == dtype
    # the reference is the standard of the kernel, so here the bound is its own
    bound = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    largest = max(case.v.abs().max(), case.trunk_v.nan_to_num(0.0).abs().max())
    assert (found.double() - expected(case)).abs().max() <= bound * largest


@settings(max_examples=60, deadline=None)
@given(
    branches=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 25), st.integers(0, 12)), max_size=6),
    heads=st.sampled_from([(1, 1), (6, 2), (5, 5)]),
    head_size=st.sampled_from([1, 3, 24]),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 1000),
)
def test_any_branches(branches: list[tuple[int, int, int]], **options: Any) -> None:
    case = make_branches(branches, **options)
    torch.testing.assert_close(run(case).double(), expected(case), rtol=0, atol=2e-5)


def test_a_branch_does_not_depend_on_the_others_nor_on_later_tokens() -> None:
    case = make_branches(BRANCHES)
    found = run(case)
    case.k[7:19], case.v[7:19] = torch.nan, torch.nan  # all of the second branch
    again = run(case)
    assert again[7:19].isnan().all() and torch.equal(found[:7], again[:7]) and torch.equal(found[19:], again[19:])
    case = make_branches(BRANCHES)
    case.k[5:7], case.v[5:7] = 7.0, 70.0  # the end of the first one
    again = run(case)
    assert torch.equal(found[:5], again[:5]) and not torch.equal(found[5:7], again[5:7])


def test_nothing_to_do() -> None:
    assert run(make_branches([])).shape == (0, 4, 16)
    assert run(make_branches([(0, 3, 0), (1, 0, 0)])).shape == (0, 4, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(_attend, (*make_branches([(0, 9, 3), (0, 4, 2), (1, 0, 1)], dtype=dtype).arguments, 0.3))


def test_compiles_without_a_break() -> None:
    torch.compiler.reset()
    compiled = torch.compile(branch_attention, fullgraph=True, backend="aot_eager")
    for branches in ([(0, 9, 3), (1, 4, 2)], [(0, 9, 1), (0, 3, 4), (1, 0, 7)]):
        case = make_branches(branches)
        assert torch.equal(compiled(*case.arguments), run(case))


def test_a_backward_pass_is_an_error() -> None:
    case = make_branches([(0, 3, 2)])
    with pytest.raises(RuntimeError, match="autograd"):
        branch_attention(case.q.requires_grad_(), *case.arguments[1:]).sum().backward()


def int32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(6, 4)}, "q: expected"),
        ({"q": torch.zeros(6, 4, 16, dtype=torch.int64)}, "q: expected dtype"),
        ({"q": torch.zeros(6, 5, 16)}, "q: 5 heads are no multiple of k's 2"),
        ({"q": torch.zeros(6, 4, 300)}, "q: head size must be 1 to 256, got 300"),
        ({"q": torch.zeros(6, 4, 8)}, "k: expected shape"),
        ({"k": torch.zeros(5, 2, 16)}, "k: expected shape"),
        ({"v": torch.zeros(6, 1, 16)}, "v: expected shape"),
        ({"v": torch.zeros(6, 2, 16).half()}, "v: expected q's dtype"),
        ({"trunk_k": torch.zeros(9, 1, 16)}, "trunk_k: expected shape"),
        ({"trunk_v": torch.zeros(8, 2, 16)}, "trunk_v: expected shape"),
        ({"cu_branch": int32(0, 6)}, "cu_branch: expected shape"),
        ({"cu_branch": torch.tensor([0, 2, 6])}, "cu_branch: expected dtype"),
        ({"cu_branch": int32(0, 2, 5)}, "cu_branch: must run from 0 to NB = 6, got 0..5"),
        ({"cu_branch": int32(0, 7, 6)}, "cu_branch: must not descend"),
        ({"trunk_start": int32(-1, 4)}, "trunk_start: values must lie in"),
        ({"trunk_len": int32(3)}, "trunk_len: expected shape"),
        ({"trunk_len": int32(3, 6)}, "trunk_len: branch 1 reads trunk rows 4..9, but there are 9"),
        ({"scale": 0.0}, "scale: must be finite and above 0, got 0.0"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    case = {
        "q": torch.zeros(6, 4, 16), "k": torch.zeros(6, 2, 16), "v": torch.zeros(6, 2, 16),
        "trunk_k": torch.zeros(9, 2, 16), "trunk_v": torch.zeros(9, 2, 16), "cu_branch": int32(0, 2, 6),
        "trunk_start": int32(0, 4), "trunk_len": int32(3, 5),
    }  # fmt: skip
    branch_attention(**case)
    with pytest.raises(ValueError, match=f"^{message}"):
        branch_attention(**(case | change))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "head_size"), [((28, 4), 128), ((16, 8), 128), ((14, 2), 64), ((4, 2), 256)])
def test_on_a_gpu(dtype: torch.dtype, heads: tuple[int, int], head_size: int) -> None:
    from tests.kernels.branch_cases import assert_accurate

    branches = [(0, 300, 65), (0, 511, 130), (1, 0, 40), (1, 64, 1), (2, 1000, 270), (2, 63, 0)]
    case = make_branches(branches, heads=heads, head_size=head_size, dtype=dtype)
    found = branch_attention(*case.to("cuda").arguments).cpu()
    assert_accurate(found, case, run(case))
