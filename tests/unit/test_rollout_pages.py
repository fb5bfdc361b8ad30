"""Pages: who owns which, what forks share, what comes back."""

from __future__ import annotations

import pytest
import torch

from coars_fast.errors import PagesError, StaleCacheError
from coars_fast.rollout.pages import CachedSequence, PagePool, lazy_zeros


def make_pool(num_pages: int = 10, page_size: int = 4) -> PagePool:
    return PagePool(
        num_pages=num_pages, page_size=page_size, num_layers=2, num_kv_heads=2, head_dim=3,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip


def filled(pool: PagePool, length: int) -> CachedSequence:
    """A sequence of so many tokens, its memory full of its own numbers."""
    sequence = pool.new()
    pool.grow(sequence, length)
    pool.kv[:, sequence.pages] = torch.randn(pool.kv[:, sequence.pages].shape)
    sequence.length = length
    pool.check()
    return sequence


def content(pool: PagePool, sequence: CachedSequence) -> torch.Tensor:
    """[layers, heads, length, D]."""
    return pool.kv[:, sequence.pages].transpose(1, 2).flatten(2, 3)[:, :, : sequence.length].clone()


def test_growing_takes_pages_and_releasing_gives_them_back() -> None:
    pool = make_pool()
    sequence = pool.new()
    assert pool.num_free == 10
    for length, pages in ((1, 1), (4, 1), (5, 2), (3, 2), (17, 5)):
        assert pool.pages_to_grow(sequence, length) == max(0, pages - len(sequence.pages))
        pool.grow(sequence, length)
        assert len(sequence.pages) == pages and pool.num_used == pages
        pool.check([sequence])
    sequence.length = 6
    pool.trim(sequence)
    assert len(sequence.pages) == 2
    pool.release(sequence)
    pool.release(sequence)
    assert pool.num_free == 10
    pool.check()


def test_too_few_pages_take_nothing() -> None:
    pool = make_pool(3)
    sequence = filled(pool, 5)
    with pytest.raises(PagesError, match="2 more pages of 4 tokens are needed for 16 tokens, but 1 of 3 are free"):
        pool.grow(sequence, 16)
    assert len(sequence.pages) == 2 and pool.num_free == 1
    assert issubclass(PagesError, MemoryError)


def test_a_fork_shares_full_pages_and_copies_the_partial_one() -> None:
    pool = make_pool()
    trunk = filled(pool, 11)
    fork = pool.fork(trunk)
    assert fork.pages[:2] == trunk.pages[:2] and fork.pages[2] != trunk.pages[2]
    assert pool.num_used == 4
    assert torch.equal(content(pool, fork), content(pool, trunk))
    pool.check([trunk, fork])
    before = content(pool, trunk)
    pool.kv[:, fork.pages[2]] = 0.0
    assert torch.equal(content(pool, trunk), before)
    pool.release(trunk)
    pool.check([fork])
    assert pool.num_used == 3
    pool.release(fork)
    assert pool.num_used == 0


@pytest.mark.parametrize(("length", "shared", "used"), [(0, 0, 3), (4, 1, 3), (8, 2, 3), (3, 0, 4), (9, 2, 4)])
def test_a_fork_may_take_the_beginning_alone(length: int, shared: int, used: int) -> None:
    pool = make_pool()
    trunk = filled(pool, 11)
    fork = pool.fork(trunk, length)
    assert fork.length == length and fork.pages[:shared] == trunk.pages[:shared]
    assert pool.num_used == used
    assert torch.equal(content(pool, fork), content(pool, trunk)[:, :, :length])
    pool.check([fork])


def test_a_fork_without_room_takes_nothing() -> None:
    pool = make_pool(3)
    trunk = filled(pool, 11)
    with pytest.raises(PagesError, match="no page of 3 is free"):
        pool.fork(trunk)
    pool.check()
    assert pool.fork(trunk, 8).length == 8  # whole pages need none


def test_truncating_gives_pages_back_and_never_writes_a_shared_one() -> None:
    pool = make_pool()
    trunk = filled(pool, 15)
    fork = pool.fork(trunk, 12)
    before = content(pool, trunk)
    pool.truncate(fork, 12)
    assert fork.edits == 0
    pool.truncate(fork, 6)
    assert fork.length == 6 and fork.edits == 1 and len(fork.pages) == 2
    assert fork.pages[0] == trunk.pages[0] and fork.pages[1] != trunk.pages[1]
    pool.check([trunk, fork])
    pool.kv[:, fork.pages[1]] = 0.0
    assert torch.equal(content(pool, trunk), before)
    pool.truncate(trunk, 0)
    assert trunk.pages == [] and pool.num_used == 2


def test_truncating_into_a_shared_page_needs_one_for_the_copy() -> None:
    pool = make_pool(3)
    trunk = filled(pool, 12)
    fork = pool.fork(trunk)
    with pytest.raises(PagesError, match="no page of 3 is free to copy a shared one"):
        pool.truncate(fork, 6)
    assert fork.length == 12
    pool.check()
    pool.truncate(fork, 4)
    pool.check()


def test_dropping_all_ends_every_sequence() -> None:
    pool = make_pool()
    first, second = filled(pool, 5), filled(pool, 3)
    pool.drop_all()
    assert pool.num_used == 0
    third = filled(pool, 7)
    for old in (first, second):
        for use in (pool.require, pool.trim, pool.fork, lambda s: pool.grow(s, 9), lambda s: pool.truncate(s, 0)):
            with pytest.raises(StaleCacheError, match="weights have changed"):
                use(old)
        pool.release(old)
    assert pool.num_used == 2
    pool.check([third])
    assert issubclass(StaleCacheError, RuntimeError)


def test_the_kernels_see_keys_and_values_as_they_want_them() -> None:
    pool = make_pool()
    sequence = filled(pool, 6)
    keys, values = pool.layer(1)
    assert keys.shape == values.shape == (11, 4, 2, 3) and keys.stride(-1) == 1
    whole = content(pool, sequence)[1]
    for position in range(6):
        page, slot = sequence.pages[position // 4], position % 4
        assert torch.equal(keys[page, slot], whole[:2, position])
        assert torch.equal(values[page, slot], whole[2:, position])
    assert pool.scratch_page == 10 and 10 not in pool._free


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_lazy_zeros(dtype: torch.dtype) -> None:
    found = lazy_zeros((3, 0, 4), dtype, torch.device("cpu"))
    assert found.shape == (3, 0, 4) and found.dtype == dtype
    found = lazy_zeros((3, 5), dtype, torch.device("cpu"))
    assert torch.equal(found, torch.zeros(3, 5, dtype=dtype))
    found[1, 2] = 7.0
    assert found.sum() == 7.0
