"""K/V memory in pages: who owns which page, which are shared, and nothing else.

A sequence's token at position p lies in slot p % page_size of page `pages[p // page_size]`. Pages that are full may be
shared by a fork; the one that is written next never is. `drop_all` ends the life of every sequence at once, which is
what a change of the weights does. Left out: content-addressed caching (the scheduler knows which prompts are equal),
swapping to another memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from coars_fast.errors import PagesError, StaleCacheError


@dataclass(eq=False, slots=True)
class CachedSequence:
    """Tokens whose keys and values are in pages. Made, forked and released by a `PagePool` alone."""

    version: int
    """Of the weights that computed its keys and values."""
    length: int = 0
    """Tokens cached."""
    pages: list[int] = field(default_factory=list)
    """Enough for `length` tokens, and whatever is reserved beyond."""
    edits: int = 0
    """Grows when cached tokens are taken away: a copy kept elsewhere is then out of date."""
    released: bool = False


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose memory, on a CPU, is taken from the system when it is first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    return (
        torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape) if size else torch.zeros(shape, dtype=dtype)
    )


class PagePool:
    """Pages of one memory and the sequences in them.

    `kv` [layers, pages + 1, 2 Hkv, page_size, D] holds keys in the first Hkv heads and values in the others: what one
    head reads lies in one piece. The last page belongs to nobody: rows that stand for no sequence write there.

    Args:
        num_pages: how many can be handed out.
        page_size: tokens a page.
        num_layers, num_kv_heads, head_dim: of the decoder.
        dtype, device: of keys and values.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.num_pages, self.page_size, self.num_kv_heads = num_pages, page_size, num_kv_heads
        # Zeros, not garbage: a masked position has weight 0, and 0 * NaN would still be NaN.
        self.kv = lazy_zeros((num_layers, num_pages + 1, 2 * num_kv_heads, page_size, head_dim), dtype, device)
        self.version = 0
        self._clear()

    def _clear(self) -> None:
        self._free = list(range(self.num_pages - 1, -1, -1))  # the lowest first: what was touched before is used again
        self._owners = [0] * self.num_pages
        self._sequences: set[CachedSequence] = set()

    @property
    def scratch_page(self) -> int:
        """A page for what nobody reads."""
        return self.num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def pages_for(self, length: int) -> int:
        """How many pages hold `length` tokens."""
        return -(-length // self.page_size)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [pages + 1, page_size, Hkv, D] each: views, as the kernels take them."""
        kv = self.kv[index].transpose(1, 2)
        return kv[:, :, : self.num_kv_heads], kv[:, :, self.num_kv_heads :]

    # ------------------------------------------------------------------------------------------------------- sequences

    def new(self) -> CachedSequence:
        """A sequence without tokens or pages."""
        sequence = CachedSequence(self.version)
        self._sequences.add(sequence)
        return sequence

    def require(self, sequence: CachedSequence) -> None:
        """Raise unless the sequence may be read.

        Raises:
            StaleCacheError: the weights have changed since, or it was released.
        """
        if sequence.version != self.version:
            raise StaleCacheError("the weights have changed since this sequence was cached; begin a new one")
        if sequence not in self._sequences:
            raise StaleCacheError("this sequence was released; begin a new one")

    def pages_to_grow(self, sequence: CachedSequence, length: int) -> int:
        """Free pages that `grow` would take."""
        return max(0, self.pages_for(length) - len(sequence.pages))

    def grow(self, sequence: CachedSequence, length: int) -> None:
        """Reserve pages for `length` tokens in all.

        Raises:
            PagesError: too few are free; nothing was taken.
        """
        self.require(sequence)
        count = self.pages_to_grow(sequence, length)
        if count > len(self._free):
            raise PagesError(
                f"{count} more pages of {self.page_size} tokens are needed for {length} tokens, but {len(self._free)} "
                f"of {self.num_pages} are free: release sequences, or raise rollout.kv_gib"
            )
        for _ in range(count):
            sequence.pages.append(self._take())

    def trim(self, sequence: CachedSequence) -> None:
        """Give back what is reserved beyond the cached tokens."""
        self.require(sequence)
        self._give_back(sequence, self.pages_for(sequence.length))

    def truncate(self, sequence: CachedSequence, length: int) -> None:
        """Forget all tokens from position `length` on, and give back the pages behind it.

        Raises:
            PagesError: the page that is now partial is shared, and none is free for a copy.
        """
        self.require(sequence)
        assert 0 <= length <= sequence.length
        if length == sequence.length:
            self._give_back(sequence, self.pages_for(length))
            return
        whole = length // self.page_size
        if length % self.page_size and self._owners[sequence.pages[whole]] > 1:
            if not self._free and self._owners[sequence.pages[-1]] > 1:
                raise PagesError(f"no page of {self.num_pages} is free to copy a shared one; raise rollout.kv_gib")
            shared = sequence.pages[whole]
            self._give_back(sequence, whole + 1)
            sequence.pages[whole] = self._copy_of(shared)
            self._drop(shared)
        self._give_back(sequence, self.pages_for(length))
        sequence.length = length
        sequence.edits += 1

    def fork(self, sequence: CachedSequence, length: int | None = None) -> CachedSequence:
        """Another sequence with the same first tokens: full pages are shared, a partial one is copied.

        Args:
            sequence: stays as it is.
            length: how many tokens; None takes all that are cached.

        Raises:
            PagesError: no page is free for the copy; nothing was taken.
        """
        self.require(sequence)
        length = sequence.length if length is None else length
        assert 0 <= length <= sequence.length
        whole, partial = divmod(length, self.page_size)
        if partial and not self._free:
            raise PagesError(f"no page of {self.num_pages} is free for a fork's partial page; raise rollout.kv_gib")
        fork = self.new()
        fork.pages = sequence.pages[:whole]
        for page in fork.pages:
            self._owners[page] += 1
        if partial:
            fork.pages.append(self._copy_of(sequence.pages[whole]))
        fork.length = length
        return fork

    def release(self, sequence: CachedSequence) -> None:
        """Give back all pages; releasing twice, or after the weights changed, is nothing."""
        if sequence in self._sequences:
            self._sequences.remove(sequence)
            self._give_back(sequence, 0)
        sequence.released = True

    def drop_all(self) -> None:
        """Forget every sequence: the weights have changed."""
        for sequence in self._sequences:
            sequence.released = True
        self.version += 1
        self._clear()

    # ----------------------------------------------------------------------------------------------------------- pages

    def _take(self) -> int:
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self._owners[page] -= 1
        if not self._owners[page]:
            self._free.append(page)

    def _give_back(self, sequence: CachedSequence, keep: int) -> None:
        while len(sequence.pages) > keep:
            self._drop(sequence.pages.pop())

    def _copy_of(self, page: int) -> int:
        copy = self._take()
        self.kv[:, copy] = self.kv[:, page]
        return copy

    def check(self, running: Iterable[CachedSequence] = ()) -> None:
        """Assert that every page is free or owned as often as counted, and that what may be written is owned once.

        Args:
            running: sequences that are being written, whose reserved pages must be their own.
        """
        owned = Counter(page for sequence in self._sequences for page in sequence.pages)
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert not owned.keys() & set(self._free), "a page is both owned and free"
        assert len(owned) + len(self._free) == self.num_pages, "a page is lost"
        assert all(self._owners[page] == owned[page] for page in range(self.num_pages)), "owners are miscounted"
        for sequence in self._sequences:
            assert sequence.version == self.version and not sequence.released
            assert len(set(sequence.pages)) == len(sequence.pages), "a page holds two parts of a sequence"
            assert self.pages_for(sequence.length) <= len(sequence.pages), "tokens without a page"
            for page in sequence.pages[sequence.length // self.page_size :]:
                assert self._owners[page] == 1, "a page that will be written is shared"
        for sequence in running:
            assert sequence in self._sequences, "a running sequence was released"
