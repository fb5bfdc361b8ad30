"""The Triton kernel of `branch_attention` in the interpreter against float64, with tiles that branches outgrow."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coars_kernels.branch_attention import triton_branch
from coars_kernels.branch_attention.reference import branch_attention_reference
from coars_kernels.branch_attention.triton_branch import branch_attention_triton
from coars_kernels.paged_decode_attention.triton_paged import Tile
from tests.kernels.branch_cases import Branches, assert_accurate, make_branches

KEYS = 16
TILE = Tile(16, KEYS, 4, 3)
# No trunk, a block's end before, on and behind it, several blocks; no tokens, one, some, and more than a tile has.
EVERY = [
    (0, 0, 5), (0, KEYS - 1, 1), (0, KEYS, 0), (1, KEYS + 1, 7), (2, 3 * KEYS, KEYS),
    (2, 2 * KEYS + 5, 2 * KEYS + 3),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors are full of NaN: what the kernel does not write shows up."""
    empty = torch.empty

    def poisoned(*shape: Any, **options: Any) -> Tensor:
        made = empty(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(triton_branch.torch, "empty", poisoned)


def launch(case: Branches, tile: Tile = TILE) -> Tensor:
    scale = case.q.shape[2] ** -0.5 if case.scale is None else case.scale
    found = branch_attention_triton(*case.arguments, scale, tile=tile)
    assert_accurate(found, case, branch_attention_reference(*case.arguments, scale=scale))
    return found


@pytest.mark.parametrize(("heads", "head_size"), [((14, 2), 24), ((4, 4), 16), ((20, 1), 64), ((3, 1), 1)])
def test_every_kind_of_branch(heads: tuple[int, int], head_size: int) -> None:
    launch(make_branches(EVERY, heads=heads, head_size=head_size), TILE._replace(block_rows=32))


@settings(max_examples=20, deadline=None)
@given(
    branches=st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 7, 16, 17, 40]), st.sampled_from([0, 1, 5, 8, 30])),
        max_size=5,
    ),
    heads=st.sampled_from([(1, 1), (6, 2), (5, 1)]),
    head_size=st.sampled_from([3, 16]),
    scale=st.sampled_from([None, 0.4]),
    seed=st.integers(0, 1000),
)
def test_any_branches(branches: list[tuple[int, int, int]], **options: Any) -> None:
    launch(make_branches(branches, **options))


def test_views_of_a_larger_memory() -> None:
    case = make_branches(EVERY)
    wide = torch.cat([case.k, case.v], 1)  # [NB, 2 Hkv, D], as one projection leaves them
    trunk = torch.stack([case.trunk_k, case.trunk_v], 1)
    view = Branches(
        torch.stack([case.q, case.q], 1)[:, 1], wide[:, :2], wide[:, 2:], trunk[:, 0], trunk[:, 1], case.cu_branch,
        case.trunk_start, case.trunk_len,
    )  # fmt: skip
    assert torch.equal(launch(view), launch(case))
    view.v = case.v  # other strides than k's
    assert torch.equal(launch(view), launch(case))


def test_huge_scores_and_nan() -> None:
    case = make_branches(EVERY)
    case.q *= 1e4
    launch(case)
    case.q[0, 0] = torch.nan
    found = branch_attention_triton(*case.arguments, 0.25, tile=TILE)
    assert found[0, 0].isnan().all() and found[0, 1:].isfinite().all() and found[1:].isfinite().all()
