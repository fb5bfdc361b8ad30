"""Attention of one new token per row over keys in pages: against dense and gathered attention, and the paged kernels of
flash-attn and torch.

    python -m pytest bench/test_paged_decode_attention.py

The floor is memory traffic: every key and value that rows need read once, one that a group shares once for all of it,
at the bandwidth of a copy in the same run. On a GPU every variant is captured in a CUDA graph and replayed, as a
rollout decodes, which leaves the host's time for launches out of all alike. On a CPU ours is plain torch, and groups
make no difference. Left out: extends, which flash-attn or torch serve where they are there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Result, Variant
from bench.presets import Preset
from coars_kernels import PrefixGroups, __version__, paged_decode_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHECKED_ROWS = 16
GROUP_ROWS = 8
# Results and weights are rounded to the dtype once each; fp32 as everywhere.
ALLOWED = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (4e-3, 4e-3)}


@dataclass(frozen=True)
class Shape:
    """Of a decode step; `shared` keys of each group of `GROUP_ROWS` rows are the same in the cases with groups."""

    rows: int
    query_heads: int
    kv_heads: int
    head_size: int
    context: int
    page_size: int
    shared: int


SIZES = {
    "smoke": (Shape(16, 4, 2, 24, 100, 16, 64),),
    "cpu": (Shape(64, 4, 2, 24, 200, 16, 128), Shape(64, 8, 8, 64, 300, 16, 192)),
    # Qwen2.5-7B; five pages of a prompt of 1280 tokens in common
    "h100": (Shape(256, 28, 4, 128, 2000, 256, 1280),),
}


@dataclass
class Rows:
    """Inputs; `k` and `v` are the same keys and values without pages."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    table: Tensor
    lengths: Tensor
    k: Tensor  # [B, Hkv, L, D]
    v: Tensor
    row_offsets: Tensor
    prefix_length: Tensor


def make_rows(shape: Shape, dtype: torch.dtype, *, grouped: bool, ragged: bool) -> Callable[[int], Rows]:
    def make(seed: int) -> Rows:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        rows, page = shape.rows, shape.page_size
        low, high = (shape.context // 2, shape.context * 3 // 2) if ragged else (shape.context, shape.context)
        lengths = torch.randint(low, high + 1, (rows,), generator=generator, device=DEVICE).int()
        width, shared = -(-high // page), shape.shared // page
        num_pages = rows * width
        order = torch.randperm(num_pages, generator=generator, device=DEVICE)
        table = order.view(rows, width).int()
        if grouped:
            leaders = torch.arange(rows, device=DEVICE) // GROUP_ROWS * GROUP_ROWS
            table[:, :shared] = table[leaders, :shared]
        sizes = (num_pages, page, shape.kv_heads, shape.head_size)
        k_pages, v_pages = (torch.randn(*sizes, generator=generator, device=DEVICE, dtype=dtype) for _ in range(2))
        q = 2 * torch.randn(rows, shape.query_heads, shape.head_size, generator=generator, device=DEVICE)
        offsets = torch.arange(0, rows + 1, GROUP_ROWS if grouped else rows, device=DEVICE).int()
        prefix = torch.full((len(offsets) - 1,), shared * page if grouped else 0, device=DEVICE).int()
        k, v = (gathered(pages, table, high).contiguous() for pages in (k_pages, v_pages))
        return Rows(q.to(dtype), k_pages, v_pages, table, lengths, k, v, offsets, prefix)

    return make


def gathered(pages: Tensor, table: Tensor, longest: int) -> Tensor:
    """[B, Hkv, L, D]"""
    return pages[table.long()].flatten(1, 2)[:, :longest].transpose(1, 2)


# ------------------------------------------------------------------------------------------------------------- variants


def ours(case: Rows) -> Tensor:
    return paged_decode_attention(case.q, case.k_pages, case.v_pages, case.table, case.lengths)


def ours_in_groups(case: Rows) -> Tensor:
    groups = PrefixGroups(case.row_offsets, case.prefix_length)
    return paged_decode_attention(case.q, case.k_pages, case.v_pages, case.table, case.lengths, prefix_groups=groups)


def sdpa(case: Rows, k: Tensor, v: Tensor, *, ragged: bool) -> Tensor:
    """Query heads of a kv head as query positions: its fastest form, which without a mask is flash attention's."""
    rows, kv_heads, longest, head_size = k.shape
    q = case.q.view(rows, kv_heads, -1, head_size)
    mask = None
    if ragged:
        mask = (torch.arange(longest, device=k.device) < case.lengths[:, None])[:, None, None]
        mask = mask.expand(rows, 1, q.shape[2], longest)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(case.q.shape)


def gather_and_sdpa(case: Rows, *, ragged: bool) -> Tensor:
    longest = case.k.shape[2]
    k, v = gathered(case.k_pages, case.table, longest), gathered(case.v_pages, case.table, longest)
    return sdpa(case, k, v, ragged=ragged)


def flash_attn(case: Rows) -> Tensor:
    from flash_attn import flash_attn_with_kvcache  # pyright: ignore[reportMissingImports]

    # splits: 0 is NaN or 2 is wrong with pages in some of its versions
    return flash_attn_with_kvcache(
        case.q[:, None], case.k_pages, case.v_pages, cache_seqlens=case.lengths, block_table=case.table, num_splits=1
    )[:, 0]


def torch_varlen(case: Rows) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds = torch.arange(len(case.lengths) + 1, device=case.q.device, dtype=torch.int32)
    out = varlen_attn(
        case.q, case.k_pages, case.v_pages, bounds, None, 1, case.k.shape[2], enable_gqa=True, seqused_k=case.lengths,
        block_table=case.table, num_splits=1,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def flash_attn_absent() -> str:
    if DEVICE == "cpu":
        return "needs a CUDA device"
    return "" if importlib.util.find_spec("flash_attn") else "not installed: no module flash_attn"


def torch_varlen_absent() -> str:
    if DEVICE == "cpu":
        return "needs a CUDA device"
    try:
        import inspect

        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no varlen_attn"
    has_pages = "block_table" in inspect.signature(varlen_attn).parameters
    return "" if has_pages else f"varlen_attn of torch {torch.__version__} takes no pages"


def replayed(function: Callable[[Rows], Tensor]) -> Callable[[Rows], Result]:
    """On a GPU one graph for each inputs; on a CPU the function itself."""
    graphs: dict[int, tuple[Rows, torch.cuda.CUDAGraph, Tensor]] = {}

    def run(case: Rows) -> Result:
        if DEVICE == "cpu":
            return {"out": function(case)}
        if id(case) not in graphs:
            side = torch.cuda.Stream()  # a first call outside compiles, and may allocate for good
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                function(case)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = function(case)
            graphs[id(case)] = (case, graph, out)
        _, graph, out = graphs[id(case)]
        graph.replay()
        return {"out": out}

    return run


def expected(case: Rows, _: Result) -> dict[str, tuple[Tensor | None, Tensor]]:
    """Some rows in float64."""
    rows = torch.linspace(0, len(case.lengths) - 1, min(CHECKED_ROWS, len(case.lengths)), device=DEVICE).long()
    k, v = case.k[rows].double(), case.v[rows].double()
    q = case.q[rows].double().view(len(rows), k.shape[1], -1, k.shape[3])
    score = q @ k.transpose(2, 3) / k.shape[3] ** 0.5
    beyond = torch.arange(k.shape[2], device=DEVICE) >= case.lengths[rows][:, None]
    weight = score.masked_fill(beyond[:, None, None], -torch.inf).softmax(-1)
    return {"out": (rows, (weight @ v).reshape(len(rows), -1, k.shape[3]))}


def cases(preset: Preset) -> list[Case]:
    dtype = getattr(torch, preset.dtype)
    return [
        make_case(preset, shape, dtype, name, grouped=grouped, ragged=ragged)
        for shape in SIZES[preset.name]
        for name, grouped, ragged in (
            ("rows alone", False, False),
            (f"groups of {GROUP_ROWS}", True, False),
            ("rows of many lengths", False, True),
        )
    ]


def make_case(preset: Preset, shape: Shape, dtype: torch.dtype, name: str, *, grouped: bool, ragged: bool) -> Case:
    flash_version = "flash-attn"
    if importlib.util.find_spec("flash_attn"):
        flash_version += f" {importlib.metadata.version('flash-attn')}"
    version, package = f"coars_kernels {__version__}", "ours"
    variants = [
        Variant("paged_decode_attention", replayed(ours), package, version),
        Variant("paged_decode_attention, prefix_groups", replayed(ours_in_groups), package, version),
        Variant("SDPA, contiguous keys (no pages)", replayed(lambda c: sdpa(c, c.k, c.v, ragged=ragged))),
        Variant("gather, then SDPA", replayed(lambda c: gather_and_sdpa(c, ragged=ragged))),
        Variant("flash_attn with pages", replayed(flash_attn), version=flash_version, absent=flash_attn_absent()),
        Variant("torch varlen_attn with pages", replayed(torch_varlen), absent=torch_varlen_absent()),
    ]
    keys = shape.rows * shape.context  # of many lengths: on average
    unique = keys - (shape.rows - shape.rows // GROUP_ROWS) * shape.shared if grouped else keys
    numbers = 2 * unique * shape.kv_heads * shape.head_size + 2 * shape.rows * shape.query_heads * shape.head_size
    sizes = {
        "B": shape.rows, "Hq": shape.query_heads, "Hkv": shape.kv_heads, "D": shape.head_size,
        "context": shape.context, "page": shape.page_size,
    }  # fmt: skip
    return Case(
        op="paged_decode_attention", name=name, shape=sizes, dtype=dtype, device=DEVICE,
        inputs=make_rows(shape, dtype, grouped=grouped, ragged=ragged), variants=variants, expected=expected,
        flops=4.0 * keys * shape.query_heads * shape.head_size, num_bytes=1.0 * dtype.itemsize * numbers,
        tokens=lambda result: shape.rows, rounds=2 * preset.rounds, allowed=ALLOWED[dtype],
    )  # fmt: skip


def test_paged_decode_attention(case: Case, measured: Callable[[Case], object]) -> None:
    measured(case)
