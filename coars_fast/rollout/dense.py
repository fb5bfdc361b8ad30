"""Keys and values on a CPU: the sequences at work have theirs in dense rows beside the pages.

Gathering pages at each step would cost more than the attention itself. So a sequence that begins to work is copied from
its pages into a row once, is extended and decoded there, and what is new goes back to its pages after every call: pages
are always complete, and a row is a copy that may be dropped at any time. Rows at work stand side by side, so that a
batch is a slice and never a copy.

Shape suffixes: N packed tokens, B sequences, T positions of a row, L longest new part, Hq/Hkv heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coars_fast.rollout.pages import CachedSequence, PagePool, lazy_zeros

WIDTHS = 8
"""Attention looks at multiples of so many positions, so that views of the memory serve several steps."""


class DenseRows:
    """Copies of sequences, [layers, rows, 2 Hkv, T, D], each valid up to its sequence's length.

    Args:
        pool: what the rows are copies of.
    """

    def __init__(self, pool: PagePool):
        self.pool = pool
        self.occupants: list[tuple[CachedSequence, int]] = []
        """Whose copy each row is, and after how many edits."""
        self.row_of: dict[CachedSequence, int] = {}
        self._set(self._zeros(0, 0))

    def _zeros(self, rows: int, width: int) -> Tensor:
        layers, _, heads, _, size = self.pool.kv.shape
        return lazy_zeros((layers, rows, heads, width, size), self.pool.kv.dtype, self.pool.kv.device)

    def _set(self, kv: Tensor) -> None:
        self.kv, self.width, self.heads = kv, kv.shape[3], kv.shape[2]
        self.flat = [layer.flatten(0, 2) for layer in kv]
        """By layer [rows * 2 Hkv * T, D]."""
        self._views: dict[tuple[int, int, int], list[tuple[Tensor, Tensor]]] = {}

    def places(self, row_N: np.ndarray, position_N: np.ndarray) -> Tensor:
        """[N * 2 Hkv] where tokens lie in `flat`."""
        place_N1 = (row_N * self.heads * self.width + position_N)[:, None]
        return torch.from_numpy((place_N1 + np.arange(self.heads) * self.width).reshape(-1))

    def views(self, first: int, end: int, width: int) -> list[tuple[Tensor, Tensor]]:
        """By layer, keys and values [end - first, Hkv, width, D] of neighbouring rows."""
        found = self._views.get((first, end, width))
        if found is None:
            if len(self._views) > 64:
                self._views.clear()
            half, used = self.heads // 2, self.kv[:, first:end, :, :width]
            found = list(zip(used[:, :, :half].unbind(), used[:, :, half:].unbind(), strict=True))
            self._views[first, end, width] = found
        return found

    def clear(self) -> None:
        """Forget all copies."""
        self.occupants, self.row_of = [], {}

    def reserve(self, rows: int, length: int) -> None:
        """Make room for `rows` rows of `length` tokens."""
        old_rows, old_width = self.kv.shape[1], self.width
        if rows <= old_rows and length <= old_width:
            return
        unit = math.lcm(WIDTHS, self.pool.page_size)
        # Longer than is asked for, since growing copies. Rows grow seldom: a run begins with its full batch.
        grown = self._zeros(max(rows, old_rows), old_width if length <= old_width else -(-2 * length // unit) * unit)
        used = len(self.occupants)
        if used:
            longest = max(sequence.length for sequence, _ in self.occupants)
            grown[:, :used, :, :longest] = self.kv[:, :used, :, :longest]
        self._set(grown)

    def keep(self, sequences: Sequence[CachedSequence]) -> None:
        """Drop the copies of all other sequences, of edited and of released ones, and close the gaps."""
        wanted = set(sequences)
        kept = [r for r, (s, n) in enumerate(self.occupants) if s in wanted and s.edits == n and not s.released]
        count = len(kept)
        movers = [row for row in kept if row >= count]
        if movers:
            holes = sorted(set(range(count)).difference(kept))
            for hole, row in zip(holes, movers, strict=True):
                length = self.occupants[row][0].length
                self.kv[:, hole, :, :length] = self.kv[:, row, :, :length]
                self.occupants[hole] = self.occupants[row]
        if count < len(self.occupants):
            del self.occupants[count:]
            self.row_of = {s: row for row, (s, _) in enumerate(self.occupants)}

    def enter(self, sequences: Sequence[CachedSequence]) -> int:
        """Copy sequences into new rows, one after the other behind those in use; returns the first."""
        first = len(self.occupants)
        for row, sequence in enumerate(sequences, start=first):
            self.occupants.append((sequence, sequence.edits))
            self.row_of[sequence] = row
        pages, blocks = self._blocks([(sequence, 0, sequence.length) for sequence in sequences])
        if len(pages):
            self._in_pages(self.kv).index_copy_(1, blocks, self._in_pages(self.pool.kv).index_select(1, pages))
        return first

    def append(self, sequences: Sequence[CachedSequence], counts: Sequence[int]) -> None:
        """So many more tokens of each sequence are cached, in its row: write them to its pages."""
        parts = []
        for sequence, count in zip(sequences, counts, strict=True):
            parts.append((sequence, sequence.length, sequence.length + count))
            sequence.length += count
        pages, blocks = self._blocks(parts)
        if len(pages):
            self._in_pages(self.pool.kv).index_copy_(1, pages, self._in_pages(self.kv).index_select(1, blocks))

    def _in_pages(self, kv: Tensor) -> Tensor:
        """[layers, pieces, page_size * D] of the pool's memory or of the rows': one head's share of a page each."""
        return kv.view(len(kv), -1, self.pool.page_size * kv.shape[-1])

    def _blocks(self, parts: Sequence[tuple[CachedSequence, int, int]]) -> tuple[Tensor, Tensor]:
        """The pieces that hold tokens [start, end) of sequences, in the pool and in the rows; whole pages."""
        size, pages, blocks = self.pool.page_size, [], []
        per_head = self.width // size
        for sequence, start, end in parts:
            if start < end:
                first, last = start // size, -(-end // size)
                pages += sequence.pages[first:last]
                base = self.row_of[sequence] * self.heads * per_head
                blocks += range(base + first, base + last)
        heads = np.arange(self.heads)
        page_M = (np.array(pages, dtype=np.int64)[:, None] * self.heads + heads).reshape(-1)
        block_M = (np.array(blocks, dtype=np.int64)[:, None] + heads * per_head).reshape(-1)
        return torch.from_numpy(page_M), torch.from_numpy(block_M)


class _Queries:
    """Attention of some of the newest tokens of neighbouring rows, each to its own row up to itself.

    Args:
        rows: memory.
        first: the first row.
        starts: position of each row's first query.
        lengths: how many queries each row has, at least 1. Rows of similar lengths should stand side by side.
    """

    def __init__(self, rows: DenseRows, first: int, starts: Sequence[int], lengths: Sequence[int]):
        self.rows = rows
        start_B, self.lengths_B = np.array(starts), np.array(lengths)
        self.single = max(lengths) == 1
        if self.single:
            self.positions = start_B
            self.place = (first, first + len(starts), self._round(max(starts) + 1))
            self.mask = self._mask(start_B, self.place[2])[:, None, None]
            return
        self.within = np.arange(sum(lengths)) - (self.lengths_B.cumsum() - self.lengths_B).repeat(lengths)
        self.positions = start_B.repeat(lengths) + self.within
        self.groups: list[_Group] = []
        taken = 0
        for a, b in _similar(lengths):
            tokens = slice(taken, taken := taken + sum(lengths[a:b]))
            self.groups.append(self._group(first + a, start_B[a:b], self.lengths_B[a:b], tokens))

    def _round(self, width: int) -> int:
        return min(-(-width // WIDTHS) * WIDTHS, self.rows.width)

    def _mask(self, newest: np.ndarray, width: int) -> Tensor:
        """0 for positions up to `newest` [...], -inf beyond: [..., width]."""
        beyond = torch.from_numpy(np.arange(width) > newest[..., None])
        return torch.zeros(beyond.shape, dtype=self.rows.kv.dtype).masked_fill_(beyond, float("-inf"))

    def _group(self, first: int, start_B: np.ndarray, lengths_B: np.ndarray, tokens: slice) -> _Group:
        count, longest, mask, index = len(start_B), int(lengths_B.max()), None, None
        width = self._round(int((start_B + lengths_B).max()))
        if start_B.any():
            mask = self._mask(start_B[:, None] + np.arange(longest), width)[:, None]
        if lengths_B.min() < longest:
            row = np.arange(count).repeat(lengths_B)
            index = torch.from_numpy(row * longest + self.within[tokens])
        return _Group(tokens, (first, first + count, width), longest, mask, index)

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        """q [n, Hq, D] -> [n, Hq * D]."""
        if self.single:
            keys, values = self.rows.views(*self.place)[layer]
            (count, heads, size), kv_heads = q.shape, keys.shape[1]
            folded = q.view(count, kv_heads, heads // kv_heads, size)  # queries of one head of keys: none is repeated
            return F.scaled_dot_product_attention(folded, keys, values, attn_mask=self.mask).reshape(count, -1)
        outs = [group.attend(q[group.tokens], *self.rows.views(*group.place)[layer]) for group in self.groups]
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def _similar(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Cut lengths into neighbours [start, end) that are not much shorter than their longest."""
    groups, start, longest, shortest = [], 0, lengths[0], lengths[0]
    for i, length in enumerate(lengths):
        longest, shortest = max(longest, length), min(shortest, length)
        if longest - shortest > max(16, longest // 5):
            groups.append((start, i))
            start, longest, shortest = i, length, length
    groups.append((start, len(lengths)))
    return groups


@dataclass
class _Group:
    """Neighbouring rows that are padded to one length."""

    tokens: slice
    """Theirs among the packed ones."""
    place: tuple[int, int, int]
    """First row, end and width, for `DenseRows.views`."""
    longest: int
    mask: Tensor | None
    """[B, 1, L, width]; None where nothing was cached, and causality is all."""
    index: Tensor | None
    """Where each token stands in the padded batch; None where all rows are of one length."""

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q [n, Hq, D] -> [n, Hq * D]."""
        if self.index is not None:
            rows = (self.place[1] - self.place[0]) * self.longest
            q = q.new_zeros(rows, *q.shape[1:]).index_copy_(0, self.index, q)
        out = F.scaled_dot_product_attention(
            q.view(-1, self.longest, *q.shape[1:]).transpose(1, 2),
            keys,
            values,
            attn_mask=self.mask,
            is_causal=self.mask is None,
            enable_gqa=q.shape[1] != keys.shape[1],
        )
        out = out.transpose(1, 2).reshape(len(q), -1)
        return out if self.index is None else out.index_select(0, self.index)


@dataclass
class Segment:
    """Neighbouring rows of one memory that are fed tokens."""

    rows: DenseRows
    first: int
    """The first row."""
    starts: Sequence[int]
    """Where the new tokens of each row begin."""
    lengths: Sequence[int]
    """How many each gets, at least 1."""
    needed: Sequence[int]
    """Of how many of its last tokens the hidden state is wanted."""


class DenseAttend:
    """`CachedAttend` of one forward pass over segments, whose tokens come one segment after the other.

    Attributes:
        positions: [N] of all tokens.
        last: [n] which of them are needed; None for all.
        last_positions: [n] of these.
    """

    def __init__(self, segments: Sequence[Segment]):
        self.parts: list[tuple[DenseRows, Tensor, _Queries, _Queries]] = []
        last: list[int] = []
        start = 0
        for segment in segments:
            rows, first, starts, lengths, needed = vars(segment).values()
            queries = wanted = _Queries(rows, first, starts, lengths)
            if sum(needed) < sum(lengths):
                later = [a + n - m for a, n, m in zip(starts, lengths, needed, strict=True)]
                wanted = _Queries(rows, first, later, needed)
            places = rows.places(np.arange(first, first + len(starts)).repeat(lengths), queries.positions)
            self.parts.append((rows, places, queries, wanted))
            for length, count in zip(lengths, needed, strict=True):
                start += length
                last += range(start - count, start)
        self.positions = torch.from_numpy(np.concatenate([part[2].positions for part in self.parts]))
        self.last, self.last_positions = None, self.positions
        if len(last) < start:
            self.last = torch.tensor(last)
            self.last_positions = torch.from_numpy(np.concatenate([part[3].positions for part in self.parts]))

    def __call__(self, layer: int, q: Tensor, kv: Tensor, last: Tensor | None) -> Tensor:
        """See `CachedAttend`."""
        outs, start, start_q = [], 0, 0
        for rows, places, queries, wanted in self.parts:
            asked = queries if last is None else wanted
            end, end_q = start + len(queries.positions), start_q + len(asked.positions)
            rows.flat[layer].index_copy_(0, places, kv[start:end].reshape(-1, kv.shape[2]))
            outs.append(asked(layer, q[start_q:end_q]))
            start, start_q = end, end_q
        return outs[0] if len(outs) == 1 else torch.cat(outs)
