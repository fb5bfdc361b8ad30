"""The decoder against transformers: the same checkpoint, the same logits, for every family and way of storing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from coars_fast.model.attention import PackedAttention
from coars_fast.model.decoder import Decoder
from coars_fast.model.load import load_decoder, save_decoder
from tests.model_checkpoints import LLAMA3_ROPE, hf_model, write_checkpoint

LENGTHS = (7, 130, 1, 128, 90)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tied": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e3}}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tied": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied-bias": ("qwen3", {"tied": True, "attention_bias": True}),
}


def packed(lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random tokens [N], their positions [N], and the bounds [S+1]."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(0, 61, (sum(lengths),), generator=generator)
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    return token_ids, position_ids, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@torch.no_grad()
def our_logits(decoder: Decoder, *, agent_ids: torch.Tensor | None = None) -> torch.Tensor:
    token_ids, position_ids, bounds = packed()
    hidden = decoder(token_ids, position_ids, PackedAttention(bounds), agent_ids)
    return hidden @ decoder.head_weight.T


@torch.no_grad()
def hf_logits(model: Any) -> torch.Tensor:
    """Sequence by sequence, so that packing itself is under test."""
    token_ids, _, bounds = packed()
    pairs = zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    return torch.cat([model(token_ids[None, start:end]).logits[0] for start, end in pairs])


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    family, options = CASES[case]
    model = write_checkpoint(tmp_path, family, **options)
    torch.testing.assert_close(our_logits(load_decoder(tmp_path)), hf_logits(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_shards_load_like_one_file(family: str, tied: bool, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, family, tied=tied, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert not (tmp_path / "model.safetensors").exists()
    torch.testing.assert_close(our_logits(load_decoder(str(tmp_path))), hf_logits(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["llama3-rope", "linear-rope", "llama-biases", "qwen2", "qwen3-tied-bias"])
def test_saved_decoder_loads_in_transformers(case: str, tmp_path: Path) -> None:
    import transformers

    family, options = CASES[case]
    write_checkpoint(tmp_path / "theirs", family, **options)
    decoder = load_decoder(tmp_path / "theirs")
    save_decoder(decoder, tmp_path / "ours", hf_config_extra={"eos_token_id": 3})
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert model.config.eos_token_id == 3
    assert model.dtype == torch.float32
    torch.testing.assert_close(our_logits(decoder), hf_logits(model), atol=1e-4, rtol=0)
    again = load_decoder(tmp_path / "ours")
    assert again.config == decoder.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), decoder.parameters(), strict=True))


def test_old_spelling_of_rotary_fields(tmp_path: Path) -> None:
    """config.json from before transformers 5: rope_theta and rope_scaling, with `type` for `rope_type`."""
    from coars_fast.model.decoder import DecoderConfig

    new = DecoderConfig.from_hf(hf_model("llama", rope_parameters=LLAMA3_ROPE).config)
    raw = {name: value for name, value in new.to_hf().items() if name != "rope_parameters"}
    scaling = {name: value for name, value in LLAMA3_ROPE.items() if name not in ("rope_theta", "rope_type")}
    old = DecoderConfig.from_hf({**raw, "rope_theta": 10000.0, "rope_scaling": {**scaling, "type": "llama3"}})
    assert old == new
    plain = DecoderConfig.from_hf({**raw, "rope_theta": 5e5, "rope_scaling": None})
    assert (plain.rope_theta, plain.rope_scaling.kind) == (5e5, "default")


def test_gradients_of_every_weight_equal_transformers(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "qwen3", tied=True)
    decoder = load_decoder(tmp_path)
    token_ids, position_ids, bounds = packed((40,))
    loss = (decoder(token_ids, position_ids, PackedAttention(bounds)) @ decoder.head_weight.T).logsumexp(-1).sum()
    loss.backward()
    model(token_ids[None]).logits.logsumexp(-1).sum().backward()
    theirs = dict(model.named_parameters())
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointed_layers_change_no_gradient(frozen: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3")
    token_ids, position_ids, bounds = packed((20, 33))
    grads = []
    for checkpointing in (False, True):
        decoder = load_decoder(tmp_path)
        if frozen:
            decoder.requires_grad_(False)
            decoder.layers[0].mlp.up_proj.weight.requires_grad_(True)
        decoder.gradient_checkpointing = checkpointing
        decoder(token_ids, position_ids, PackedAttention(bounds)).square().sum().backward()
        grads.append([p.grad for p in decoder.parameters() if p.requires_grad and p.grad is not None])
    assert grads[0] and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3")
    reference = our_logits(load_decoder(tmp_path))
    rounded = our_logits(load_decoder(tmp_path, dtype=torch.bfloat16)).float()
    model = hf_model("qwen3").to(torch.bfloat16)
    ours, theirs = (rounded - reference).abs().mean(), (hf_logits(model).float() - reference).abs().mean()
    assert ours <= 1.25 * theirs  # the error of the same arithmetic in the same dtype, plus a little
