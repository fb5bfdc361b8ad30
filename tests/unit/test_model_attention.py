"""The choice of an attention backend, and how packed sequences are padded."""

from __future__ import annotations

import logging

import pytest
import torch

from coars_fast.errors import ConfigError
from coars_fast.model import attention
from coars_fast.model.attention import PackedAttention, choose_backend, varlen_attention


def test_cpu_gets_sdpa_and_the_reason_names_the_others(caplog: pytest.LogCaptureFixture) -> None:
    attention._logged.clear()
    attention._choose.cache_clear()
    with caplog.at_level(logging.INFO, logger="coars_fast.model.attention"):
        name, reason = choose_backend("cpu", torch.float32)
        choose_backend("cpu", torch.float32)
        choose_backend("cpu", torch.float32, head_dim=8)
    assert name == "sdpa"
    assert "flash_attn" in reason and "varlen_attn" in reason and "CUDA" in reason
    assert len(caplog.records) == 1  # once, not once per layer


@pytest.mark.parametrize("requested", ["flash_attn", "varlen_attn"])
def test_an_explicit_request_that_cannot_be_met_says_why(requested: str) -> None:
    with pytest.raises(ConfigError, match=f"{requested}.*CUDA"):
        choose_backend("cpu", torch.float32, requested)
    with pytest.raises(ConfigError, match="CUDA"):
        PackedAttention(torch.tensor([0, 3], dtype=torch.int32), backend=requested)


def test_an_unknown_backend_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="xformers.*flash_attn, varlen_attn, sdpa"):
        choose_backend("cpu", torch.float32, "xformers")


def test_padding_is_bounded_for_ragged_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 400, (256,), generator=generator)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    plan = PackedAttention(bounds)._plan
    assert plan is not None
    assert plan.rows_q <= 1.25 * int(bounds[-1])
    assert len(plan.groups) <= 16


def test_equal_lengths_are_not_copied() -> None:
    plan = PackedAttention(torch.tensor([0, 4, 8, 12], dtype=torch.int32))._plan
    assert plan is not None and plan.index_q is None


@pytest.mark.parametrize("bounds", [[1, 4], [0, 5, 3], [[0, 1]]])
def test_bounds_that_are_none(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_q"):
        PackedAttention(torch.tensor(bounds, dtype=torch.int32), max_seqlen=4)


def test_bounds_that_do_not_fit_the_tensors() -> None:
    attend = PackedAttention(torch.tensor([0, 4, 9], dtype=torch.int32))
    with pytest.raises(ValueError, match="9 queries"):
        attend(0, *(torch.zeros(8, 2, 4) for _ in range(3)))


def test_fewer_keys_than_queries_are_refused() -> None:
    q, k = torch.zeros(4, 2, 4), torch.zeros(3, 2, 4)
    bounds = torch.tensor([0, 4]), torch.tensor([0, 3])
    with pytest.raises(ValueError, match="cu_k"):
        varlen_attention(q, k, k, *bounds, 4, 3)


def test_no_tokens_at_all() -> None:
    for bounds in ([0], [0, 0]):
        attend = PackedAttention(torch.tensor(bounds, dtype=torch.int32))
        assert attend(0, torch.zeros(0, 4, 8), torch.zeros(0, 2, 8), torch.zeros(0, 2, 8)).shape == (0, 4, 8)
