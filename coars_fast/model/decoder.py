"""One decoder for Llama, Qwen2 and Qwen3 checkpoints, in plain torch.

Parameter names are Hugging Face's, so a checkpoint loads without renaming. The tokens of all sequences come packed in
one dimension; who attends to whom is the caller's `attend` (see `attention.py`). Left out on purpose: the K/V cache
(the rollout's), the head's log-probs (the kernels'), dropout.

`embed`, `rope`, `layers` and `norm` are public because the two-stream training step runs layer by layer.

Shape suffixes: N tokens, H hidden size, V vocabulary, D head size.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coars_fast.model.attention import Attend
from coars_fast.model.config import DecoderConfig, RopeScaling

__all__ = ["Decoder", "DecoderConfig", "DecoderLayer", "Projection", "RMSNorm", "Rope", "RopeScaling", "Rows"]


class Rope(NamedTuple):
    """Rotary factors of N tokens, [N, 1, D] each, in the dtype of the hidden states.

    `sin` carries the sign of the rotated half: a rotation is x * cos + roll(x, D/2) * sin, three launches.
    """

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """[N, heads, D] -> the same, rotated to its positions."""
        return torch.addcmul(x * self.cos, x.roll(x.shape[-1] // 2, -1), self.sin)


class Rows(NamedTuple):
    """Which rows go on after a layer's attention, each at most once, and their agents."""

    kept: Tensor
    """[R] int64."""
    agent_ids: Any
    """As a layer takes them, for these rows."""


class Projection(nn.Linear):
    """A linear map that is told which agent each row belongs to; `lora.LoraLinear` makes use of it."""

    def reset_parameters(self) -> None:
        """Nothing: `Decoder` draws all weights itself, once, from its own generator."""

    def forward(self, x: Tensor, agent_ids: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x [N, in] -> [N, out]; `agent_ids` is ignored here."""
        return F.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension; statistics in fp32 whatever the input's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Projections, per-head norms (Qwen3) and rotation around the caller's attention."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        size, bias = config.hidden_size, config.attention_bias
        self.head_dim = config.head_dim
        self.q_proj = Projection(size, config.num_heads * config.head_dim, bias=bias)
        self.k_proj = Projection(size, config.num_kv_heads * config.head_dim, bias=bias)
        self.v_proj = Projection(size, config.num_kv_heads * config.head_dim, bias=bias)
        self.o_proj = Projection(config.num_heads * config.head_dim, size, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self, layer: int, x: Tensor, rope: Rope, attend: Attend, agent_ids: Any, rows: Rows | None = None
    ) -> Tensor:
        q = self.q_proj(x, agent_ids).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(x, agent_ids).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x, agent_ids).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out = attend(layer, rope.rotate(q), rope.rotate(k), v).flatten(1)
        return self.o_proj(out, agent_ids) if rows is None else self.o_proj(out[rows.kept], rows.agent_ids)


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Projection(size, inner, bias=config.mlp_bias)
        self.up_proj = Projection(size, inner, bias=config.mlp_bias)
        self.down_proj = Projection(inner, size, bias=config.mlp_bias)

    def forward(self, x: Tensor, agent_ids: Tensor | None) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x, agent_ids)) * self.up_proj(x, agent_ids), agent_ids)


class DecoderLayer(nn.Module):
    """One pre-norm transformer layer; `index` is what it tells `attend`."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, rope: Rope, attend: Attend, agent_ids: Any = None, rows: Rows | None = None
    ) -> Tensor:
        """hidden [N, H] -> [N, H]; `agent_ids` as in `Decoder.forward`. With `rows` only those R come out, [R, H]: the
        others take part as keys and values, which is all that a last layer needs of most tokens."""
        attended = self.self_attn(self.index, self.input_layernorm(hidden), rope, attend, agent_ids, rows)
        if rows is not None:
            hidden, agent_ids = hidden[rows.kept], rows.agent_ids
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden), agent_ids)


class _Body(nn.Module):
    """What Hugging Face calls `model`: everything but the head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList([DecoderLayer(config, i) for i in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A decoder-only language model up to its last hidden state.

    Args:
        config: the shape.
        generator: source of the random initial weights (normal, deviation 0.02, as Hugging Face does it; norms 1,
            biases 0); None uses torch's global one. On the meta device nothing is drawn.

    Attributes:
        gradient_checkpointing: recompute each layer in the backward pass instead of keeping its activations. `attend`
            is then called a second time for each layer.
    """

    def __init__(self, config: DecoderConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.model = _Body(config)
        self.lm_head = (
            None if config.tie_word_embeddings else Projection(config.hidden_size, config.vocab_size, bias=False)
        )
        # A plain attribute, so that it stays in fp32 when the weights are cast; `rope` moves it to the tokens' device.
        self._inverse_frequencies = inverse_frequencies(config)
        self._initialise(generator)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator | None) -> None:
        for name, parameter in self.named_parameters():
            if parameter.is_meta or name.endswith("norm.weight"):
                continue
            if name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, 0.02, generator=generator)

    @property
    def layers(self) -> list[DecoderLayer]:
        """The layers in order."""
        return list(self.model.layers)  # pyright: ignore[reportReturnType]

    @property
    def head_weight(self) -> Tensor:
        """[V, H]: what hidden states are multiplied with to get logits; the embedding itself where the two are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [N] -> hidden [N, H]."""
        return self.model.embed_tokens(token_ids)

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm, [N, H] -> [N, H]."""
        return self.model.norm(hidden)

    @torch.no_grad()
    def rope(self, position_ids: Tensor) -> Rope:
        """Rotary factors for position_ids [N]; angles in fp32, rounded to the weights' dtype at the end."""
        if self._inverse_frequencies.device != position_ids.device:
            self._inverse_frequencies = self._inverse_frequencies.to(position_ids.device)
        angles = torch.outer(position_ids.to(torch.float32), self._inverse_frequencies)
        cos, sin = angles.cos(), angles.sin()
        dtype = self.model.norm.weight.dtype
        cos = torch.cat((cos, cos), -1).to(dtype).unsqueeze(1)
        return Rope(cos, torch.cat((-sin, sin), -1).to(dtype).unsqueeze(1))

    def forward(
        self, token_ids: Tensor, position_ids: Tensor, attend: Attend, agent_ids: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            token_ids, position_ids: [N] integers, all sequences concatenated.
            attend: computes attention; called once per layer, in order.
            agent_ids: [N] int8 or int64, the adapter of each token, -1 for none; None runs the base model alone.

        Returns:
            [N, H] in the weights' dtype.
        """
        hidden, rope = self.embed(token_ids), self.rope(position_ids)
        for layer in self.model.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, rope, attend, agent_ids, use_reentrant=False)
            else:
                hidden = layer(hidden, rope, attend, agent_ids)
        return self.model.norm(hidden)


def inverse_frequencies(config: DecoderConfig) -> Tensor:
    """[D/2] fp32 rotary frequencies, on the CPU, after the config's scaling.

    `llama3` (Llama 3.1): wavelengths beyond original/low_freq_factor are stretched by `factor`, those under
    original/high_freq_factor are kept, and in between the two are blended.
    """
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / (config.rope_theta ** (steps / config.head_dim))
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return (1 - blend) * frequencies / scaling.factor + blend * frequencies
    return frequencies
