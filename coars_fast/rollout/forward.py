"""The decoder's forward pass as a rollout runs it: the same arithmetic as `model.decoder`, in fewer operations.

Projections are fused (`weights.py`), queries and keys are normalised and rotated together, results go to buffers that
all layers share, and the last layer of an extend computes what only the last tokens need for these alone. Left out:
gradients.

Shape suffixes: N packed tokens, n rows that are wanted, H hidden size, D head size, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from coars_fast.model.decoder import RMSNorm
from coars_fast.rollout.weights import Agents, Layer, Weights


class CachedAttend(Protocol):
    """Who stores new keys and values, and attends to all of a sequence's."""

    def __call__(self, layer: int, q: Tensor, kv: Tensor, last: Tensor | None) -> Tensor:
        """Store `kv`, then attend.

        Args:
            layer: index of the layer.
            q: [N, Hq, D], rotated; [n, Hq, D], those of the wanted tokens, where `last` is given.
            kv: [N, 2 Hkv, D]: rotated keys, then values.
            last: [n] index of the wanted tokens, or None for all.

        Returns:
            [N, Hq * D], or [n, Hq * D] where `last` is given.
        """
        ...


class _Buffers:
    """Where rows' projections go: memory that grows and is used again, and the parts of it for N rows."""

    def __init__(self, weights: Weights):
        config, layer = weights.decoder.config, weights.layers[0]
        self.like, self.head_dim = weights.head, config.head_dim
        self.num_heads, self.num_rotated = config.num_heads, config.num_heads + config.num_kv_heads
        self.sizes = (layer.qkv.outputs, layer.gate_up.outputs)
        self._memory = [self.like.new_empty(0, size) for size in self.sizes]
        self._rows = -1

    def resize(self, rows: int) -> None:
        """Be for so many rows."""
        if rows == self._rows:
            return
        if rows > len(self._memory[0]):
            self._memory = [self.like.new_empty(rows, size) for size in self.sizes]
        self._rows = rows
        self.qkv, self.gate_up = (memory[:rows] for memory in self._memory)
        heads = self.qkv.view(rows, -1, self.head_dim)
        self.q, self.kv = heads[:, : self.num_heads], heads[:, self.num_heads :]
        self.rotated = heads[:, : self.num_rotated]
        self.gate, self.up = self.gate_up.chunk(2, 1)


class Forward:
    """The decoder up to its last hidden state, and its logits.

    Args:
        weights: of the decoder; `refresh` them before calling this.
    """

    def __init__(self, weights: Weights):
        self.weights = weights
        self._cos = self._sin = torch.empty(0)
        self._buffers: dict[int, _Buffers] = {}

    def reserve_positions(self, length: int) -> None:
        """Have rotary factors for positions below `length` ready."""
        head = self.weights.head
        if len(self._cos) < length or self._cos.dtype != head.dtype or self._cos.device != head.device:
            rope = self.weights.decoder.rope(torch.arange(1 << max(8, length.bit_length()), device=head.device))
            self._cos, self._sin = rope.cos, rope.sin

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        agents: Agents,
        attend: CachedAttend,
        last: Tensor | None = None,
        last_agents: Agents | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens, positions: [N] int64.
            agents: adapter of each row.
            attend: stores and reads keys and values.
            last: [n] index of the rows that are wanted: the others' last layer stops at keys and values.
            last_agents: adapters of these.

        Returns:
            [N, H], or [n, H] where `last` is given.
        """
        weights, config = self.weights, self.weights.decoder.config
        half, final = config.head_dim // 2, config.num_layers - 1
        buffers = self._buffers_for(len(tokens), 0)
        hidden = F.embedding(tokens, weights.decoder.model.embed_tokens.weight)
        cos, sin = self._cos.index_select(0, positions), self._sin.index_select(0, positions)
        for index, layer in enumerate(weights.layers):
            layer.qkv.into(buffers.qkv, self._normalised(hidden, layer.source.input_layernorm), agents)
            q, kv, qk = buffers.q, buffers.kv, buffers.rotated
            if layer.head_norm is not None:
                qk = self._norm_heads(layer, qk, layer.head_norm)
            torch.addcmul(qk * cos, qk.roll(half, -1), sin, out=buffers.rotated)
            chosen = last if index == final else None
            if chosen is not None:
                assert last_agents is not None
                agents, q, hidden = last_agents, q.index_select(0, chosen), hidden.index_select(0, chosen)
                buffers = self._buffers_for(len(chosen), 1)
            layer.out.add_to(hidden, attend(index, q, kv, chosen), agents)
            layer.gate_up.into(buffers.gate_up, self._normalised(hidden, layer.source.post_attention_layernorm), agents)
            layer.down.add_to(hidden, F.silu(buffers.gate, inplace=True).mul_(buffers.up), agents)
        return weights.decoder.norm(hidden)

    def _normalised(self, hidden: Tensor, norm: RMSNorm) -> Tensor:
        """hidden [N, H] as the next projection takes it: merged ones hold the norm's weight themselves."""
        return F.rms_norm(hidden, norm.weight.shape, None if self.weights.merge else norm.weight, norm.eps)

    def _norm_heads(self, layer: Layer, qk: Tensor, weight: Tensor) -> Tensor:
        """Queries and keys [N, Hq + Hkv, D], each head normalised."""
        config = self.weights.decoder.config
        if qk.dtype == torch.float32:
            return F.rms_norm(qk, qk.shape[2:], None, config.rms_norm_eps).mul_(weight)
        # One rounding, as in training: in two bytes the product after the norm would be a second one.
        q_norm, k_norm = layer.source.self_attn.q_norm, layer.source.self_attn.k_norm
        assert q_norm is not None and k_norm is not None
        return torch.cat([q_norm(qk[:, : config.num_heads]), k_norm(qk[:, config.num_heads :])], 1)

    def _buffers_for(self, rows: int, which: int) -> _Buffers:
        head, known = self.weights.head, self._buffers.get(which)
        if known is None or known.like.dtype != head.dtype or known.like.device != head.device:
            known = self._buffers[which] = _Buffers(self.weights)
        known.resize(rows)
        return known

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, H] -> [n, V] fp32, accumulated in fp32."""
        weight = self.weights.head
        if hidden.is_cuda and hidden.dtype != torch.float32:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        if self.weights.merged_head is not None:
            return self.weights.merged_head(hidden)
        return torch.mm(hidden.float(), weight.T.float())
