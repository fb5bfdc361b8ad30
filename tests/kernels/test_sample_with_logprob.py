"""`sample_with_logprob`: its noise is uniform and its own for every place, its frequencies are the softmax."""

from typing import Any

import pytest
import torch
from torch import Tensor

from coars_kernels import sample_with_logprob
from coars_kernels.sample_with_logprob import torch_sample
from coars_kernels.sample_with_logprob.op import _sample
from coars_kernels.sample_with_logprob.reference import (
    mix_,
    mix_int,
    sample_with_logprob_reference,
    uniform_noise,
)


def chi_square_z(counts: Tensor, expected: Tensor) -> float:
    """The chi-square statistic in standard deviations from its mean (Wilson-Hilferty); |z| > 4 is one in 16,000."""
    degrees = counts.numel() - 1
    ratio = float(((counts - expected).square() / expected).sum()) / degrees
    return (ratio ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5


def test_tensor_and_int_hash_agree() -> None:
    words = [0, 1, 2, 0x9E3779B9, 0xFFFFFFFF]
    assert mix_(torch.tensor(words)).tolist() == [mix_int(word) for word in words]
    assert all(0 <= mix_int(word) < 2**32 for word in words)


def test_noise_is_uniform() -> None:
    ids = torch.arange(500)
    noise = uniform_noise(11, ids, torch.zeros_like(ids), 400)
    assert noise.min() > 0 and noise.max() < 1
    counts = torch.histc(noise, 256, 0.0, 1.0)
    assert abs(chi_square_z(counts, torch.full_like(counts, noise.numel() / 256))) < 4


@pytest.mark.parametrize("axis", ["seed", "sequence", "sequence_high", "position", "vocabulary"])
def test_neighbours_are_uncorrelated(axis: str) -> None:
    ids, zeros = torch.arange(300), torch.zeros(300, dtype=torch.int64)
    first = uniform_noise(5, ids, zeros, 400)
    if axis == "seed":
        second = uniform_noise(6, ids, zeros, 400)
    elif axis == "sequence":
        second = uniform_noise(5, ids + 1, zeros, 400)
    elif axis == "sequence_high":
        second = uniform_noise(5, ids + 2**32, zeros, 400)
    elif axis == "position":
        second = uniform_noise(5, ids, zeros + 1, 400)
    else:
        first, second = uniform_noise(5, ids, zeros, 401)[:, :-1], uniform_noise(5, ids, zeros, 401)[:, 1:]
    # joint uniformity of (u, u') on a grid of 16 x 16
    cells = (first * 16).long() * 16 + (second * 16).long()
    counts = torch.bincount(cells.flatten(), minlength=256).double()
    assert abs(chi_square_z(counts, torch.full_like(counts, first.numel() / 256))) < 4


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("along", ["sequence", "position"])
def test_frequencies_are_the_softmax(temperature: float, along: str) -> None:
    draws = 40_000
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -torch.inf, -2.5, 0.5])
    moving, fixed = torch.arange(draws), torch.full((draws,), 3)
    token, logp = sample_with_logprob(
        logits.expand(draws, -1),
        seed=17,
        sequence_id=moving if along == "sequence" else fixed,
        position=fixed if along == "sequence" else moving,
        temperature=temperature,
    )
    expected = torch.softmax(logits / temperature, 0)
    counts = torch.bincount(token, minlength=7).double()
    assert counts[4] == 0
    possible = expected > 0
    assert abs(chi_square_z(counts[possible], draws * expected[possible].double())) < 4
    torch.testing.assert_close(logp, torch.log_softmax(logits / temperature, 0)[token], rtol=1e-6, atol=1e-6)


def test_a_token_does_not_depend_on_its_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 300, generator=generator) * 3
    ids, position = torch.randperm(1000, generator=generator)[:64], torch.randint(50, (64,), generator=generator)
    token, logp = sample_with_logprob(logits, seed=-9, sequence_id=ids, position=position)
    order = torch.randperm(64, generator=generator)
    shuffled, shuffled_logp = sample_with_logprob(
        logits[order], seed=-9, sequence_id=ids[order], position=position[order].int()
    )
    assert torch.equal(shuffled, token[order]) and torch.equal(shuffled_logp, logp[order])
    for row in range(0, 64, 13):
        one = slice(row, row + 1)
        alone, _ = sample_with_logprob(logits[one], seed=-9, sequence_id=ids[one], position=position[one])
        assert alone == token[one]
    other, _ = sample_with_logprob(logits, seed=-8, sequence_id=ids, position=position)
    assert not torch.equal(other, token)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (1, 300), (3, 128), (7, 129), (64, 1000), (5, 5000)])
@pytest.mark.parametrize("block", [1, 2**12, 2**17])
def test_is_the_reference_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, rows: int, vocab: int, temperature: float, block: int
) -> None:
    monkeypatch.setattr(torch_sample, "BLOCK_ELEMENTS", block)
    generator = torch.Generator().manual_seed(vocab)
    logits = 3 * torch.randn(rows, vocab, generator=generator)
    logits[:, 1::3] = -torch.inf
    seed, *_ = torch.randint(-(2**62), 2**62, (1,), generator=generator).tolist()
    places = [torch.randint(-(2**62), 2**62, (rows,), generator=generator) for _ in range(2)]
    for dtype in (torch.float32, torch.bfloat16):
        given: dict[str, Any] = {"seed": seed, "sequence_id": places[0], "position": places[1]}
        found = sample_with_logprob(logits.to(dtype), **given, temperature=temperature)
        expected = sample_with_logprob_reference(logits.to(dtype), **given, temperature=temperature)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logp_is_exact(dtype: torch.dtype) -> None:
    logits = (torch.randn(200, 1000, generator=torch.Generator().manual_seed(1)) * 6).to(dtype)
    ids = torch.arange(200)
    token, logp = sample_with_logprob(logits, seed=0, sequence_id=ids, position=ids)
    expected = torch.log_softmax(logits.double(), -1).gather(1, token[:, None]).squeeze(1)
    assert logp.dtype == torch.float32 and token.dtype == torch.int64
    assert ((logp - expected).abs() <= 5e-6 * expected.abs().clamp(min=1)).all()


def test_greedy_and_forbidden_tokens() -> None:
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(2))
    logits[:, 3:] -= 500.0
    logits[:, 0] = -torch.inf
    ids = torch.arange(50)
    token, logp = sample_with_logprob(logits, seed=0, sequence_id=ids, position=ids, temperature=0.0)
    assert torch.equal(token, logits.argmax(-1))
    torch.testing.assert_close(logp, torch.log_softmax(logits, -1).amax(-1))
    sampled, _ = sample_with_logprob(logits, seed=0, sequence_id=ids, position=ids)
    assert ((sampled == 1) | (sampled == 2)).all() and sampled.unique().numel() == 2
    only = torch.full((50, 20), -torch.inf)
    only[:, 7] = -1e4
    token, logp = sample_with_logprob(only, seed=0, sequence_id=ids, position=ids)
    assert (token == 7).all() and not logp.any()
    empty, _ = sample_with_logprob(logits[:0], seed=0, sequence_id=ids[:0], position=ids[:0])
    assert empty.shape == (0,)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 + 5, -(2**63) - 1])
def test_the_low_64_bits_of_a_seed_count(seed: int) -> None:
    logits, ids = torch.randn(20, 50), torch.arange(20)
    found = sample_with_logprob(logits, seed=seed, sequence_id=ids, position=ids)
    for same in (seed % 2**64, seed % 2**64 - 2**64, seed + 2**64):
        again = sample_with_logprob(logits, seed=same, sequence_id=ids, position=ids.int())
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    tensor = torch.tensor((seed % 2**64 ^ 2**63) - 2**63)
    for same in (tensor, tensor[None]):
        again = sample_with_logprob(logits, seed=same, sequence_id=ids, position=ids)
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    for same in (seed, tensor):
        reference = sample_with_logprob_reference(logits, seed=same, sequence_id=ids.int(), position=ids)
        assert torch.equal(found[0], reference[0])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_opcheck(temperature: float) -> None:
    ids = torch.arange(6)
    torch.library.opcheck(_sample, (torch.randn(6, 40), ids, ids.int(), -5, None, temperature))
    torch.library.opcheck(_sample, (torch.randn(6, 40), ids, ids, 0, torch.tensor(9), temperature))
    torch.library.opcheck(_sample, (torch.randn(0, 40).bfloat16(), ids[:0], ids[:0], 7, None, temperature))


def test_compiles_without_a_break() -> None:
    torch.compiler.reset()
    compiled = torch.compile(sample_with_logprob, fullgraph=True, backend="aot_eager")
    for rows, vocab in ((3, 40), (5, 41), (1, 300)):
        given: dict[str, Any] = {"seed": 2**63 + 9, "sequence_id": torch.arange(rows), "position": torch.arange(rows)}
        logits = torch.randn(rows, vocab, requires_grad=True)
        found, expected = (function(logits, **given) for function in (compiled, sample_with_logprob))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert not found[1].requires_grad


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("logits", {"logits": torch.zeros(3)}),
        ("logits", {"logits": torch.zeros(3, 0)}),
        ("logits", {"logits": torch.zeros(3, 4, dtype=torch.float64)}),
        ("sequence_id", {"sequence_id": torch.zeros(2, dtype=torch.int64)}),
        ("position", {"position": torch.zeros(3)}),
        ("seed", {"seed": torch.zeros(3, dtype=torch.int64)}),
        ("seed", {"seed": torch.tensor(1, dtype=torch.int32)}),
        ("temperature", {"temperature": -1.0}),
        ("temperature", {"temperature": float("nan")}),
    ],
)
def test_errors_name_the_argument(argument: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "logits": torch.zeros(3, 4),
        "seed": 0,
        "sequence_id": torch.arange(3),
        "position": torch.arange(3),
    }
    sample_with_logprob(**arguments)
    with pytest.raises(ValueError, match=f"^{argument}: "):
        sample_with_logprob(**(arguments | change))
