"""The Triton kernels of `sample_with_logprob` in the interpreter: the reference's noise bit for bit, and its tokens."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coars_kernels.sample_with_logprob import triton_sample
from coars_kernels.sample_with_logprob.reference import (
    KEY_START,
    key_starts,
    sample_with_logprob_reference,
    uniform_noise,
)
from coars_kernels.sample_with_logprob.triton_sample import sample_with_logprob_triton
from tests.kernels.credit_cases import poisoned_memory

SLAB = 32
SEEDS = [0, -1, 17, 2**63 - 1, -(2**63), 0x1234567890ABCDEF]


def assert_same(logits: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens are the reference's, log-probs are those of float64."""
    sizes = {name: options.pop(name) for name in ("slab", "merge_slabs") if name in options}
    with poisoned_memory():
        token, logp = sample_with_logprob_triton(logits, **{"slab": SLAB} | sizes, **options)
    expected, _ = sample_with_logprob_reference(logits, **options)
    assert token.dtype == torch.int64 and logp.dtype == torch.float32
    assert torch.equal(token, expected)
    exact = torch.log_softmax(logits.double() / (options["temperature"] or 1.0), -1).gather(1, token[:, None])[:, 0]
    assert ((logp - exact).abs() <= 5e-6 * exact.abs().clamp(min=1)).all() and (logp <= 0).all()
    return token, logp


@triton.jit
def noise_kernel(out, sequence_id, position, seed, start_0, start_1, vocab_size, BLOCK: tl.constexpr):
    row, index = tl.program_id(0), tl.arange(0, BLOCK)
    id, place = tl.load(sequence_id + row).to(tl.int64), tl.load(position + row).to(tl.int64)
    keys = triton_sample.noise_key(start_0, seed, id, place), triton_sample.noise_key(start_1, seed, id, place)
    tl.store(out + row * vocab_size + index, triton_sample.uniform(keys[0], keys[1], index), mask=index < vocab_size)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_noise_is_the_references_to_the_last_bit(seed: int, dtype: torch.dtype) -> None:
    bound = 2**31 if dtype == torch.int32 else 2**62
    ids, places = (torch.randint(-bound, bound, (4,)).to(dtype) for _ in range(2))
    for tensor, starts in ((None, key_starts(seed)), (torch.tensor(seed), KEY_START)):
        out = torch.full((4, 4000), torch.nan)
        noise_kernel[(4,)](out, ids, places, tensor, *map(triton_sample.signed, starts), 4000, BLOCK=4096)
        assert torch.equal(out, uniform_noise(seed, ids, places, 4000))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 4),
    vocab=st.sampled_from([1, 2, SLAB - 1, SLAB, SLAB + 1, 3 * SLAB, 7 * SLAB + 5]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    merge_slabs=st.sampled_from([2, 4, 16]),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    forbidden=st.sampled_from([0.0, 0.5, 0.97]),
    narrow=st.booleans(),
    seed=st.sampled_from(SEEDS),
    data=st.integers(0, 1000),
)
def test_any_row(
    rows: int, vocab: int, temperature: float, merge_slabs: int, spread: float, forbidden: float, narrow: bool,
    seed: int, data: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(data)
    logits = spread * torch.randn(rows, vocab, generator=generator) + 40
    closed = torch.rand(rows, vocab, generator=generator) < forbidden
    closed[:, data % vocab] = False
    logits[closed] = -torch.inf
    ids, position = (torch.randint(2**31, (rows,), generator=generator) for _ in range(2))
    if narrow:
        ids, position = ids.int(), position.int()
    assert_same(
        logits, seed=seed, sequence_id=ids.long() if not narrow else ids, position=position,
        temperature=temperature, merge_slabs=merge_slabs,
    )  # fmt: skip


def test_any_part_of_the_vocabulary_can_win() -> None:
    rows, vocab = 60, 5 * SLAB
    ids = torch.arange(rows)
    token, _ = assert_same(
        torch.zeros(rows, vocab), seed=3, sequence_id=ids, position=ids, temperature=1.0, merge_slabs=2
    )
    assert (token // SLAB).unique().numel() == 5


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros(4, 4 * SLAB)
    logits[1, 5:] = 1.0
    logits[2, SLAB + 3] = logits[2, 3 * SLAB] = 2.0
    logits[3, :SLAB] = -torch.inf
    ids = torch.arange(4)
    token, _ = assert_same(logits, seed=0, sequence_id=ids, position=ids, temperature=0.0, merge_slabs=2)
    assert token.tolist() == [0, 5, SLAB + 3, SLAB]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("where", [0, 5, SLAB + 3, 3 * SLAB])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number(value: float, where: int, temperature: float) -> None:
    """As the reference: the log-prob is NaN, and the token is in the vocabulary."""
    logits = torch.randn(3, 3 * SLAB + 7)
    logits[1, where] = value
    logits[2] = -torch.inf
    options = {"seed": 1, "sequence_id": torch.arange(3), "position": torch.arange(3), "temperature": temperature}
    token, logp = sample_with_logprob_triton(logits, slab=SLAB, merge_slabs=2, **options)
    expected, expected_logp = sample_with_logprob_reference(logits, **options)
    assert torch.equal(token, expected)
    torch.testing.assert_close(logp, expected_logp, equal_nan=True)
    assert logp.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_seed_may_be_a_tensor(temperature: float) -> None:
    logits, ids = torch.randn(6, 3 * SLAB), torch.arange(6)
    given = {"sequence_id": ids, "position": ids, "temperature": temperature}
    for seed in SEEDS:
        found = assert_same(logits, seed=seed, **given)
        for tensor in (torch.tensor(seed), torch.tensor([seed])):
            again = assert_same(logits, seed=tensor, **given)
            assert torch.equal(again[0], found[0]) and torch.equal(again[1], found[1])


def test_rows_may_lie_anywhere() -> None:
    wide = torch.randn(6, 2 * SLAB + 20)
    ids = torch.arange(12)[::2]
    for logits in (wide[:, 3 : 2 * SLAB], wide[::2].repeat(2, 1), wide[:1].expand(6, -1), wide.T.contiguous().T):
        assert_same(logits, seed=2, sequence_id=ids, position=ids, temperature=0.8)


def test_a_token_and_its_logp_do_not_depend_on_the_batch() -> None:
    logits, ids = 3 * torch.randn(9, 4 * SLAB + 1), torch.arange(9)
    token, logp = assert_same(logits, seed=2, sequence_id=ids, position=ids, temperature=1.0)
    for row in range(9):
        one = slice(row, row + 1)
        alone = assert_same(logits[one], seed=2, sequence_id=ids[one], position=ids[one], temperature=1.0)
        assert torch.equal(alone[0], token[one]) and torch.equal(alone[1], logp[one])
