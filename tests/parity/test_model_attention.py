"""Packed attention against the plain formula, one sequence at a time; values and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from coars_fast.model.attention import PackedAttention, varlen_attention


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of one sequence, bottom-right aligned: q [Nq, Hq, D], k and v [Nk, Hkv, D]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    visible = torch.ones(scores.shape[1:], dtype=torch.bool).tril(k.shape[0] - q.shape[0])
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -math.inf).softmax(-1), v)


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def inputs(num_q: int, num_k: int, heads: tuple[int, int], size: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_q + 7 * num_k)
    shapes = ((num_q, heads[0], size), (num_k, heads[1], size), (num_k, heads[1], size))
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


LENGTHS = {
    "one": [5],
    "equal": [6, 6, 6],
    "ragged": [1, 40, 3, 17, 90, 2, 88, 39],
    "empty": [0, 4, 0, 9, 0],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_packed_equals_one_by_one(lengths: list[int], heads: tuple[int, int]) -> None:
    total = sum(lengths)
    q, k, v = inputs(total, total, heads)
    out = PackedAttention(bounds(lengths))(0, q, k, v)
    pieces = [x.split(lengths) for x in (q, k, v)]
    expected = torch.cat([plain(*piece) for piece in zip(*pieces, strict=True)])
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    ours = torch.autograd.grad((out * weight).sum(), (q, k, v))
    reference = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for found, wanted in zip(ours, reference, strict=True):
        torch.testing.assert_close(found, wanted, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"),
    [([3], [10]), ([3, 1, 5], [3, 9, 60]), ([4, 0, 2], [7, 5, 2]), ([1, 1, 1], [4, 4, 4]), ([2, 2], [5, 5])],
)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_last_query_aligns_with_last_key(q_lengths: list[int], k_lengths: list[int], heads: tuple[int, int]) -> None:
    q, k, v = inputs(sum(q_lengths), sum(k_lengths), heads)
    out = varlen_attention(q, k, v, bounds(q_lengths), bounds(k_lengths), max(q_lengths), max(k_lengths))
    pieces = zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
    expected = torch.cat([plain(*piece) for piece in pieces])
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    ours = torch.autograd.grad(out.square().sum(), (q, k, v))
    reference = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for found, wanted in zip(ours, reference, strict=True):
        torch.testing.assert_close(found, wanted, atol=5e-6, rtol=1e-4)


def test_a_sequence_does_not_see_its_neighbours() -> None:
    lengths = [30, 5, 31]
    q, k, v = inputs(66, 66, (4, 2))
    attend = PackedAttention(bounds(lengths))
    before = attend(0, q, k, v)
    with torch.no_grad():
        k[35:], v[35:] = 1e4, float("nan")
    torch.testing.assert_close(attend(1, q, k, v)[:35], before[:35], atol=0, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the fused backends need a GPU")
@pytest.mark.parametrize("backend", ["flash_attn", "varlen_attn", "sdpa"])
@pytest.mark.parametrize("size", [64, 128])
def test_gpu_backends_equal_the_plain_formula(backend: str, size: int) -> None:
    from coars_fast.errors import ConfigError
    from coars_fast.model.attention import choose_backend

    try:
        choose_backend("cuda", torch.bfloat16, backend, head_dim=size)
    except ConfigError as error:
        pytest.skip(str(error))
    for q_lengths, k_lengths in (([70, 3, 129], [70, 3, 129]), ([5, 1, 64], [300, 17, 64])):
        q, k, v = (x.detach().cuda().bfloat16() for x in inputs(sum(q_lengths), sum(k_lengths), (8, 2), size))
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        args = bounds(q_lengths).cuda(), bounds(k_lengths).cuda(), max(q_lengths), max(k_lengths)
        out = varlen_attention(q, k, v, *args, backend=backend)
        exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
        pieces = zip(exact[0].split(q_lengths), exact[1].split(k_lengths), exact[2].split(k_lengths), strict=True)
        expected = torch.cat([plain(*piece) for piece in pieces])
        torch.testing.assert_close(out.cpu().double(), expected, atol=2e-2, rtol=2e-2)
        ours = torch.autograd.grad(out.float().square().sum(), (q, k, v))
        reference = torch.autograd.grad(expected.square().sum(), exact)
        for found, wanted in zip(ours, reference, strict=True):
            assert (found.cpu().double() - wanted).norm() <= 2e-2 * wanted.norm()
