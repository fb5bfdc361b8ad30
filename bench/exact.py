"""Float64 through a decoder whose weights stay as they are: what the loops' results are compared with.

A layer is widened while it is computed, and again in the backward pass, so that a model that fills a third of a GPU's
memory can be checked on that GPU. Left out: speed.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from coars_fast.model.attention import Attend, PackedAttention
from coars_fast.model.decoder import Decoder, DecoderLayer, Rope, inverse_frequencies
from coars_kernels.linear_logprob.reference import linear_logprob_reference


class ExactDecoder(Decoder):
    """A decoder in float64 on the weights of another one, whose parameters take its gradients. Made by `exact`."""

    @property
    def head_weight(self) -> Tensor:
        return super().head_weight.double()

    def forward(
        self, token_ids: Tensor, position_ids: Tensor, attend: Attend, agent_ids: Tensor | None = None
    ) -> Tensor:
        """As the decoder's; `attend` must take float64."""
        hidden = self.embed(token_ids).double()
        frequencies = inverse_frequencies(self.config).to(position_ids.device)
        angles = torch.outer(position_ids.float(), frequencies)  # in fp32, as the model defines them
        cos, sin = angles.double().cos(), angles.double().sin()
        rope = Rope(torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None])
        for layer in self.layers:
            inputs = (layer, hidden, rope, attend, agent_ids)
            graph = torch.is_grad_enabled()
            hidden = cast(Tensor, checkpoint(_widened, *inputs, use_reentrant=False)) if graph else _widened(*inputs)
        norm = self.model.norm
        return F.rms_norm(hidden, norm.weight.shape, norm.weight.double(), norm.eps)


def _widened(layer: DecoderLayer, hidden: Tensor, rope: Rope, attend: Attend, agent_ids: Tensor | None) -> Tensor:
    weights = {name: parameter.double() for name, parameter in layer.named_parameters()}
    return functional_call(layer, weights, (hidden, rope, attend, agent_ids))


def exact(decoder: Decoder) -> ExactDecoder:
    """The decoder's float64 twin; nothing is copied."""
    twin = copy.copy(decoder)
    twin.__class__ = ExactDecoder
    return cast(ExactDecoder, twin)


@torch.no_grad()
def exact_logp(decoder: Decoder, tokens: Tensor, rows: Tensor, agent: int) -> Tensor:
    """Log-probs of the tokens [N] of one sequence at the positions `rows`, float64, in one forward pass."""
    attend = PackedAttention(torch.tensor([0, len(tokens)], dtype=torch.int32, device=tokens.device), backend="sdpa")
    agents = torch.full((len(tokens),), agent, dtype=torch.int8, device=tokens.device)
    twin = exact(decoder)
    hidden = twin(tokens, torch.arange(len(tokens), device=tokens.device), attend, agents)
    logp = linear_logprob_reference(hidden[rows - 1], twin.head_weight, tokens[rows])
    assert isinstance(logp, Tensor)
    return logp
