"""K/V memory of conversations: one row per sequence, kept across turns.

The simple form: dense [sequences, heads, capacity, head size] per layer, grown as conversations grow. It works for any
decoder that takes an `attend` object; paged memory comes with the rollout engine.

Shape suffixes: B sequences of one call, N new tokens, T cached positions, L longest new part, Hq/Hkv heads, D head
size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GROWTH = 64


class KVCache:
    """Keys and values of `num_sequences` sequences; `lengths[s]` says how many tokens of sequence s are cached."""

    def __init__(
        self,
        *,
        num_sequences: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.lengths = [0] * num_sequences
        shape = (num_sequences, num_kv_heads, 0, head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.capacity = 0

    def reserve(self, length: int) -> None:
        """Make room for sequences of `length` tokens."""
        if length <= self.capacity:
            return
        extra = -(-(length - self.capacity) // GROWTH) * GROWTH
        # Zeros, not garbage: a masked position has weight 0, and 0 * NaN would still be NaN.
        self.keys = [F.pad(x, (0, 0, 0, extra)) for x in self.keys]
        self.values = [F.pad(x, (0, 0, 0, extra)) for x in self.values]
        self.capacity += extra


class CachedAttention:
    """`attend` for one forward pass that appends `new_lengths[b]` tokens to sequence `rows[b]` of a cache.

    Queries see their own sequence up to themselves. After the pass, call `commit`.

    Args:
        cache: memory with room reserved.
        rows: sequences, each at most once.
        new_lengths: how many packed tokens belong to each, at least 1.
    """

    def __init__(self, cache: KVCache, rows: Sequence[int], new_lengths: Sequence[int]):
        self.cache, self.rows, self.new_lengths = cache, list(rows), list(new_lengths)
        device = cache.keys[0].device
        starts = [cache.lengths[r] for r in self.rows]
        self.total = max(s + n for s, n in zip(starts, self.new_lengths, strict=True))
        assert self.total <= cache.capacity, "reserve room first"
        lengths = torch.tensor(self.new_lengths, device=device)
        self.longest = max(self.new_lengths)
        batch = torch.arange(len(self.rows), device=device)
        within = torch.cat([torch.arange(n, device=device) for n in self.new_lengths])
        self.token_batch = batch.repeat_interleave(lengths)
        self.token_within = within
        self.position_ids = torch.tensor(starts, device=device)[self.token_batch] + within
        self.token_rows = torch.tensor(self.rows, device=device)[self.token_batch]
        self.last = lengths.cumsum(0) - 1
        """[B] index of each sequence's last new token among the N packed ones."""
        query_positions = torch.tensor(starts, device=device)[:, None] + torch.arange(self.longest, device=device)
        self.mask = torch.arange(self.total, device=device) <= query_positions[:, None, :, None]  # [B, 1, L, T]
        first = self.rows[0]
        contiguous = self.rows == list(range(first, first + len(self.rows)))
        self.select = slice(first, first + len(self.rows)) if contiguous else torch.tensor(self.rows, device=device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, Hq, D], k and v [N, Hkv, D] of the new tokens -> [N, Hq, D]."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.token_rows, :, self.position_ids] = k
        values[self.token_rows, :, self.position_ids] = v
        if isinstance(self.select, slice):
            keys, values = keys[self.select, :, : self.total], values[self.select, :, : self.total]
        else:
            keys, values = keys[:, :, : self.total][self.select], values[:, :, : self.total][self.select]
        if self.longest == 1:
            padded = q[:, None]
        else:
            padded = q.new_zeros(len(self.rows), self.longest, *q.shape[1:])
            padded[self.token_batch, self.token_within] = q
        out = F.scaled_dot_product_attention(
            padded.transpose(1, 2), keys, values, attn_mask=self.mask, enable_gqa=q.shape[1] != k.shape[1]
        ).transpose(1, 2)
        return out[:, 0] if self.longest == 1 else out[self.token_batch, self.token_within]

    def commit(self) -> None:
        """Count the new tokens as cached."""
        for row, count in zip(self.rows, self.new_lengths, strict=True):
            self.cache.lengths[row] += count
