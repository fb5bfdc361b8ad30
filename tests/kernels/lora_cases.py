"""Inputs for `agent_lora`, and how far from float64 a result may be."""

from typing import NamedTuple

import torch
from torch import Tensor

from coars_kernels.agent_lora.reference import agent_lora_reference


class Lora(NamedTuple):
    """Arguments in order."""

    x: Tensor
    a: Tensor
    b: Tensor
    agent_ids: Tensor
    scale: float = 1.7

    def on(self, place: torch.device | torch.dtype | str) -> "Lora":
        """On a device, or its numbers in a dtype."""
        ids = self.agent_ids if isinstance(place, torch.dtype) else self.agent_ids.to(place)
        return Lora(self.x.to(place), self.a.to(place), self.b.to(place), ids, self.scale)


def make_lora(
    rows: int, sizes: tuple[int, int, int], *, agents: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Lora:
    """Rows of all agents and of none, mixed; `sizes` are inputs, rank and outputs."""
    generator = torch.Generator().manual_seed(seed)
    (inputs, rank, outputs), ids = sizes, torch.randint(-1, agents + 1, (rows,), generator=generator)
    x = torch.randn(rows, inputs, generator=generator)
    a = torch.randn(agents, rank, inputs, generator=generator) * inputs**-0.5
    b = torch.randn(agents, outputs, rank, generator=generator)
    return Lora(x, a, b, ids).on(dtype)


def assert_accurate(found: Tensor, case: Lora) -> None:
    """Two roundings to 16 bits, of the middle and of the result, or those of a sum in fp32, each as large as if nothing
    cancelled; what has no adapter is exactly zero."""
    assert found.dtype == case.x.dtype
    wide = Lora(*(part.double() for part in case[:3]), case.agent_ids, case.scale)
    exact = agent_lora_reference(*wide)
    whole = agent_lora_reference(*(part.abs() for part in wide[:3]), *wide[3:])
    info = torch.finfo(found.dtype)
    eps = info.eps * (4 if found.dtype == torch.float32 else 1)
    assert ((found.double() - exact).abs() <= eps * whole + info.tiny).all()
    assert not found[(case.agent_ids < 0) | (case.agent_ids >= len(case.a))].any()
