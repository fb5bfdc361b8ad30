"""Adapters written here load in PEFT and mean the same there, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from coars_fast.model.attention import PackedAttention
from coars_fast.model.decoder import Decoder
from coars_fast.model.load import load_decoder
from coars_fast.model.lora import adapter_state, add_adapters, load_peft, save_peft
from tests.model_checkpoints import write_checkpoint

peft = pytest.importorskip("peft")


def decoder_with_noise(folder: Path, **options: Any) -> Decoder:
    decoder = load_decoder(folder)
    add_adapters(decoder, rank=4, alpha=6.0, **options)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.2)
    return decoder


@torch.no_grad()
def logits(decoder: Decoder, token_ids: torch.Tensor, agent: int) -> torch.Tensor:
    bounds = torch.tensor([0, len(token_ids)], dtype=torch.int32)
    agents = torch.full((len(token_ids),), agent, dtype=torch.int8)
    hidden = decoder(token_ids, torch.arange(len(token_ids)), PackedAttention(bounds), agents)
    return hidden @ decoder.head_weight.T


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_our_adapter_in_peft(family: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "base", family)
    targets = {"targets": ("q_proj", "v_proj", "down_proj")} if family == "llama" else {}
    decoder = decoder_with_noise(tmp_path / "base", **targets)
    token_ids = torch.randint(0, 61, (50,), generator=torch.Generator().manual_seed(2))
    for agent in (0, 1):
        folder = tmp_path / f"agent{agent}"
        save_peft(decoder, agent, folder, str(tmp_path / "base"))
        theirs = peft.PeftModel.from_pretrained(model, folder)
        with torch.no_grad():
            expected = theirs(token_ids[None]).logits[0]
        model = theirs.unload()
        torch.testing.assert_close(logits(decoder, token_ids, agent), expected, atol=1e-4, rtol=0)
        assert (expected - logits(decoder, token_ids, -1)).abs().max() > 0.1


def test_peft_adapter_here(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "base", "qwen3")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=modules, task_type="CAUSAL_LM", init_lora_weights=False)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    decoder = decoder_with_noise(tmp_path / "base")
    other = adapter_state(decoder, 0)
    load_peft(decoder, 1, tmp_path / "adapter")
    token_ids = torch.randint(0, 61, (50,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(token_ids[None]).logits[0]
    torch.testing.assert_close(logits(decoder, token_ids, 1), expected, atol=1e-4, rtol=0)
    assert all(torch.equal(value, other[key]) for key, value in adapter_state(decoder, 0).items())


def test_fresh_adapters_start_as_in_peft(tmp_path: Path) -> None:
    """The same distribution of A (bounds and spread), and B zero."""
    write_checkpoint(tmp_path, "qwen3")
    decoder = load_decoder(tmp_path)
    add_adapters(decoder, rank=16, alpha=16.0, seed=5)
    for key, value in adapter_state(decoder, 0).items():
        if "lora_B" in key:
            assert not value.any()
        else:
            bound = value.shape[1] ** -0.5
            assert value.abs().max() <= bound
            assert value.std() == pytest.approx(bound / 3**0.5, rel=0.1)
