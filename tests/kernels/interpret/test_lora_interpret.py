"""The Triton kernels of `agent_lora` in the interpreter against float64, with rows, inputs and outputs that outgrow
their tiles."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coars_kernels.agent_lora import triton_lora
from coars_kernels.agent_lora.triton_lora import agent_lora_triton, splits_of
from tests.kernels.credit_cases import poisoned_memory
from tests.kernels.lora_cases import Lora, assert_accurate, make_lora

STEP = 16


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton_lora, "STEP_BYTES", 4 * STEP)
    monkeypatch.setattr(triton_lora, "OUT_BYTES", 4 * STEP)
    with poisoned_memory():
        yield


def check(case: Lora) -> Tensor:
    found = agent_lora_triton(*case)
    assert_accurate(found, case)
    return found


@settings(max_examples=30, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 5, 16, 17, 40]),
    inputs=st.sampled_from([1, STEP - 1, STEP, 7 * STEP + 3]),
    rank=st.sampled_from([1, 3, 16, 20]),
    outputs=st.sampled_from([1, STEP, 3 * STEP + 5]),
    agents=st.integers(1, 3),
    ids=st.sampled_from([torch.int8, torch.int32, torch.int64]),
    seed=st.integers(0, 1000),
)
def test_any_sizes(rows: int, inputs: int, rank: int, outputs: int, agents: int, ids: torch.dtype, seed: int) -> None:
    case = make_lora(rows, (inputs, rank, outputs), agents=agents, seed=seed)
    check(case._replace(agent_ids=case.agent_ids.to(ids)))


@pytest.mark.parametrize("processors", [1, 3, 132])
def test_any_number_of_splits(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_lora, "num_processors", lambda device: processors)
    case = make_lora(7, (9 * STEP, 4, 10))
    splits, size = splits_of(case.x, 2, STEP)
    assert (splits, size) == {1: (1, 9 * STEP), 3: (3, 3 * STEP), 132: (9, STEP)}[processors]
    check(case)


def test_ids_that_name_no_adapter() -> None:
    case = make_lora(6, (20, 4, 10))
    ids = torch.tensor([0, 2**32, -1, 2, 1 - 2**32, -(2**63)])
    found = check(case._replace(agent_ids=ids))
    assert found[0].any() and not found[1:].any()


def test_foreign_values_are_not_added() -> None:
    case = make_lora(20, (3 * STEP, 4, 10))
    ids = torch.arange(20) % 3 - 1
    whole = check(case._replace(agent_ids=ids))
    case.x[ids == -1] = torch.nan
    for factor in (case.a, case.b):
        broken = factor.clone()
        broken[1] = torch.nan
        given = case._replace(agent_ids=ids, **{"a" if factor is case.a else "b": broken})
        found = agent_lora_triton(*given)
        assert torch.equal(found[ids != 1], whole[ids != 1]) and found[ids == 1].isnan().all()


def test_rows_and_factors_may_lie_anywhere() -> None:
    case = make_lora(12, (2 * STEP, 4, 10))
    twice = torch.stack([case.agent_ids, case.agent_ids], 1)[:, 0]
    for x in (torch.cat([case.x, case.x], 1)[:, : 2 * STEP], case.x.T.contiguous().T):
        strided = [factor.transpose(1, 2).contiguous().transpose(1, 2) for factor in (case.a, case.b)]
        assert torch.equal(check(Lora(x, *strided, twice)), check(case))
