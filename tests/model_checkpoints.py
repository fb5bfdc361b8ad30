"""Tiny random checkpoints of the supported families, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}


def hf_model(family: str, *, tied: bool = False, seed: int = 0, **overrides: Any) -> Any:
    """A transformers causal LM of `family` with random weights, biases and norms included, fp32, in eval mode."""
    import transformers

    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}[family]
    fields = {**SMALL, "tie_word_embeddings": tied, **overrides}
    if family == "qwen3":
        fields.setdefault("head_dim", 12)  # not hidden / heads, as in the real models
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**fields)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():  # larger than in training, so that every part of the model shows in the logits
        for key, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1.0 + 0.2 * noise if "norm" in key else 0.15 * noise)
    return model


def write_checkpoint(
    folder: Path, family: str, *, tied: bool = False, max_shard_size: str = "5GB", seed: int = 0, **overrides: Any
) -> Any:
    """Save `hf_model(...)` as safetensors into `folder` and return it."""
    model = hf_model(family, tied=tied, seed=seed, **overrides)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
