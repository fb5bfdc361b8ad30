"""What tests of the rollout engine share: engines over tiny decoders, and what a plain forward pass says."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coars_fast.model.attention import PackedAttention
from coars_fast.model.decoder import Decoder
from coars_fast.rollout.engine import Engine
from coars_fast.rollout.pages import CachedSequence
from coars_fast.rollout.sampling import PartialReply, Sampling

MEMORIES = ("dense", "kernels")
"""Both ways to store and attend; the second runs on a CPU through the kernels' reference."""


def make_engine(decoder: Decoder, attention: str = "dense", **options: Any) -> Engine:
    return Engine(decoder, attention=attention, **({"num_pages": 200, "page_size": 8} | options))


def random_tokens(lengths: Sequence[int], seed: int = 0, vocab_size: int = 400) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(vocab_size) for _ in range(length)] for length in lengths]


@torch.no_grad()
def prefill(decoder: Decoder, tokens: Sequence[int], agent: int) -> Tensor:
    """[N, H] of one sequence, by the decoder itself."""
    attend = PackedAttention(torch.tensor([0, len(tokens)], dtype=torch.int32))
    agents = torch.full((len(tokens),), agent, dtype=torch.int8)
    return decoder(torch.tensor(list(tokens)), torch.arange(len(tokens)), attend, agents)


def logp_of(decoder: Decoder, tokens: Sequence[int], agent: int, start: int) -> list[float]:
    """Log-probs of tokens[start:], by the decoder itself."""
    logits = prefill(decoder, tokens, agent)[start - 1 : -1] @ decoder.head_weight.T
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[start:])[:, None])[:, 0].tolist()


def begin(engine: Engine, prompts: Sequence[list[int]], agents: Sequence[int], limit: int = 12) -> list[PartialReply]:
    """Replies to be drawn, each to a prompt of which nothing is cached."""
    return [
        PartialReply(engine.pool.new(), prompt, agent, noise_id=n, limit=limit)
        for n, (prompt, agent) in enumerate(zip(prompts, agents, strict=True))
    ]


def finish(engine: Engine, replies: Sequence[PartialReply], sampling: Sampling, **options: Any) -> None:
    """Decode until all are over, dropping those that are."""
    while alive := [reply for reply in replies if not reply.over]:
        engine.decode(alive, sampling, **({"until": 1} | options))
        engine.pool.check([reply.sequence for reply in replies])


def cached_values(engine: Engine, sequence: CachedSequence) -> Tensor:
    """[layers, 2 Hkv, length, D] of what is in a sequence's pages."""
    pages = engine.pool.kv[:, sequence.pages].transpose(1, 2).flatten(2, 3)
    return pages[:, :, : sequence.length].clone()
