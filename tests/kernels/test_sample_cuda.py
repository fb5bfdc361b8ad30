"""`sample_with_logprob` on a GPU, where its Triton kernels run, against the reference on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from coars_kernels import sample_with_logprob
from coars_kernels.sample_with_logprob.reference import sample_with_logprob_reference
from coars_kernels.sample_with_logprob.torch_sample import sample_with_logprob_torch
from tests.kernels.credit_cases import poisoned_memory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(rows: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, vocab, generator=generator)
    logits[:, 1::5] = -torch.inf
    ids, position = (torch.randint(-(2**62), 2**62, (rows,), generator=generator) for _ in range(2))
    return logits.to(dtype).cuda(), {"seed": 2**63 + seed, "sequence_id": ids.cuda(), "position": position.cuda()}


def check(logits: Tensor, place: dict[str, Any], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs against float64; tokens are the reference's, but for races that rounding decides."""
    with poisoned_memory():
        (token, logp), again = (sample_with_logprob(logits, temperature=temperature, **place) for _ in range(2))
    assert torch.equal(again[0], token) and torch.equal(again[1], logp)
    exact = torch.log_softmax(logits.double() / (temperature or 1.0), -1).gather(1, token[:, None])[:, 0]
    assert ((logp - exact).abs() <= 5e-6 * exact.abs().clamp(min=1)).all() and (logp <= 0).all()
    there: dict[str, Any] = {name: value.cpu() if name != "seed" else value for name, value in place.items()}
    expected, _ = sample_with_logprob_reference(logits.cpu(), temperature=temperature, **there)
    different = int((token.cpu() != expected).sum())
    # one token in about a million: two of them here would be an error
    assert different <= (1 if temperature else 0), f"{different} of {len(token)} tokens"
    return token, logp


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 1023), (64, 1024), (7, 32001), (64, 152064), (2, 262144)])
def test_tokens_and_logps(rows: int, vocab: int, temperature: float, dtype: torch.dtype) -> None:
    check(*make(rows, vocab, dtype), temperature)


def test_frequencies_are_the_softmax() -> None:
    draws = 400_000
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -torch.inf, -2.5, 0.5], device="cuda")
    ids = torch.arange(draws, device="cuda")
    token, _ = sample_with_logprob(logits.expand(draws, -1), seed=3, sequence_id=ids, position=torch.full_like(ids, 9))
    counts, expected = torch.bincount(token, minlength=7).double(), draws * torch.softmax(logits.double(), 0)
    assert counts[4] == 0
    possible = expected > 0
    assert ((counts - expected).square() / expected)[possible].sum() < 25.7  # 5 degrees of freedom, one in 10,000


def test_equals_plain_torch_on_the_same_device() -> None:
    logits, place = make(64, 20_000, seed=1)
    found, plain = check(logits, place, 0.9), sample_with_logprob_torch(logits, temperature=0.9, **place)
    assert (found[0] != plain[0]).sum() <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_does_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    logits, place = make(200, 5003, dtype)
    token, logp = check(logits, place)
    order = torch.randperm(200).cuda()
    for rows in (order, order[:1], order[:17]):
        narrow = {name: place[name][rows] for name in ("sequence_id", "position")}
        some = sample_with_logprob(logits[rows], seed=place["seed"], **narrow)
        assert torch.equal(some[0], token[rows]) and torch.equal(some[1], logp[rows])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_no_number(temperature: float) -> None:
    logits, place = make(5, 4000)
    logits[1, 1500] = torch.nan
    logits[2, 2500] = torch.inf
    logits[3] = -torch.inf
    token, logp = sample_with_logprob(logits, temperature=temperature, **place)
    there: dict[str, Any] = {name: value.cpu() if name != "seed" else value for name, value in place.items()}
    expected, _ = sample_with_logprob_reference(logits.cpu(), temperature=temperature, **there)
    assert logp.isnan().tolist() == [False, True, True, True, False]
    assert torch.equal(token.cpu()[1:4], expected[1:4])


def test_a_graph_follows_its_inputs() -> None:
    logits, place = make(8, 30_000)
    place["seed"] = torch.zeros((), dtype=torch.int64, device="cuda")
    sample_with_logprob(logits, **place)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token, logp = sample_with_logprob(logits, **place)
    for seed in range(3):
        new, there = make(8, 30_000, seed=seed)
        logits.copy_(new)
        for name in ("sequence_id", "position"):
            place[name].copy_(there[name])
        place["seed"].fill_(seed - 5)
        token.fill_(-1)
        logp.fill_(torch.nan)
        graph.replay()
        expected = sample_with_logprob(logits, **place | {"seed": seed - 5})
        assert torch.equal(token, expected[0]) and torch.equal(logp, expected[1])


@pytest.mark.parametrize("function", [sample_with_logprob, sample_with_logprob_torch])
def test_does_not_wait_for_the_device(function: Any) -> None:
    logits, place = make(8, 3000)
    function(logits, **place)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(logits, **place)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles_without_a_break() -> None:
    logits, place = make(8, 3000)
    found = torch.compile(sample_with_logprob, fullgraph=True)(logits, **place)
    assert all(torch.equal(one, other) for one, other in zip(found, check(logits, place), strict=True))


def test_more_than_2_to_the_31_numbers() -> None:
    rows, vocab = 2**31 // 152064 + 3, 152064
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free device memory")
    small, place = make(4, vocab, torch.bfloat16)
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    logits[-4:] = small
    ids = torch.zeros(2, rows, dtype=torch.int64, device="cuda")
    ids[0, -4:], ids[1, -4:] = place["sequence_id"], place["position"]
    found = sample_with_logprob(logits, seed=place["seed"], sequence_id=ids[0], position=ids[1])
    expected = check(small, place)
    assert torch.equal(found[0][-4:], expected[0]) and torch.equal(found[1][-4:], expected[1])
