"""`agent_lora` against one adapter at a time, and its refusals."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coars_kernels import AgentRows, agent_lora
from coars_kernels.agent_lora import op
from coars_kernels.agent_lora.reference import agent_lora_reference
from tests.kernels.lora_cases import assert_accurate, make_lora


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 12),
    agents=st.integers(1, 3),
    rank=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    dtype=st.sampled_from([torch.int8, torch.int64]),
    seed=st.integers(0, 1000),
)
def test_equals_one_adapter_at_a_time(
    rows: int, agents: int, rank: int, sizes: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, sizes[0], generator=generator, dtype=torch.float64)
    a = torch.randn(agents, rank, sizes[0], generator=generator, dtype=torch.float64)
    b = torch.randn(agents, sizes[1], rank, generator=generator, dtype=torch.float64)
    ids = torch.randint(-1, agents + 1, (rows,), generator=generator).to(dtype)
    results = []
    for function in (agent_lora, agent_lora_reference):
        leaves = x.clone().requires_grad_(), a.clone().requires_grad_(), b.clone().requires_grad_()
        out = function(*leaves, ids, 1.7)
        out.sin().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_rows_without_an_adapter_are_exactly_zero() -> None:
    x = torch.randn(4, 5)
    x[1] = torch.nan
    out = agent_lora(x, torch.randn(2, 3, 5), torch.randn(2, 6, 3), torch.tensor([0, -1, 1, 2], dtype=torch.int8), 2.0)
    assert not out[1].any() and not out[3].any() and out[[0, 2]].isfinite().all() and out[[0, 2]].any()


def test_bf16_keeps_its_dtype() -> None:
    x, a, b = torch.randn(4, 5), torch.randn(2, 3, 5), torch.randn(2, 6, 3)
    ids = torch.tensor([0, 1, 1, -1])
    out = agent_lora(x.bfloat16(), a.bfloat16(), b.bfloat16(), ids, 0.5)
    assert out.dtype == torch.bfloat16
    expected = agent_lora_reference(x.bfloat16().float(), a.bfloat16().float(), b.bfloat16().float(), ids, 0.5)
    # two roundings, of the middle and of the result
    assert (out.float() - expected).norm() <= 2 * torch.finfo(torch.bfloat16).eps * expected.norm()


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("x", {"x": torch.zeros(1, 4, 5)}),
        ("a", {"a": torch.zeros(2, 3, 4)}),
        ("a", {"a": torch.zeros(3, 5)}),
        ("a", {"a": torch.zeros(2, 3, 5, dtype=torch.float64)}),
        ("b", {"b": torch.zeros(2, 6, 4)}),
        ("b", {"b": torch.zeros(3, 6, 3)}),
        ("agent_ids", {"agent_ids": torch.zeros(3, dtype=torch.int8)}),
        ("agent_ids", {"agent_ids": torch.zeros(4)}),
        ("agent_ids", {"agent_ids": torch.zeros(4, dtype=torch.uint8)}),
    ],
)
def test_errors_name_the_argument(argument: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(4, 5),
        "a": torch.zeros(2, 3, 5),
        "b": torch.zeros(2, 6, 3),
        "agent_ids": torch.zeros(4, dtype=torch.int8),
        "scale": 1.0,
    }
    agent_lora(**arguments)
    with pytest.raises(ValueError, match=f"^{argument}: "):
        agent_lora(**(arguments | change))


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (7, 5), (2, 3, 5), (2, 6, 3)
    return tuple(torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_prepared_rows_give_the_same_bits(dtype: torch.dtype) -> None:
    ids = torch.tensor([0, 1, -1, 1, 0, 5, 1], dtype=torch.int8)
    rows = AgentRows(ids, 2)
    found = []
    for agent_ids in (ids, rows, rows):
        leaves = inputs(dtype)
        out = agent_lora(*leaves, agent_ids, 2.0)
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
        with torch.no_grad():
            assert torch.equal(agent_lora(*leaves, agent_ids, 2.0), out)
    assert all(torch.equal(one, other) for again in found[1:] for one, other in zip(found[0], again, strict=True))
    assert rows.mask(3, dtype.itemsize) is rows.mask(3, dtype.itemsize)


def test_a_broken_adapter_stays_with_its_agent() -> None:
    x, a, b = (leaf.detach() for leaf in inputs())
    a[1, 0] = torch.nan
    ids = torch.tensor([0, 1, 0, 1, 0, 0, -1])
    broken = agent_lora(x, a, b, ids, 1.0)
    assert torch.equal(broken.isnan().any(1), ids == 1) and not broken[6].any()


def test_prepared_for_another_number_of_agents() -> None:
    with pytest.raises(ValueError, match="^agent_ids: prepared for 3 agents, a has 2$"):
        agent_lora(*inputs(), AgentRows(torch.zeros(7, dtype=torch.int8), 3), 1.0)
    with pytest.raises(ValueError, match="^num_agents: "):
        AgentRows(torch.zeros(7, dtype=torch.int8), 0)


def test_compiles_without_a_break_and_ignores_autocast() -> None:
    ids = torch.tensor([0, 1, -1, 1, 0, 5, 1])
    compiled = torch.compile(agent_lora, fullgraph=True, backend="aot_eager")
    found = []
    for function in (agent_lora, compiled):
        leaves = inputs()
        out = function(*leaves, ids, 2.0)
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(agent_lora(*inputs(), ids, 2.0), found[0][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_few_rows(dtype: torch.dtype) -> None:
    for rows in (5, 0):
        torch.library.opcheck(op._few_rows, tuple(make_lora(rows, (6, 3, 4), dtype=dtype)))


def test_few_rows_without_gradients_take_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def few_rows(x: torch.Tensor, *given: Any) -> torch.Tensor:
        taken.append(len(x))
        return agent_lora_reference(x, *given)

    monkeypatch.setattr(op, "has_triton", lambda tensor: True)  # of a GPU that is not there
    monkeypatch.setattr(op, "_few_rows", few_rows)
    for case in (make_lora(op.LARGEST_ROWS, (6, 3, 4)), make_lora(op.LARGEST_ROWS + 1, (6, 3, 4))):
        agent_lora(*case)
        with torch.no_grad():
            assert_accurate(agent_lora(*case), case)
            prepared = case._replace(agent_ids=AgentRows(case.agent_ids, 2))
            assert_accurate(agent_lora(*prepared), case)
    with torch.no_grad():
        agent_lora(*make_lora(4, (6, op.LARGEST_RANK + 1, 4)))
        agent_lora(*make_lora(4, (6, 3, 4), dtype=torch.float64))
    assert taken == [op.LARGEST_ROWS] * 2
