"""The head's Triton kernels in the interpreter, against float64. Blocks are tiny, so that all loops and masks run."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coars_kernels.linear_logprob.rows import RowMasses
from coars_kernels.linear_logprob.triton_fused import FusedConfig, fused_masses
from coars_kernels.linear_logprob.triton_rows import jacobian_rows, row_masses

FP32_ERROR = 5e-6
BLOCK = 16
TILES = FusedConfig(block_rows=16, block_vocab=16, block_hidden=16, group_rows=3, num_warps=4, num_stages=2)


class Expected(NamedTuple):
    logp_C: Tensor
    entropy_C: Tensor
    gradient_CV: Tensor


def expected_of(logits_CV: Tensor, target_C: Tensor, temperature: float | Tensor = 1.0) -> Expected:
    """In float64, of logits to which the bias is already added; the target's own gradient is formed without 1 - p."""
    if isinstance(temperature, Tensor):
        temperature = temperature.double()[:, None]
    logits_CV, target_C1 = logits_CV.double() / temperature, target_C[:, None]
    peak_C1 = logits_CV.amax(1, keepdim=True)
    mass_CV = (logits_CV - peak_C1.where(peak_C1 != -torch.inf, 0.0)).exp()
    total_C1 = mass_CV.sum(1, keepdim=True)
    share_CV = mass_CV / total_C1.where(total_C1 > 0, 1.0)
    gradient_CV = -share_CV
    gradient_CV.scatter_(1, target_C1, share_CV.scatter(1, target_C1, 0.0).sum(1, keepdim=True))
    logp_C = torch.log_softmax(logits_CV, 1).gather(1, target_C1).squeeze(1)
    logp_C = logp_C.where(peak_C1.squeeze(1) != -torch.inf, -torch.inf)
    return Expected(logp_C, torch.special.entr(share_CV).sum(1), gradient_CV)


def hard_rows(vocab: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and targets of every kind of row that went wrong somewhere once; see the comments."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3.0 * torch.randn(14, vocab, generator=generator)
    target = torch.randint(vocab, (14,), generator=generator)
    target[1] = target[0]  # targets repeat
    own = torch.zeros(14, vocab).scatter_(1, target[:, None], 1.0)
    logits[1] += 25.0 * own[1]  # p > .999
    logits[2] += 60.0 * own[2]  # p = 1 in fp32
    logits[3] -= 50.0 * own[3]  # far down, and still one pass
    logits[4] -= 90.0 * own[4]  # logp < -80
    logits[5] -= 250.0 * own[5]  # logp < -200
    logits[6] += 1e4
    logits[7] -= 1e4
    logits[8] = -torch.inf  # no token is allowed
    logits[9].masked_fill_(own[9] == 1.0, -torch.inf)  # the target is forbidden
    logits[10].masked_fill_(own[10] == 0.0, -torch.inf)  # all but the target are forbidden
    logits[11, : vocab // 2] = -torch.inf
    logits[12] = -5e4  # all equal; 0 would be far above them
    logits[13] = 1e4 * logits[13]  # spread wide
    return logits, target


def assert_close(actual: Tensor, expected: Tensor, error: float) -> None:
    infinite = expected == -torch.inf
    assert torch.equal(actual == -torch.inf, infinite)
    difference = (actual.double() - expected).abs()[~infinite]
    assert (difference <= error * expected.abs().clamp(min=1.0)[~infinite]).all(), difference


def assert_rows(
    result: RowMasses, mass_CV: Tensor | None, target_C: Tensor, expected: Expected, mass_error: float = FP32_ERROR
) -> None:
    """logp within 5e-6 max(1, |logp|) and never above 0; each gradient entry within an error of what others share."""
    assert_close(result.logp_C, expected.logp_C, FP32_ERROR)
    assert (result.logp_C <= 0.0).all()
    if result.entropy_C is not None:
        # sums of mass * exponent with exponents up to |logp|
        scale = expected.logp_C.abs().where(expected.logp_C.isfinite(), 1.0).clamp(min=1.0)
        assert ((result.entropy_C.double() - expected.entropy_C).abs() <= 2 * FP32_ERROR * scale).all()
    if mass_CV is None:
        return
    target_C1 = target_C[:, None]
    assert (mass_CV.gather(1, target_C1) == 0.0).all()
    gradient_CV = -result.inverse_C.double()[:, None] * mass_CV.double()
    gradient_CV.scatter_(1, target_C1, result.others_C.double()[:, None])
    share_C1 = expected.gradient_CV.gather(1, target_C1)
    # a share below the smallest normal number of fp32 may come out as 0
    allowed_CV = (mass_error * expected.logp_C.abs().clamp(min=1.0, max=100.0))[:, None] * share_C1 + 1e-37
    error_CV = (gradient_CV - expected.gradient_CV).abs()
    assert (error_CV <= allowed_CV).all(), (error_CV / allowed_CV).amax(1)


def poisoned(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((rows, columns), torch.nan, dtype=dtype)


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 37, 64])
@pytest.mark.parametrize("where", ["beside", "in place", "half precision", "nowhere"])
def test_hard_rows(vocab: int, where: str) -> None:
    logits, target = hard_rows(vocab)
    expected = expected_of(logits, target)
    mass = {
        "beside": poisoned(14, vocab),
        "in place": logits,
        "half precision": poisoned(14, vocab, torch.float16),
        "nowhere": None,
    }[where]
    result = row_masses(logits, target, mass_CV=mass, want_entropy=True, block=BLOCK)
    assert_rows(result, mass, target, expected, 2**-11 if where == "half precision" else FP32_ERROR)
    assert vocab == 1 or ((expected.logp_C < -80).any() and (expected.logp_C > -1e-3).any())


def test_bias_and_temperatures() -> None:
    logits, target = hard_rows(41, seed=1)
    bias = torch.randn(41)
    bias[::5] = -torch.inf
    for temperature in (0.7, torch.rand(14) + 0.5):
        mass = poisoned(14, 41)
        result = row_masses(
            logits, target, bias_V=bias, temperature=temperature, mass_CV=mass, want_entropy=True, block=BLOCK
        )
        assert_rows(result, mass, target, expected_of(logits + bias, target, temperature))


def test_near_certain_tokens_keep_the_digits_of_logp() -> None:
    logits, target = torch.zeros(3, 20), torch.tensor([0, 5, 19])
    logits[torch.arange(3), target] = torch.tensor([12.0, 22.0, 40.0])
    result = row_masses(logits, target, mass_CV=None, block=BLOCK)
    others = 19.0 * torch.tensor([-12.0, -22.0, -40.0], dtype=torch.float64).exp()
    assert ((result.logp_C.double() + others.log1p()).abs() <= FP32_ERROR * others).all()


def test_rows_apart_from_each_other() -> None:
    # the buffers' rows stand further apart than V, and what is between them is not touched
    logits, target = hard_rows(21)
    wide_logits, wide_mass = poisoned(14, 32), poisoned(14, 24)
    wide_logits[:, :21] = logits
    result = row_masses(wide_logits[:, :21], target, mass_CV=wide_mass[:, :21], block=BLOCK)
    assert_rows(result, wide_mass[:, :21], target, expected_of(logits, target))
    assert wide_mass[:, 21:].isnan().all() and wide_logits[:, 21:].isnan().all()


def test_no_rows() -> None:
    result = row_masses(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), mass_CV=None, want_entropy=True)
    assert result.logp_C.shape == (0,) and result.entropy_C is not None and result.entropy_C.shape == (0,)


def test_what_is_not_finite_shows() -> None:
    # NaN or an overflow in another token's logit, and in the target's
    logits, target = torch.randn(4, 20), torch.tensor([0, 1, 2, 3])
    logits[0, 7], logits[1, 1], logits[2, 9], logits[3, 3] = torch.nan, torch.nan, torch.inf, torch.inf
    assert row_masses(logits, target, mass_CV=None, block=BLOCK).logp_C.isnan().all()
    assert row_masses(logits, target, mass_CV=logits, block=BLOCK).logp_C.isnan().all()
    for wrong in (torch.nan, torch.inf):
        bias, target = torch.zeros(20), torch.tensor([5, 0, 5, 1])
        bias[5] = wrong
        result, _ = fused_masses(torch.randn(4, 8), None, torch.randn(20, 8), target, bias_V=bias, config=TILES)
        assert result.logp_C.isnan().all()


def test_what_rounding_does_to_the_sum_of_masses_is_made_good() -> None:
    # all rows of W share a large part, which cancels from the gradient only if both of its sums have the same total
    logits, target = torch.randn(6, 40), torch.randint(40, (6,))
    weight = torch.randn(40, 8) + 100.0
    mass = poisoned(6, 40, torch.float16)
    result = row_masses(logits, target, mass_CV=mass, block=BLOCK)
    gradient = poisoned(6, 8)
    jacobian_rows(mass.float() @ weight, weight, target, result.others_C, result.inverse_C, 1.0, gradient, block=BLOCK)
    expected = expected_of(logits, target).gradient_CV @ weight.double()
    assert (gradient.double() - expected).norm() <= 2**-11 * expected.norm()


@pytest.mark.parametrize("in_place", [False, True])
def test_rows_do_not_see_each_other_and_repeats_are_identical(in_place: bool) -> None:
    logits, target = hard_rows(37)
    poison = logits.clone()
    poison[::2] = torch.nan
    runs = []
    for source in (logits.clone(), logits.clone(), poison):
        mass = source if in_place else poisoned(14, 37)
        result = row_masses(source, target, mass_CV=mass, want_entropy=True, block=BLOCK)
        runs.append((mass, *result))
    for first, second, third in zip(*runs, strict=True):
        assert torch.equal(first, second) and torch.equal(first[1::2], third[1::2])


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 4),
    vocab=st.integers(1, 70),
    block=st.sampled_from([2, 16, 64]),
    spread=st.sampled_from([0.0, 1.0, 30.0, 300.0]),
    in_place=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_rows(rows: int, vocab: int, block: int, spread: float, in_place: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(rows, vocab, generator=generator)
    target = torch.randint(vocab, (rows,), generator=generator)
    expected = expected_of(logits, target)
    mass = logits if in_place else poisoned(rows, vocab)
    assert_rows(row_masses(logits, target, mass_CV=mass, want_entropy=True, block=block), mass, target, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("row_temperature", [False, True])
def test_jacobian(dtype: torch.dtype, row_temperature: bool) -> None:
    product, weight = torch.randn(5, 24)[:, :21], torch.randn(9, 32).to(dtype)[:, :21]
    target = torch.tensor([8, 0, 0, 3, 4])
    others, inverse = torch.rand(5), torch.rand(5)
    temperature = torch.rand(5) + 0.5 if row_temperature else 0.7
    out = poisoned(5, 32, dtype)
    jacobian_rows(product, weight, target, others, inverse, temperature, out[:, :21], block=BLOCK)
    heat = temperature.double()[:, None] if isinstance(temperature, Tensor) else temperature
    expected = others.double()[:, None] * weight[target].double() - inverse.double()[:, None] * product.double()
    error = 1e-6 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(out[:, :21].double(), expected / heat, rtol=error, atol=error)
    assert out[:, 21:].isnan().all()


def hard_head(vocab: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets whose logits are exactly those of `hard_rows`, but for forbidden tokens."""
    logits, target = hard_rows(vocab, seed)
    return logits.masked_fill(logits == -torch.inf, -30.0), torch.eye(vocab), target


@pytest.mark.parametrize("vocab", [1, 2, 16, 37])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("mass_dtype", [torch.float32, torch.float16, None])
def test_fused_hard_rows(vocab: int, paired: bool, mass_dtype: torch.dtype | None) -> None:
    hidden, weight, target = hard_head(vocab)
    teacher = hidden.flip(0) if paired else None
    mass = None if mass_dtype is None else poisoned(14, vocab, mass_dtype)
    result, teacher_logp = fused_masses(
        hidden, teacher, weight, target, mass_CV=mass, want_entropy=vocab != 16, config=TILES
    )
    assert (result.entropy_C is None) == (vocab == 16)
    # fp16 masses of rows near p = 1 lose digits, as the module says; everything but the masses stays exact
    checked = mass if mass_dtype == torch.float32 else None
    assert_rows(result, checked, target, expected_of(hidden, target))
    assert mass is None or mass.isfinite().all()
    assert (teacher_logp is None) == (not paired)
    if teacher_logp is not None:
        assert_close(teacher_logp, expected_of(hidden.flip(0), target).logp_C, FP32_ERROR)


@pytest.mark.parametrize("forbidden", ["some", "targets", "all but one", "all"])
def test_fused_forbidden_tokens_and_temperatures(forbidden: str) -> None:
    hidden, weight, target = hard_head(37, seed=2)
    bias = torch.randn(37)
    tokens = {"some": slice(0, 37, 5), "targets": target, "all but one": slice(0, 36), "all": slice(None)}[forbidden]
    bias[tokens] = -torch.inf
    temperature = 0.7 if forbidden in ("some", "all") else torch.rand(14) + 0.5
    mass = poisoned(14, 48)  # V rounded up to 16
    result, teacher_logp = fused_masses(
        hidden, hidden, weight, target, bias_V=bias, temperature=temperature, mass_CV=mass, want_entropy=True,
        config=TILES,
    )  # fmt: skip
    assert_rows(result, mass[:, :37], target, expected_of(hidden + bias, target, temperature))
    assert teacher_logp is not None and torch.equal(teacher_logp, result.logp_C) and not mass[:, 37:].any()


def test_fused_beyond_every_block_and_against_the_rows() -> None:
    # more rows, tokens, tiles and columns than any kernel takes at a time; one row of each stream is repaired
    rows, vocab, hidden_size = 35, 270, 1030
    both, weight = torch.randn(2, rows, hidden_size) / hidden_size**0.5, torch.randn(vocab, hidden_size)
    target = torch.randint(vocab, (rows,))
    both[0, 3] -= 0.1 * weight[target[3]]
    both[1, 34] -= 0.1 * weight[target[34]]
    config = FusedConfig(16, 8, 256, 4, 4, 2)
    mass, row_mass = poisoned(rows, vocab), poisoned(rows, vocab)
    result, teacher_logp = fused_masses(*both, weight, target, mass_CV=mass, want_entropy=True, config=config)
    logits = (both.double() @ weight.double().T).float()
    expected = expected_of(logits[0], target)
    assert expected.logp_C[3] < -80
    assert_rows(result, mass, target, expected)
    by_rows = row_masses(logits[0], target, mass_CV=row_mass, want_entropy=True)
    for fused, alone in zip((*result, mass), (*by_rows, row_mass), strict=True):
        torch.testing.assert_close(fused, alone, rtol=2e-5, atol=2e-5)
    assert teacher_logp is not None
    assert_close(teacher_logp, expected_of(logits[1], target).logp_C, FP32_ERROR)


def test_fused_rows_do_not_see_each_other_and_repeats_are_identical() -> None:
    hidden, weight, target = hard_head(37)
    poison = hidden.clone()
    poison[::2] = torch.nan
    runs = []
    for student, teacher in ((hidden, hidden), (hidden, hidden), (poison, hidden)):
        mass = poisoned(14, 37)
        result, teacher_logp = fused_masses(
            student, teacher, weight, target, mass_CV=mass, want_entropy=True, config=TILES
        )
        runs.append((teacher_logp, mass, *result))
    for first, second, third in zip(*runs, strict=True):
        assert torch.equal(first, second) and torch.equal(first[1::2], third[1::2])
    assert torch.equal(runs[0][0], runs[2][0]) and runs[2][2][::2].isnan().all()


def test_fused_rows_apart_from_each_other() -> None:
    hidden, weight, target = hard_head(21)
    wide_hidden, wide_teacher, wide_weight = poisoned(14, 32), poisoned(14, 24), poisoned(21, 40)
    wide_hidden[:, :21], wide_teacher[:, :21], wide_weight[:, :21] = hidden, hidden, weight
    for columns in (21, 24):
        mass = poisoned(14, 32)
        result, teacher_logp = fused_masses(
            wide_hidden[:, :21], wide_teacher[:, :21], wide_weight[:, :21], target, mass_CV=mass[:, :columns],
            config=TILES,
        )  # fmt: skip
        assert_rows(result, mass[:, :21], target, expected_of(hidden, target))
        assert teacher_logp is not None and torch.equal(teacher_logp, result.logp_C)
        assert (mass[:, 21:columns] == 0).all() and mass[:, columns:].isnan().all()


def test_fused_no_rows() -> None:
    empty = torch.zeros(0, 4)
    result, teacher_logp = fused_masses(empty, empty, torch.zeros(5, 4), torch.zeros(0, dtype=torch.int64))
    assert result.logp_C.shape == (0,) and teacher_logp is not None and teacher_logp.shape == (0,)


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 20),
    vocab=st.integers(1, 50),
    hidden_size=st.integers(1, 40),
    group_rows=st.integers(1, 4),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_fused_any_shape(rows: int, vocab: int, hidden_size: int, group_rows: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    both = spread * torch.randn(2, rows, hidden_size, generator=generator) / hidden_size**0.5
    weight = torch.randn(vocab, hidden_size, generator=generator)
    target = torch.randint(vocab, (rows,), generator=generator)
    mass = poisoned(rows, vocab)
    config = TILES._replace(group_rows=group_rows)
    result, teacher_logp = fused_masses(*both, weight, target, mass_CV=mass, config=config)
    logits = both.double() @ weight.double().T
    # rounding of the logits themselves, which fp32 accumulation over H brings
    error = FP32_ERROR + 4e-7 * float(logits.abs().max())
    assert_close(result.logp_C, expected_of(logits[0], target).logp_C, error)
    assert teacher_logp is not None
    assert_close(teacher_logp, expected_of(logits[1], target).logp_C, error)
    assert (result.logp_C <= 0).all() and mass.isfinite().all()
