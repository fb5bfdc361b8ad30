"""Both agents' adapters on one batch of mixed rows: against the ways in which it is usually done.

    python -m pytest bench/test_agent_lora.py

Forward and backward the floor is six bare `torch.mm` of one adapter's rank on all rows: what one agent alone would
cost. Few rows are measured without gradients too, as in decoding: there a GPU takes the Triton kernels, the library's
two products stand beside them, and the floor is reading both adapters' factors once. Left out: grouped matrix products,
which torch has for 16 bits on a GPU only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import rivals
from bench.harness import Case, Result, Variant
from bench.presets import Preset
from coars_kernels import AgentRows, __version__, agent_lora
from coars_kernels.agent_lora.reference import agent_lora_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {
    "smoke": ((512, 96, 8),),
    "cpu": ((512, 512, 16), (4096, 512, 16)),
    "h100": ((64, 3584, 32), (2048, 3584, 32), (16384, 3584, 32)),
}
"""Rows, width, rank."""
FEW = {
    "smoke": ((16, 96, 8),),
    "cpu": ((16, 512, 16),),
    "h100": ((8, 3584, 32), (64, 3584, 32), (128, 3584, 32)),
}
"""Likewise, without gradients."""
SCALE = 2.0


@dataclass
class Mixed:
    """Rows of both agents, in no order."""

    x: Tensor
    a: Tensor
    b: Tensor
    agents: Tensor
    upstream: Tensor
    rows: AgentRows | None = None
    """Made by the variant that is given it."""


def make_mixed(rows: int, width: int, rank: int, dtype: torch.dtype) -> Callable[[int], Mixed]:
    def make(seed: int) -> Mixed:
        generator = torch.Generator(DEVICE).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)

        a, b = normal(2, rank, width).mul_(width**-0.5), normal(2, width, rank).mul_(rank**-0.5)
        agents = torch.randint(2, (rows,), generator=generator, device=DEVICE)
        leaves = [tensor.requires_grad_() for tensor in (normal(rows, width), a, b)]
        return Mixed(*leaves, agents, normal(rows, width))

    return make


Lora = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def lora_run(function: Lora) -> Callable[[Mixed], Result]:
    """Output and all three gradients."""

    def run(case: Mixed) -> Result:
        out = function(case.x, case.a, case.b, case.agents, SCALE)
        names = ("grad_x", "grad_a", "grad_b")
        gradients = torch.autograd.grad(out, (case.x, case.a, case.b), case.upstream)
        return {"out": out.detach()} | dict(zip(names, gradients, strict=True))

    return run


def prepared(case: Mixed) -> Result:
    """As a model with many layers calls it: what depends on the ids alone was made before."""
    if case.rows is None:
        case.rows = AgentRows(case.agents, case.a.shape[0])
    return lora_run(lambda x, a, b, _, scale: agent_lora(x, a, b, case.rows, scale))(case)


@torch.no_grad()
def few_rows(case: Mixed) -> Result:
    """As a decoding step calls it."""
    if case.rows is None:
        case.rows = AgentRows(case.agents, case.a.shape[0])
    return {"out": agent_lora(case.x, case.a, case.b, case.rows, SCALE)}


def few_rows_by_products(case: Mixed) -> Result:
    """Where gradients are possible, though none is asked for, it is the library's products."""
    if case.rows is None:
        case.rows = AgentRows(case.agents, case.a.shape[0])
    with torch.enable_grad():
        return {"out": agent_lora(case.x.detach(), case.a.detach(), case.b.detach(), case.rows, SCALE)}


def without_gradients(function: Lora) -> Callable[[Mixed], Result]:
    @torch.no_grad()
    def run(case: Mixed) -> Result:
        return {"out": function(case.x, case.a, case.b, case.agents, SCALE)}

    return run


def rows_by_agent(x: Tensor, a: Tensor, b: Tensor, agents: Tensor, scale: float) -> Tensor:
    """Pick each agent's rows, as PEFT does for mixed batches: waits for the GPU to count them."""
    out = torch.zeros(x.shape[0], b.shape[1], dtype=x.dtype, device=x.device)
    for agent in range(a.shape[0]):
        rows = (agents == agent).nonzero()[:, 0]
        out = out.index_add(0, rows, (x[rows] @ a[agent].T) @ b[agent].T * scale)
    return out


def weights_by_row(x: Tensor, a: Tensor, b: Tensor, agents: Tensor, scale: float) -> Tensor:
    """Gather both factors for every row, then batched products."""
    down = torch.bmm(a[agents], x[:, :, None])
    return torch.bmm(b[agents], down)[:, :, 0] * scale


def floor(case: Mixed) -> Callable[[], None]:
    x, a, b = case.x.detach(), case.a[0].detach(), case.b[0].detach()

    def run() -> None:
        down = torch.mm(x, a.T)
        torch.mm(down, b.T)
        up = torch.mm(case.upstream, b)
        torch.mm(up, a)
        torch.mm(up.T, x)
        torch.mm(case.upstream.T, down)

    return run


def expected(case: Mixed, _: Result) -> dict[str, tuple[Tensor | None, Tensor]]:
    leaves = [tensor.detach().double().requires_grad_() for tensor in (case.x, case.a, case.b)]
    exact = Mixed(*leaves, case.agents, case.upstream.double())
    return {name: (None, value) for name, value in lora_run(agent_lora_reference)(exact).items()}


def expected_of_few(case: Mixed, _: Result) -> dict[str, tuple[Tensor | None, Tensor]]:
    wide = (tensor.detach().double() for tensor in (case.x, case.a, case.b))
    return {"out": (None, agent_lora_reference(*wide, case.agents, SCALE))}


def cases_of_few(preset: Preset) -> list[Case]:
    """Without gradients."""
    dtype, version = getattr(torch, preset.dtype), f"coars_kernels {__version__}"
    found = []
    for rows, width, rank in FEW[preset.name]:
        variants = [
            Variant("agent_lora, rows prepared", few_rows, "ours", version),
            Variant("one adapter after the other, masked", without_gradients(agent_lora_reference)),
            Variant("rows picked by agent (as PEFT)", without_gradients(rows_by_agent)),
            Variant("factors gathered by row", without_gradients(weights_by_row)),
        ]
        if DEVICE == "cuda":
            variants.insert(1, Variant("two products of the library", few_rows_by_products, "ours", version))
        case = Case(
            op="agent_lora", name="few rows, no gradients", shape={"N": rows, "D": width, "r": rank}, dtype=dtype,
            device=DEVICE, inputs=make_mixed(rows, width, rank, dtype), variants=variants, expected=expected_of_few,
            num_bytes=(4.0 * width * rank + 2.0 * rows * width) * dtype.itemsize, flops=4.0 * rows * width * rank,
            rounds=3 * preset.rounds, allowed=(1e-2, 1e-2) if dtype.itemsize == 2 else None,
        )  # fmt: skip
        found.append(case)
    return found


def cases(preset: Preset) -> list[Case]:
    return [*cases_of_steps(preset), *cases_of_few(preset)]


def cases_of_steps(preset: Preset) -> list[Case]:
    """Forward and backward."""
    dtype = getattr(torch, preset.dtype)
    compile_absent = "" if preset.compile_everywhere else "left out here: compiling takes longer than the preset allows"
    found = []
    for rows, width, rank in SIZES[preset.name]:
        # The gathered factors of every row; where they are this large, it is not a way to do it.
        gathered, limit = 4 * rows * width * rank * dtype.itemsize, 2**33 if DEVICE == "cuda" else 2**25
        too_large = f"its gathered factors alone take {gathered / 2**20:.0f} MiB" if gathered > limit else ""
        variants = [
            Variant("agent_lora, rows prepared", prepared, "ours", f"coars_kernels {__version__}"),
            Variant("agent_lora", lora_run(agent_lora), "ours", f"coars_kernels {__version__}"),
            Variant("one adapter after the other, masked", lora_run(agent_lora_reference)),
            Variant("rows picked by agent (as PEFT)", lora_run(rows_by_agent)),
            Variant("factors gathered by row", lora_run(weights_by_row), absent=too_large),
            Variant(
                "torch.compile, masked",
                lora_run(lambda *values: rivals.compiled(agent_lora_reference)(*values)),
                absent=compile_absent,
            ),
        ]
        # bf16: two roundings of 2^-9 in a chain (the inner product is kept in 16 bits), each way.
        case = Case(
            op="agent_lora", name="forward and backward", shape={"N": rows, "D": width, "r": rank}, dtype=dtype,
            device=DEVICE, inputs=make_mixed(rows, width, rank, dtype), variants=variants, expected=expected,
            floor=floor, floor_name="six bare mm", flops=12.0 * rows * width * rank,
            num_bytes=4.0 * rows * width * dtype.itemsize, rounds=3 * preset.rounds,
            allowed=(1e-2, 1e-2) if dtype.itemsize == 2 else None,
        )  # fmt: skip
        found.append(case)
    return found


def test_agent_lora(case: Case, measured: Callable[[Case], object]) -> None:
    measured(case)
