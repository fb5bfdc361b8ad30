"""`agent_lora` on a GPU: its Triton kernels for few rows, and two library products for the others, against float64."""

import pytest
import torch
from torch import Tensor

from coars_kernels import AgentRows, agent_lora
from coars_kernels.agent_lora.op import LARGEST_ROWS
from tests.kernels.credit_cases import poisoned_memory
from tests.kernels.lora_cases import Lora, assert_accurate, make_lora

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# inputs, rank, outputs: Qwen2.5-7B's projections with the presets' ranks, and sizes that fit no tile
SIZES = [(3584, 32, 4608), (3584, 16, 37888), (18944, 32, 3584), (100, 5, 70), (33, 100, 129), (1, 1, 1)]


def check(case: Lora) -> Tensor:
    there = case.on("cuda")
    with torch.no_grad(), poisoned_memory():
        found, again = (agent_lora(*there).cpu() for _ in range(2))
    assert torch.equal(found, again)
    assert_accurate(found, case)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 17, 64, LARGEST_ROWS, LARGEST_ROWS + 1])
def test_any_size(rows: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(make_lora(rows, sizes, dtype=dtype))


@pytest.mark.parametrize("ids", [torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("agents", [1, 2, 5])
def test_ids_and_agents(agents: int, ids: torch.dtype) -> None:
    case = make_lora(40, (300, 8, 200), agents=agents, dtype=torch.bfloat16)
    found = check(case._replace(agent_ids=case.agent_ids.to(ids)))
    there = case.on("cuda")
    with torch.no_grad():
        prepared = agent_lora(*there[:3], AgentRows(there.agent_ids, agents), there.scale)
    assert torch.equal(prepared.cpu(), found)


def test_foreign_values_are_not_added() -> None:
    case = make_lora(60, (300, 8, 200), dtype=torch.bfloat16)
    ids = torch.arange(60) % 3 - 1
    whole = check(case._replace(agent_ids=ids))
    case.x[ids == -1] = torch.nan
    case.a[1], case.b[1] = torch.nan, torch.nan
    there = case._replace(agent_ids=ids).on("cuda")
    with torch.no_grad():
        found = agent_lora(*there).cpu()
    assert torch.equal(found[ids != 1], whole[ids != 1]) and found[ids == 1].isnan().all()


def test_with_gradients_it_is_the_librarys() -> None:
    case = make_lora(20, (300, 8, 200))
    results = []
    for place in ("cuda", "cpu"):
        there = case.on(place)
        leaves = [part.clone().requires_grad_() for part in there[:3]]
        out = agent_lora(*leaves, there.agent_ids, there.scale)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_a_graph_follows_its_inputs() -> None:
    case = make_lora(24, (512, 16, 768), dtype=torch.bfloat16)
    static = case.on("cuda")
    with torch.no_grad():
        agent_lora(*static)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = agent_lora(*static)
    for seed in (1, 2):
        new = make_lora(24, (512, 16, 768), dtype=torch.bfloat16, seed=seed)
        for mine, theirs in zip(static[:4], new[:4], strict=True):
            mine.copy_(theirs)
        out.fill_(torch.nan)
        graph.replay()
        assert_accurate(out.cpu(), new)


def test_does_not_wait_for_the_device() -> None:
    case = make_lora(24, (512, 16, 768), dtype=torch.bfloat16).on("cuda")
    with torch.no_grad():
        agent_lora(*case)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            agent_lora(*case)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_compiles_without_a_break() -> None:
    case = make_lora(24, (512, 16, 768), dtype=torch.bfloat16).on("cuda")
    with torch.no_grad():
        assert torch.equal(torch.compile(agent_lora, fullgraph=True)(*case), agent_lora(*case))
