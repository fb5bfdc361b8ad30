"""Attention over pages in place, as a GPU does it: who computes it, extends, and the attention of a decoding step.

Backends in order: `flash_attn` (its paged kernels), torch's `varlen_attn` where it takes pages, and the project's own
kernels, which also run on a CPU (slowly, as their reference). Splitting the keys of a row is always off in the first
two: with pages it gave NaN and wrong results (PITFALLS). Which builds take pages, and get them right, differs by
release and device, so a library is tried once on two short sequences before it is chosen.

Shape suffixes: N packed tokens, B rows, W columns of the page table, Hq/Hkv heads, D head size.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coars_fast.errors import ConfigError
from coars_fast.rollout.pages import CachedSequence, PagePool
from coars_kernels import PrefixGroups, paged_decode_attention, paged_prefill_attention
from coars_kernels.paged_prefill_attention.reference import paged_prefill_attention_reference

BACKENDS = ("flash_attn", "varlen_attn", "kernels")
"""In order of preference."""

Prefill = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
"""(q [N, Hq, D], k_pages, v_pages, page_table [B, W], cu_q [B+1], lengths [B], max_q, max_k) -> [N, Hq, D]"""
Decode = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(q [B, Hq, D], k_pages, v_pages, page_table [B, W], lengths [B]) -> [B, Hq, D]"""

log = logging.getLogger(__name__)
_logged: set[tuple[str, str]] = set()


# ---------------------------------------------------------------------------------------------------- choice of backend


@lru_cache(maxsize=1)
def _flash_attn() -> tuple[Prefill, Decode] | str:
    """Its functions, or why it is missing."""
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    try:
        from flash_attn import (  # pyright: ignore[reportMissingImports]
            flash_attn_varlen_func,
            flash_attn_with_kvcache,
        )
    except (ImportError, OSError) as error:  # built against another torch: the usual way for it to fail
        return f"flash-attn is installed but cannot be imported: {error}"

    def prefill(
        q: Tensor, k: Tensor, v: Tensor, table: Tensor, cu_q: Tensor, lengths: Tensor, max_q: int, max_k: int
    ) -> Tensor:
        cu_k = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, causal=True, block_table=table)

    def decode(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        return flash_attn_with_kvcache(
            q[:, None], k, v, cache_seqlens=lengths, block_table=table, causal=True, num_splits=1
        )[:, 0]

    return prefill, decode


@lru_cache(maxsize=1)
def _varlen_attn() -> tuple[Prefill, Decode] | str:
    """Its functions, or why they cannot take pages."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    missing = {"block_table", "seqused_k", "num_splits", "enable_gqa", "window_size"} - set(
        inspect.signature(varlen_attn).parameters
    )
    if missing:
        return f"varlen_attn of torch {torch.__version__} takes no {', '.join(sorted(missing))} (2.12 and newer do)"

    def prefill(
        q: Tensor, k: Tensor, v: Tensor, table: Tensor, cu_q: Tensor, lengths: Tensor, max_q: int, max_k: int
    ) -> Tensor:
        out = varlen_attn(
            q, k, v, cu_q, None, max_q, max_k, window_size=(-1, 0), enable_gqa=True, seqused_k=lengths,
            block_table=table, num_splits=1,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    def decode(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        cu_q = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
        return prefill(q, k, v, table, cu_q, lengths, 1, table.shape[1] * k.shape[1])

    return prefill, decode


def _kernels() -> tuple[Prefill, Decode]:
    def prefill(
        q: Tensor, k: Tensor, v: Tensor, table: Tensor, cu_q: Tensor, lengths: Tensor, max_q: int, max_k: int
    ) -> Tensor:
        return paged_prefill_attention(q, k, v, table, cu_q, lengths)

    return prefill, paged_decode_attention


def _why_not(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, page_size: int) -> str | None:
    if name == "kernels":
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, not {dtype}"
    if head_dim > 256 or head_dim % 8:
        return f"it needs a head size that is a multiple of 8 and at most 256, not {head_dim}"
    if page_size % 256:
        return f"it needs pages of a multiple of 256 tokens, not {page_size}"
    found = _flash_attn() if name == "flash_attn" else _varlen_attn()
    return found if isinstance(found, str) else _trial(*found, device, dtype, head_dim, page_size)


TOLERANCE = 0.05
"""Of a trial's results, which are about 1: ten times what bfloat16 rounds off."""


@lru_cache(maxsize=16)
def _trial(
    prefill: Prefill, decode: Decode, device: torch.device, dtype: torch.dtype, head_dim: int, page_size: int
) -> str | None:
    """What is wrong with functions of a library on this device, by two short sequences in three pages, the first of
    which goes on in a page behind the second's; large numbers stand where nothing may be read. None: nothing.
    """
    draw = torch.Generator().manual_seed(0)
    queries, lengths = [3, 5], [page_size + 5, 7]
    table = torch.tensor([[0, 2], [1, 1]], dtype=torch.int32)
    q = torch.randn(sum(queries), 4, head_dim, generator=draw)
    k, v = torch.randn(2, 3, page_size, 2, head_dim, generator=draw)
    for page, first in ((2, 5), (1, 7)):
        k[page, first:] = v[page, first:] = 1e4
    places = table, torch.tensor([0, *accumulate(queries)], dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    expected = paged_prefill_attention_reference(q, k, v, *places)
    q, k, v = (tensor.to(device, dtype) for tensor in (q, k, v))
    table, cu_q, length = (tensor.to(device) for tensor in places)
    last = cu_q[1:].long() - 1
    try:
        found = [
            prefill(q, k, v, table, cu_q, length, max(queries), max(lengths)),
            decode(q[last], k, v, table, length),
        ]
    except (RuntimeError, TypeError, ValueError) as error:
        return f"it cannot attend over pages here: {(str(error).splitlines() or [repr(error)])[0]}"
    for out, wanted in zip(found, (expected, expected[last.cpu()]), strict=True):
        difference = float((out.float().cpu() - wanted).abs().max())
        if not difference < TOLERANCE:
            return f"its attention over pages is wrong here, off by {difference:.2g} on a trial"
    return None


def choose_paged_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int, page_size: int, requested: str = "auto"
) -> tuple[str, str]:
    """Choose who attends over pages, and say why; logged once per choice.

    Returns:
        (name out of `BACKENDS`, reason).

    Raises:
        ConfigError: `requested` is unknown or cannot be had here.
    """
    if requested not in ("auto", *BACKENDS):
        raise ConfigError(f"rollout.attention: {requested!r} is unknown; choose auto, dense, {', '.join(BACKENDS)}")
    problems: list[str] = []
    for name in BACKENDS if requested == "auto" else (requested,):
        problem = _why_not(name, device, dtype, head_dim, page_size)
        if problem is None:
            reason = "asked for" if requested != "auto" else "; ".join(problems) or "first choice"
            if (name, reason) not in _logged:
                _logged.add((name, reason))
                log.info("attention over pages on %s: %s (%s)", device.type, name, reason)
            return name, reason
        problems.append(f"{name}: {problem}" if requested == "auto" else problem)
    raise ConfigError(f"rollout.attention: {requested!r} was asked for, but {problems[0]}; use auto")


class PagedAttention:
    """The functions of one backend.

    Args:
        name: out of `BACKENDS`.
    """

    def __init__(self, name: str):
        found: Any = {"flash_attn": _flash_attn, "varlen_attn": _varlen_attn, "kernels": _kernels}[name]()
        assert not isinstance(found, str), found
        self.name = name
        self.prefill: Prefill = found[0]
        self.decode: Decode = found[1]

    def decode_groups(
        self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, groups: PrefixGroups | None
    ) -> Tensor:
        """`decode`; with groups, by the project's kernels, which read a common prefix once."""
        if groups is None:
            return self.decode(q, k, v, table, lengths)
        return paged_decode_attention(q, k, v, table, lengths, prefix_groups=groups)


# ------------------------------------------------------------------------------------------------------------- extends


def page_table(pool: PagePool, sequences: Sequence[CachedSequence], rows: int, width: int) -> Tensor:
    """[rows, width] int32 on the CPU: the pages of sequences; rows beyond them, and columns, name the scratch page.

    Raises:
        AssertionError: a sequence has more pages than the table has columns.
    """
    counts = np.array([len(sequence.pages) for sequence in sequences], dtype=np.int64)
    assert (counts <= width).all(), "a page table that outgrows its width would be read past its end"
    table = np.full((rows, width), pool.scratch_page, dtype=np.int32)
    table[: len(counts)][np.arange(width) < counts[:, None]] = [page for s in sequences for page in s.pages]
    return torch.from_numpy(table)


class PagedExtend:
    """`CachedAttend` of one forward pass that appends tokens to sequences.

    Args:
        pool: with room reserved.
        attention: who computes it.
        sequences: each at most once.
        new_lengths: at least 1 each.
    """

    def __init__(
        self,
        pool: PagePool,
        attention: PagedAttention,
        sequences: Sequence[CachedSequence],
        new_lengths: Sequence[int],
    ):
        self.pool, self.attention = pool, attention
        device, size = pool.kv.device, pool.page_size
        ends = [s.length + n for s, n in zip(sequences, new_lengths, strict=True)]
        table = page_table(pool, sequences, len(sequences), max(len(s.pages) for s in sequences))
        position = np.concatenate([np.arange(s.length, end) for s, end in zip(sequences, ends, strict=True)])
        page = table.numpy()[np.arange(len(ends)).repeat(new_lengths), position // size]
        self.positions, self.pages = torch.from_numpy(np.stack([position, page])).to(device).unbind()
        self.offsets = self.positions % size
        self.table = table.to(device)
        self.lengths = torch.tensor(ends, dtype=torch.int32).to(device)
        self.cu_q = torch.tensor(list(accumulate(new_lengths, initial=0)), dtype=torch.int32).to(device)
        self.last = self.cu_q[1:].long() - 1
        self.longest = (max(new_lengths), max(ends))

    def __call__(self, layer: int, q: Tensor, kv: Tensor, last: Tensor | None) -> Tensor:
        """See `CachedAttend`."""
        self.pool.kv[layer][self.pages, :, self.offsets] = kv
        keys, values = self.pool.layer(layer)
        if last is not None or self.longest[0] == 1:
            return self.attention.decode(q, keys, values, self.table, self.lengths).flatten(1)
        return self.attention.prefill(q, keys, values, self.table, self.cu_q, self.lengths, *self.longest).flatten(1)
