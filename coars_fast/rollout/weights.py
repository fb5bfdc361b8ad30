"""A decoder's weights as a rollout reads them: fewer, larger products, and a version that no change escapes.

Decoding a few rows costs calls, not arithmetic. So q, k and v are one product, and gate and up. Adapters come in two
ways:

- merged (CPU): each agent has its own copy of (W + B A) diag(n), n being the weight of the norm before it, and a batch
  is sorted by agent: one product for a run of rows.
- shared (GPU): one copy of the base, whose parameters become views of the fused matrices, and both agents' factors as
  two more products under a mask, whatever the order of the rows. What is copied (factors, biases, norms of heads) stays
  where it is, so that a captured CUDA graph reads what is new.

Copies are made anew whenever `Weights.refresh` finds that a parameter has changed; the engine asks at every call.

Shape suffixes: N packed tokens, O outputs, D head size, r rank, A agents, P projections.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from coars_fast.errors import ModelError, NonFiniteError
from coars_fast.model.decoder import Decoder, DecoderLayer, Projection, RMSNorm
from coars_fast.model.lora import LoraLinear
from coars_fast.rollout.product import Product


@dataclass(frozen=True)
class Agents:
    """Whose adapter each of N rows uses: runs of neighbours (merged) or a mask of columns (shared)."""

    runs: Sequence[tuple[int, slice]] = ()
    """Agent, -1 for none, and its rows."""
    masks: Sequence[Tensor] = ()
    """For P = 1, 2, 3 projections [N, P A r], 1 where a column of first factors is the row's own agent's."""


class Projections:
    """Projections of one input, as one.

    Args:
        parts: in the order of their outputs.
        norm: what the input comes from, if from a norm.
    """

    def __init__(self, parts: Sequence[Projection], norm: RMSNorm | None):
        self.parts, self.norm = parts, norm
        self.adapted = [part for part in parts if isinstance(part, LoraLinear)]
        self.outputs = sum(part.out_features for part in parts)
        self.bias: Tensor | None = None

    def refresh(self) -> None:
        """Copy what is copied."""
        if any(part.bias is not None for part in self.parts):
            like = self.parts[0].weight
            biases = [like.new_zeros(p.out_features) if p.bias is None else p.bias.detach() for p in self.parts]
            self.bias = _renew(self.bias, torch.cat(biases))

    def into(self, out: Tensor, x: Tensor, agents: Agents) -> None:
        """Project x [N, in] into out [N, O]."""
        raise NotImplementedError

    def add_to(self, hidden: Tensor, x: Tensor, agents: Agents) -> None:
        """Add the projection of x [N, in] to hidden [N, O]."""
        raise NotImplementedError

    def _spans(self) -> list[tuple[Projection, slice]]:
        """Each part and its outputs."""
        found, start = [], 0
        for part in self.parts:
            found.append((part, slice(start, start + part.out_features)))
            start += part.out_features
        return found


class MergedProjections(Projections):
    """(W + B A) diag(n) of each agent, made when it is first needed after a change: x has to be normalised only."""

    def refresh(self) -> None:
        """See `Projections`."""
        super().refresh()
        self._products: dict[int, Product] = {}

    def _product(self, agent: int) -> Product:
        if agent not in self._products:
            weight = torch.cat([part.weight for part in self.parts])
            for part, span in self._spans():
                if agent >= 0 and isinstance(part, LoraLinear):
                    weight[span].addmm_(part.stacked_b[agent], part.stacked_a[agent], alpha=part.scale)
            if self.norm is not None:
                weight.mul_(self.norm.weight)
            self._products[agent] = Product(weight)
        return self._products[agent]

    def into(self, out: Tensor, x: Tensor, agents: Agents) -> None:
        """See `Projections`."""
        if len(agents.runs) == 1:
            self._product(agents.runs[0][0]).into(out, x)
        else:
            for agent, rows in agents.runs:
                self._product(agent).into(out[rows], x[rows])
        if self.bias is not None:
            out.add_(self.bias)

    def add_to(self, hidden: Tensor, x: Tensor, agents: Agents) -> None:
        """See `Projections`."""
        if len(agents.runs) == 1:
            self._product(agents.runs[0][0]).add_to(hidden, x)
        else:
            for agent, rows in agents.runs:
                self._product(agent).add_to(hidden[rows], x[rows])
        if self.bias is not None:
            hidden.add_(self.bias)


class SharedProjections(Projections):
    """One base for all agents, and all agents' factors.

    Attributes:
        base: [in, O], of which the decoder's own parameters are views.
        first: [in, P A r] first factors, in the order (projection, agent, rank).
        second: [P A r, O] scaled second factors, zero outside of a projection's own outputs.
    """

    def __init__(self, parts: Sequence[Projection], norm: RMSNorm | None):
        super().__init__(parts, norm)
        self.base: Tensor | None = None
        self.first: Tensor | None = None
        self.second: Tensor | None = None

    def refresh(self) -> None:
        """See `Projections`."""
        super().refresh()
        weight = _side_by_side([part.weight for part in self.parts])
        if weight is None:
            weight = torch.cat([part.weight for part in self.parts])
            for part, span in self._spans():
                part.weight.data = weight[span]
        if self.base is None or self.base.data_ptr() != weight.data_ptr() or self.base.shape != weight.T.shape:
            self.base = weight.T
        if not self.adapted:
            return
        num_agents, rank = self.adapted[0].stacked_a.shape[:2]
        first = torch.stack([part.stacked_a for part in self.adapted]).to(weight.dtype)  # [P, A, r, in]
        second = weight.new_zeros(len(self.adapted), num_agents, rank, self.outputs)
        index = 0
        for part, span in self._spans():
            if isinstance(part, LoraLinear):
                second[index, :, :, span] = part.stacked_b.to(weight.dtype).transpose(1, 2) * part.scale
                index += 1
        self.first = _renew(self.first, first.flatten(0, 2).T.contiguous())
        self.second = _renew(self.second, second.flatten(0, 2))

    def into(self, out: Tensor, x: Tensor, agents: Agents) -> None:
        """See `Projections`."""
        assert self.base is not None
        if self.bias is None:
            torch.mm(x, self.base, out=out)
        else:
            torch.addmm(self.bias, x, self.base, out=out)
        self._adapt(out, x, agents)

    def add_to(self, hidden: Tensor, x: Tensor, agents: Agents) -> None:
        """See `Projections`."""
        assert self.base is not None
        hidden.addmm_(x, self.base)
        if self.bias is not None:
            hidden.add_(self.bias)
        self._adapt(hidden, x, agents)

    def _adapt(self, out: Tensor, x: Tensor, agents: Agents) -> None:
        if self.first is not None and self.second is not None:
            out.addmm_(torch.mm(x, self.first).mul_(agents.masks[len(self.adapted) - 1]), self.second)


def _renew(old: Tensor | None, new: Tensor) -> Tensor:
    """`new`, in the memory of `old` where it fits."""
    if old is None or old.shape != new.shape or old.dtype != new.dtype or old.device != new.device:
        return new
    return old.copy_(new)


def _side_by_side(weights: Sequence[Tensor]) -> Tensor | None:
    """One matrix [O, in] over weights that lie one after the other in one memory; None where they do not."""
    first, end = weights[0].detach(), weights[0].data_ptr()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if weight.data_ptr() != end or not same or not weight.is_contiguous():
            return None
        end += weight.nbytes
    return first.as_strided((sum(map(len, weights)), first.shape[1]), first.stride())


@dataclass
class Layer:
    """A decoder's layer."""

    source: DecoderLayer
    qkv: Projections
    out: Projections
    gate_up: Projections
    down: Projections
    head_norm: Tensor | None = None
    """[Hq + Hkv, D] weights of the norms of queries and keys."""

    @property
    def projections(self) -> tuple[Projections, ...]:
        """All four."""
        return self.qkv, self.out, self.gate_up, self.down


class Weights:
    """A decoder's weights in either layout; up to date at once.

    Args:
        decoder: where the base is shared, its parameters are moved into the fused matrices.
        merge: which layout.
    """

    def __init__(self, decoder: Decoder, *, merge: bool):
        self.decoder, self.merge = decoder, merge
        self.layers: list[Layer] = []
        self.num_adapters = self.rank = 0
        self.own_columns = torch.empty(0)
        """[A + 1, 3 A r] 1 where a column of first factors is the agent's; the last row is of none."""
        self.merged_head: Product | None = None
        """The head where adapters are merged."""
        self._merged_from: tuple[int, int] | None = None
        self._fingerprint: list[int] = []
        self._factor_norms: list[float] = []
        self.refresh()

    @property
    def head(self) -> Tensor:
        """[V, H]."""
        return self.decoder.head_weight

    @torch.no_grad()
    def refresh(self, *, thorough: bool = True) -> bool:
        """Bring all copies up to date; whether anything had changed since the last call.

        Args:
            thorough: also look for adapters that were written past torch's counters, through `.data`.

        Raises:
            NonFiniteError: an adapter holds values that are not finite.
            ModelError: adapters of several ranks.
        """
        if self._fingerprint and self._read() == self._fingerprint:
            if not thorough or self._norms() == self._factor_norms:
                return False
        self._find_projections()
        config = self.decoder.config
        for layer in self.layers:
            for projections in layer.projections:
                projections.refresh()
            attention = layer.source.self_attn
            if attention.q_norm is not None and attention.k_norm is not None:
                rows = (config.num_heads, config.num_kv_heads)
                weights = (attention.q_norm.weight, attention.k_norm.weight)
                joined = torch.cat([w.detach().expand(n, -1) for n, w in zip(rows, weights, strict=True)])
                layer.head_norm = _renew(layer.head_norm, joined)
        head = (self.head.data_ptr(), self.head._version)
        if self.merge and head != self._merged_from:  # training leaves the head alone
            self.merged_head, self._merged_from = Product(self.head.detach()), head
        agents = torch.arange(self.num_adapters + 1, device=self.head.device)
        columns = agents[:-1].repeat_interleave(self.rank).repeat(3)
        self.own_columns = _renew(self.own_columns, (agents[:, None] == columns).to(self.head.dtype))
        self._fingerprint, self._factor_norms = self._read(), self._norms()
        return True

    def _find_projections(self) -> None:
        """Look where the decoder has them, since `add_adapters` replaces modules; keep those that are known."""
        known = {id(projections.parts[0]): projections for layer in self.layers for projections in layer.projections}
        norms = {id(layer.source): layer.head_norm for layer in self.layers}
        kind = MergedProjections if self.merge else SharedProjections
        self.layers = []
        for layer in self.decoder.layers:
            a, m = layer.self_attn, layer.mlp
            found = []
            for parts, norm in (
                ([a.q_proj, a.k_proj, a.v_proj], layer.input_layernorm),
                ([a.o_proj], None),
                ([m.gate_proj, m.up_proj], layer.post_attention_layernorm),
                ([m.down_proj], None),
            ):
                old = known.get(id(parts[0]))
                same = old is not None and list(old.parts) == parts and old.norm is norm
                found.append(old if same else kind(parts, norm))
            self.layers.append(Layer(layer, *found, head_norm=norms.get(id(layer))))
        adapted = [p for layer in self.layers for projections in layer.projections for p in projections.adapted]
        shapes = {(part.stacked_a.shape[0], part.rank) for part in adapted}
        if len(shapes) > 1:
            raise ModelError(f"decoder: its adapters differ in number or rank, {sorted(shapes)} (agents, rank)")
        self.num_adapters, self.rank = shapes.pop() if shapes else (0, 0)
        self._factors = [factor for part in adapted for factor in (part.stacked_a, part.stacked_b)]
        self._modules: list[nn.Module] = list(self.decoder.modules())

    def _read(self) -> list[int]:
        """Addresses and version counters, which see every in-place operation and every replaced tensor or module."""
        seen: list[int] = []
        for module in self._modules:
            seen += map(id, module._modules.values())
            for tensor in module._parameters.values():
                if tensor is not None:
                    seen += (tensor.data_ptr(), tensor._version)
        for tensor in self._factors:
            seen += (tensor.data_ptr(), tensor._version)
        return seen

    def _norms(self) -> list[float]:
        """Norms of the adapters' factors, which training changes: writing through `.data` leaves the counters alone."""
        if not self._factors:
            return []
        norms = torch.stack(torch._foreach_norm(self._factors)).tolist()  # pyright: ignore[reportPrivateImportUsage]
        if not all(map(math.isfinite, norms)):
            raise NonFiniteError("an adapter holds values that are not finite; nothing can be sampled with it")
        return norms

    def addresses(self) -> list[int]:
        """Where everything lies that a captured graph reads."""
        found = [p.data_ptr() for p in self.decoder.parameters()] + [self.own_columns.data_ptr()]
        for layer in self.layers:
            tensors = [layer.head_norm]
            for projections in layer.projections:
                tensors += [getattr(projections, name, None) for name in ("bias", "base", "first", "second")]
            found += [tensor.data_ptr() for tensor in tensors if tensor is not None]
        return found

    def agents(self, numbers: Sequence[int], lengths: Sequence[int]) -> Agents:
        """The adapters of sequences of so many rows each; -1 for none. Merged ones: equal numbers side by side."""
        if not self.merge:
            return self.masked(torch.tensor(numbers).repeat_interleave(torch.tensor(lengths)))
        runs, start = [], 0
        for number, each in groupby(zip(numbers, lengths, strict=True), key=lambda pair: pair[0]):
            end = start + sum(length for _, length in each)
            runs.append((number, slice(start, end)))
            start = end
        return Agents(runs)

    def masked(self, numbers: Tensor) -> Agents:
        """Shared adapters by the agents [N] of rows, without a look at their values."""
        mask = self.own_columns[numbers.to(self.own_columns.device)]
        each = mask.shape[1] // 3
        return Agents(masks=[mask[:, : each * count] for count in (1, 2, 3)])
