"""A teacher's branches over a student's packed keys, in place: against ways to do it without such an operation.

    python -m pytest bench/test_branch_attention.py

Turns in the usual proportions (prompt 1200, response 120, partner 80, reference 150), one layer. The rivals gather each
branch's keys first; the last one attends over whole teacher sequences, as a re-prefill does, and keeps the branches'
rows. The floor is two bare products of queries with the keys that they see, per branch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.harness import Case, Result, Variant
from bench.presets import Preset
from coars_fast.model.attention import varlen_attention
from coars_kernels import __version__, branch_attention
from coars_kernels.branch_attention.reference import branch_attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROPORTIONS = (1200, 120, 80, 150)
SIZES = {
    "smoke": ((2, 3, 0.05, (4, 2), 24),),
    "cpu": ((4, 5, 0.1, (8, 4), 64), (2, 5, 0.5, (8, 4), 64)),
    "h100": ((8, 5, 1.0, (28, 4), 128), (32, 5, 0.25, (28, 4), 128)),
}
"""Sequences, turns, scale of the proportions, heads, head size."""


@dataclass
class Layer:
    """Queries, keys and values of one layer, and the whole teacher sequences for the rival that computes them."""

    q: Tensor
    k: Tensor
    v: Tensor
    trunk_k: Tensor
    trunk_v: Tensor
    trunk_q: Tensor
    cu_branch: Tensor
    trunk_start: Tensor
    trunk_len: Tensor
    cu_keys: Tensor
    gather: Tensor
    """Rows of [trunk; branches] that the teacher sequences hold."""
    longest: tuple[int, int]


def make_layer(
    sequences: int, turns: int, scale: float, heads: tuple[int, int], size: int, dtype: torch.dtype
) -> Callable[[int], Layer]:
    prompt, reply, partner, reference = (max(1, round(scale * n)) for n in PROPORTIONS)
    length, branch = prompt + turns * (reply + partner), reference + reply
    forks = [prompt + n * (reply + partner) for n in range(turns)]

    def make(seed: int) -> Layer:
        generator = torch.Generator(DEVICE).manual_seed(seed)

        def normal(rows: int, count: int) -> Tensor:
            return torch.randn(rows, count, size, generator=generator, device=DEVICE).to(dtype)

        num_branches, rows = sequences * turns, sequences * length
        starts = [s * length for s in range(sequences) for _ in range(turns)]
        pieces = [
            torch.cat([torch.arange(start, start + fork), torch.arange(m * branch, (m + 1) * branch) + rows])
            for m, (start, fork) in enumerate(zip(starts, forks * sequences, strict=True))
        ]

        def numbers(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=DEVICE)

        cu_keys = numbers([0, *map(len, pieces)]).cumsum(0).int()
        own = [normal(num_branches * branch, count) for count in (heads[0], heads[1], heads[1])]
        return Layer(
            *own, *(normal(rows, count) for count in (heads[1], heads[1], heads[0])),
            numbers([branch * m for m in range(num_branches + 1)]), numbers(starts), numbers(forks * sequences),
            cu_keys, torch.cat(pieces).to(DEVICE), (branch, max(map(len, pieces))),
        )  # fmt: skip

    return make


def ours(x: Layer) -> Result:
    return {"out": branch_attention(x.q, x.k, x.v, x.trunk_k, x.trunk_v, x.cu_branch, x.trunk_start, x.trunk_len)}


def gathered(x: Layer) -> Result:
    """Keys and values copied together, then attention with fewer queries than keys."""
    k, v = torch.cat([x.trunk_k, x.k])[x.gather], torch.cat([x.trunk_v, x.v])[x.gather]
    return {"out": varlen_attention(x.q, k, v, x.cu_branch, x.cu_keys, *x.longest)}


def whole(x: Layer) -> Result:
    """As a re-prefill: every token of every teacher sequence attends."""
    q, k, v = (torch.cat(pair)[x.gather] for pair in ((x.trunk_q, x.q), (x.trunk_k, x.k), (x.trunk_v, x.v)))
    out = varlen_attention(q, k, v, x.cu_keys, None, x.longest[1], x.longest[1])
    return {"out": out[x.gather >= len(x.trunk_k)]}


def floor(x: Layer) -> Callable[[], None]:
    """Scores and weighted sums as bare products over the keys of each branch."""
    group, bounds = x.q.shape[1] // x.k.shape[1], x.cu_branch.tolist()
    keys = x.cu_keys.diff().tolist()
    pairs = []
    for first, last, count in zip(bounds[:-1], bounds[1:], keys, strict=True):
        q = x.q[first:last].unflatten(1, (-1, group)).permute(1, 2, 0, 3).flatten(1, 2).contiguous()
        k = torch.randn(q.shape[0], count, q.shape[2], device=q.device).to(q.dtype)
        pairs.append((q, k))

    def run() -> None:
        for q, k in pairs:
            torch.bmm(torch.bmm(q, k.transpose(1, 2)), k)

    return run


@torch.no_grad()
def expected(x: Layer, _: Result) -> dict[str, tuple[Tensor | None, Tensor]]:
    numbers = (value.double() for value in (x.q, x.k, x.v, x.trunk_k, x.trunk_v))
    return {"out": (None, branch_attention_reference(*numbers, x.cu_branch, x.trunk_start, x.trunk_len))}


def flops(x: Layer) -> float:
    """Products that the causal result needs."""
    queries, keys = x.cu_branch.diff().double(), x.cu_keys.diff().double()
    pairs = float((queries * (keys - queries / 2)).sum())
    return 4.0 * pairs * x.q.shape[1] * x.q.shape[2]


def cases(preset: Preset) -> list[Case]:
    dtype = getattr(torch, preset.dtype)
    found = []
    for sequences, turns, scale, heads, size in SIZES[preset.name]:
        make = make_layer(sequences, turns, scale, heads, size, dtype)
        example = make(0)
        variants = [
            Variant("branch_attention", ours, "ours", f"coars_kernels {__version__}"),
            Variant("keys gathered, then varlen attention", gathered),
            Variant("whole teacher sequences", whole),
        ]
        case = Case(
            op="branch_attention", name="one layer",
            shape={"S": sequences, "M": sequences * turns, "N": len(example.trunk_k), "NB": len(example.q),
                   "Hq": heads[0], "Hkv": heads[1], "D": size},
            dtype=dtype, device=DEVICE, inputs=make, variants=variants, expected=expected, floor=floor,
            floor_name="bare bmm, two per branch", flops=flops(example), rounds=3 * preset.rounds,
            # bf16: weights and results are rounded once each
            allowed=(1e-2, 1e-2) if dtype.itemsize == 2 else None,
        )  # fmt: skip
        found.append(case)
    return found


def test_branch_attention(case: Case, measured: Callable[[Case], object]) -> None:
    measured(case)
