"""Causal attention over packed sequences, and the one place that chooses who computes it.

The decoder does not know how sequences lie in memory: it hands the rotated queries, keys and values of its N packed
tokens to an `Attend` object. `PackedAttention` is the one for training and scoring without a cache; the rollout brings
its own, which reads and writes pages. Left out on purpose: sliding windows, dropout, masks other than causal.

Shape suffixes: N tokens, S sequences, Hq/Hkv query and key-value heads, D head size, P padded tokens.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from coars_fast.errors import ConfigError

__all__ = ["BACKENDS", "Attend", "PackedAttention", "choose_backend", "varlen_attention"]

BACKENDS = ("flash_attn", "varlen_attn", "sdpa")
"""In order of preference."""

log = logging.getLogger(__name__)
_logged: set[tuple[str, str, str]] = set()


class Attend(Protocol):
    """What the decoder calls once per layer."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend within each packed sequence.

        Args:
            layer: index of the decoder layer, from 0.
            q: [N, Hq, D], rotated.
            k: [N, Hkv, D], rotated.
            v: [N, Hkv, D].

        Returns:
            [N, Hq, D] in the dtype of `q`.
        """
        ...


# ---------------------------------------------------------------------------------------------------- choice of backend


def _why_not_fused(device: torch.device, dtype: torch.dtype, head_dim: int | None) -> str | None:
    """What keeps both FlashAttention-based backends from serving these tensors, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, not {dtype}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    if head_dim is not None and (head_dim > 256 or head_dim % 8):
        return f"it needs a head size that is a multiple of 8 and at most 256, not {head_dim}"
    return None


@lru_cache(maxsize=1)
def _flash_attn_function() -> tuple[Any, str]:
    """`flash_attn_varlen_func` or None, and why it is missing."""
    if importlib.util.find_spec("flash_attn") is None:
        return None, "the package flash-attn is not installed"
    try:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError) as error:  # built against another torch: the usual way for it to fail
        return None, f"flash-attn is installed but cannot be imported: {error}"
    return flash_attn_varlen_func, ""


@lru_cache(maxsize=1)
def _torch_varlen_function() -> tuple[Any, str]:
    """torch's `varlen_attn` with causality bound in, or None, and why it is missing."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, f"torch {torch.__version__} has no torch.nn.attention.varlen (2.10 or newer has)"
    parameters = inspect.signature(varlen_attn).parameters
    # The first releases said is_causal=True; later ones say window_size=(-1, 0) and ask for GQA by name.
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    if "enable_gqa" in parameters:
        options["enable_gqa"] = True

    def call(*args: Any) -> Tensor:
        return varlen_attn(*args, **options)  # pyright: ignore[reportReturnType]

    return call, ""


def _why_not(name: str, device: torch.device, dtype: torch.dtype, head_dim: int | None) -> str | None:
    if name == "sdpa":
        return None
    problem = _why_not_fused(device, dtype, head_dim)  # first: importing either package takes a second and more
    if problem is None:
        _, missing = _flash_attn_function() if name == "flash_attn" else _torch_varlen_function()
        problem = missing or None
    return problem


def choose_backend(
    device: torch.device | str, dtype: torch.dtype, requested: str = "auto", *, head_dim: int | None = None
) -> tuple[str, str]:
    """Choose who computes packed attention, and say why; logged once per choice.

    Args:
        device, dtype, head_dim: of the queries; `head_dim` None leaves the head size unchecked.
        requested: "auto" or one of `BACKENDS`.

    Returns:
        (name, reason).

    Raises:
        ConfigError: `requested` is unknown, or cannot serve this device, dtype or head size.
    """
    return _choose(torch.device(device), dtype, requested, head_dim)


@lru_cache(maxsize=64)  # called once per layer on some paths
def _choose(device: torch.device, dtype: torch.dtype, requested: str, head_dim: int | None) -> tuple[str, str]:
    if requested != "auto":
        if requested not in BACKENDS:
            raise ConfigError(f"attention backend {requested!r} is unknown; choose auto, {', '.join(BACKENDS)}")
        problem = _why_not(requested, device, dtype, head_dim)
        if problem:
            raise ConfigError(f"attention backend {requested!r} was asked for, but {problem}; use 'auto' or 'sdpa'")
        name, reason = requested, "asked for"
    else:
        problems: list[str] = []
        name = "sdpa"
        for candidate in BACKENDS:
            problem = _why_not(candidate, device, dtype, head_dim)
            if problem is None:
                name = candidate
                break
            problems.append(f"{candidate}: {problem}")
        reason = "first choice" if not problems else "; ".join(problems)
    key = (str(device.type), name, reason)
    if key not in _logged:
        _logged.add(key)
        log.info("attention on %s: %s (%s)", device.type, name, reason)
    return name, reason


# ------------------------------------------------------------------------------------------------------ padded batches


class _Scatter(torch.autograd.Function):
    """Rows of `x` into the rows `index` of a zeroed buffer; the backward pass is a gather, not a slow index_add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, index, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None, None


class _Gather(torch.autograd.Function):
    """The rows `index` of `padded`, each at most once; the backward pass is a scatter."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = padded.shape[0]
        return padded.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, index, grad), None


def _lengths(cu_seqlens: Tensor, name: str) -> Tensor:
    """[S] int64 lengths on the CPU.

    Raises:
        ValueError: the bounds are not a vector that starts at 0 and never falls.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.is_floating_point():
        raise ValueError(f"{name}: integer bounds [S+1] expected, got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    bounds = cu_seqlens.detach().to("cpu", torch.int64)
    lengths = bounds.diff()
    if int(bounds[0]) != 0 or bool((lengths < 0).any()):
        raise ValueError(f"{name}: bounds must start at 0 and never fall, got {bounds.tolist()[:8]}...")
    return lengths


def _bucket(order_lengths: list[int]) -> list[tuple[int, int]]:
    """Cut lengths sorted downwards into [start, end) groups whose shortest is within a fifth (or 16) of the longest."""
    groups: list[tuple[int, int]] = []
    start = 0
    for i, length in enumerate(order_lengths):
        longest = order_lengths[start]
        if longest - length > max(16, longest // 5):
            groups.append((start, i))
            start = i
    if order_lengths:
        groups.append((start, len(order_lengths)))
    return groups


def _destinations(lengths: Tensor, order: Tensor, groups: list[tuple[int, int]]) -> tuple[Tensor, list[int], int]:
    """Where each packed token goes in the padded buffer [P]: index [N], the padded length of each group, and P."""
    first_row = torch.zeros(len(lengths), dtype=torch.int64)
    padded: list[int] = []
    offset = 0
    for start, end in groups:
        members = order[start:end]
        longest = int(lengths[members].max())
        first_row[members] = offset + longest * torch.arange(end - start)
        padded.append(longest)
        offset += longest * (end - start)
    starts = lengths.cumsum(0) - lengths
    index = torch.arange(int(lengths.sum())) + torch.repeat_interleave(first_row - starts, lengths)
    return index, padded, offset


class _SdpaPlan:
    """Padding of packed sequences into a few dense batches, worked out once and used by every layer.

    Padding is on the right, so with equal query and key bounds the causal flag alone is exact: padded keys come after
    every real query. With more keys than queries a boolean mask aligns the last query with the last key.
    """

    def __init__(self, cu_q: Tensor, cu_k: Tensor | None) -> None:
        device = cu_q.device
        q_len = _lengths(cu_q, "cu_q")
        k_len = q_len if cu_k is None else _lengths(cu_k, "cu_k")
        if len(q_len) != len(k_len):
            raise ValueError(f"cu_k: bounds of {len(q_len)} sequences expected, as in cu_q, got {len(k_len)}")
        if bool((k_len < q_len).any()):
            raise ValueError("cu_k: a sequence has fewer keys than queries; bottom-right alignment leaves rows empty")
        kept = torch.nonzero(q_len > 0).flatten()
        order = kept[torch.argsort(k_len[kept], descending=True, stable=True)]
        self.groups = _bucket(k_len[order].tolist())
        self.num_queries, self.num_keys = int(q_len.sum()), int(k_len.sum())
        same = cu_k is None or torch.equal(q_len, k_len)
        index_q, self.padded_q, self.rows_q = _destinations(q_len, order, self.groups)
        self.masks: list[Tensor | None] = [None] * len(self.groups)
        if same:
            index_k, self.padded_k, self.rows_k = index_q, self.padded_q, self.rows_q
        else:
            index_k, self.padded_k, self.rows_k = self._key_destinations(k_len, order)
            self.masks = [self._mask(q_len[order[a:b]], k_len[order[a:b]]).to(device) for a, b in self.groups]
        # Equal lengths need no copy at all; the common case in tests, decoding and the first turn.
        self.index_q = None if _is_identity(index_q, self.rows_q) else index_q.to(device)
        if same:
            self.index_k = self.index_q
        else:
            self.index_k = None if _is_identity(index_k, self.rows_k) else index_k.to(device)

    def _key_destinations(self, k_len: Tensor, order: Tensor) -> tuple[Tensor, list[int], int]:
        """As `_destinations`, with one spare row at the end for the keys of sequences that have no query."""
        index, padded, rows = _destinations(k_len, order, self.groups)
        served = torch.zeros(len(k_len), dtype=torch.bool)
        served[order] = True
        if bool(served.all()):
            return index, padded, rows
        index[~torch.repeat_interleave(served, k_len)] = rows
        return index, padded, rows + 1

    @staticmethod
    def _mask(q_len: Tensor, k_len: Tensor) -> Tensor:
        """[S, 1, Lq, Lk] bool, True where a query may look; padded queries look at what keeps them finite."""
        rows = torch.arange(int(q_len.max()))[None, :, None]
        columns = torch.arange(int(k_len.max()))[None, None, :]
        return (columns <= rows + (k_len - q_len)[:, None, None])[:, None]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[0] != self.num_queries or k.shape[0] != self.num_keys or v.shape[0] != self.num_keys:
            raise ValueError(
                f"q, k, v: {self.num_queries} queries and {self.num_keys} keys expected from the sequence bounds, got "
                f"{q.shape[0]}, {k.shape[0]}, {v.shape[0]}"
            )
        if self.num_queries == 0:
            return torch.zeros_like(q)
        if self.index_q is not None:
            q = _Scatter.apply(q, self.index_q, self.rows_q)
        if self.index_k is not None:
            k = _Scatter.apply(k, self.index_k, self.rows_k)
            v = _Scatter.apply(v, self.index_k, self.rows_k)
        gqa = q.shape[1] != k.shape[1]
        outs: list[Tensor] = []
        start_q = start_k = 0
        for (a, b), len_q, len_k, mask in zip(self.groups, self.padded_q, self.padded_k, self.masks, strict=True):
            end_q, end_k = start_q + (b - a) * len_q, start_k + (b - a) * len_k
            batch_q = q[start_q:end_q].unflatten(0, (b - a, len_q)).transpose(1, 2)
            batch_k = k[start_k:end_k].unflatten(0, (b - a, len_k)).transpose(1, 2)
            batch_v = v[start_k:end_k].unflatten(0, (b - a, len_k)).transpose(1, 2)
            out = F.scaled_dot_product_attention(
                batch_q, batch_k, batch_v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa
            )
            outs.append(out.transpose(1, 2).flatten(0, 1))
            start_q, start_k = end_q, end_k
        padded = outs[0] if len(outs) == 1 else torch.cat(outs)
        return padded if self.index_q is None else _Gather.apply(padded, self.index_q)  # pyright: ignore[reportReturnType]


def _is_identity(index: Tensor, rows: int) -> bool:
    return rows == len(index) and bool(torch.equal(index, torch.arange(rows)))


# ------------------------------------------------------------------------------------------------------------- dispatch


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    backend: str = "auto",
    plan: _SdpaPlan | None = None,
) -> Tensor:
    """Causal attention of packed sequences, the last query aligned with the last key (bottom-right); GQA; autograd.

    Args:
        q: [Nq, Hq, D].
        k, v: [Nk, Hkv, D], Hq a multiple of Hkv.
        cu_q, cu_k: [S+1] int32 bounds on the device of `q`; `cu_k` None means the same as `cu_q`. A sequence has at
            least as many keys as queries.
        max_q, max_k: the longest sequence in queries and in keys; unused by `sdpa`.
        backend: "auto" or one of `BACKENDS`.
        plan: what `sdpa` worked out for the same bounds earlier; without it `sdpa` reads the bounds on the host.

    Returns:
        [Nq, Hq, D] in the dtype of `q`.

    Raises:
        ConfigError: the backend cannot be had here (see `choose_backend`).
        ValueError: bounds and tensors contradict each other (checked by `sdpa` only).
    """
    name, _ = choose_backend(q.device, q.dtype, backend, head_dim=q.shape[-1])
    if name == "sdpa":
        return (plan or _SdpaPlan(cu_q, cu_k))(q, k, v)
    cu_k = cu_q if cu_k is None else cu_k
    function, missing = _flash_attn_function() if name == "flash_attn" else _torch_varlen_function()
    assert function is not None, missing
    if name == "flash_attn":
        return function(q, k, v, cu_q, cu_k, max_q, max_k, causal=True)
    return function(q, k, v, cu_q, cu_k, max_q, max_k)


class PackedAttention:
    """`Attend` for packed sequences that are whole: no cache, queries and keys share their bounds.

    Args:
        cu_seqlens: [S+1] int32 bounds of the sequences, on the device of the tokens.
        max_seqlen: the longest sequence; None reads it from the device once, here.
        backend: "auto" or one of `BACKENDS`.

    Raises:
        ConfigError: an explicit backend that cannot be had (at construction on a CPU, else at the first layer).
        ValueError: bounds that do not start at 0 or that fall.
    """

    def __init__(self, cu_seqlens: Tensor, *, max_seqlen: int | None = None, backend: str = "auto") -> None:
        self.cu_seqlens = cu_seqlens
        self.requested = backend
        self._backend: str | None = None
        self._plan: _SdpaPlan | None = None
        if cu_seqlens.device.type != "cuda":  # nothing else serves a CPU: plan now, reuse in every layer
            self._backend, _ = choose_backend(cu_seqlens.device, torch.float32, backend)
            self._plan = _SdpaPlan(cu_seqlens, None)
        if max_seqlen is None:
            max_seqlen = int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0
        self.max_seqlen = max_seqlen

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`; `layer` is not used."""
        if self._backend is None:
            self._backend, _ = choose_backend(q.device, q.dtype, self.requested, head_dim=q.shape[-1])
        if self._backend == "sdpa":
            if self._plan is None:
                self._plan = _SdpaPlan(self.cu_seqlens, None)
            return self._plan(q, k, v)
        bounds, longest = self.cu_seqlens, self.max_seqlen
        return varlen_attention(q, k, v, bounds, bounds, longest, longest, backend=self._backend)
