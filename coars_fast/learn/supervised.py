"""Supervised fine-tuning on lessons: what pretraining of `tiny_base` and the warm start have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from coars_fast.data.records import Lesson
from coars_fast.errors import NonFiniteError
from coars_fast.model.attention import PackedAttention
from coars_fast.model.decoder import Decoder
from coars_kernels import linear_logprob


def lesson_logp(decoder: Decoder, lessons: Sequence[Lesson], agents: Sequence[int] | None = None) -> Tensor:
    """[R] log-probs of the tokens to be predicted, all lessons concatenated; differentiable.

    Args:
        decoder: the model.
        lessons: at least one, each of at least two tokens.
        agents: adapter of each lesson; None: the base model alone.
    """
    lengths = [len(lesson.tokens) for lesson in lessons]
    device = decoder.head_weight.device
    tokens = torch.tensor([token for lesson in lessons for token in lesson.tokens], device=device)
    answers = torch.tensor([answer for lesson in lessons for answer in lesson.is_answer], device=device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    bounds = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32, device=device)
    agent_ids = None
    if agents is not None:
        agent_ids = torch.tensor(agents, dtype=torch.int8).repeat_interleave(torch.tensor(lengths)).to(device)
    hidden = decoder(tokens, positions, PackedAttention(bounds), agent_ids)
    rows = answers.nonzero()[:, 0]
    return linear_logprob(hidden[rows - 1], decoder.head_weight, tokens[rows])


def fine_tune(
    decoder: Decoder,
    batches: Iterable[tuple[Sequence[Lesson], Sequence[int] | None]],
    *,
    num_steps: int,
    learning_rate: float,
    schedule: Callable[[float], float],
    progress: Callable[[int, float], None],
) -> None:
    """AdamW on every parameter that requires a gradient, minimising the answers' mean negative log-prob.

    Args:
        batches: lessons and their agents, one batch a step.
        num_steps: how many.
        learning_rate: peak.
        schedule: share of done steps in [0, 1) -> share of the peak; a warm-up over 100 steps comes on top.
        progress: called after each step with its number and loss.

    Raises:
        NonFiniteError: the loss is not finite; the weights are as before that step.
    """
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step, (lessons, agents) in zip(range(num_steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 100) * schedule(step / num_steps)
        loss = -lesson_logp(decoder, lessons, agents).mean()
        if not math.isfinite(loss.item()):
            raise NonFiniteError(f"supervised step {step}: the loss is {loss.item()}; no weight was changed by it")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        progress(step, loss.item())


def cosine(hold: float = 0.0, final: float = 0.05) -> Callable[[float], float]:
    """A schedule: 1 for the first `hold` of the steps, then half a cosine down to `final`."""

    def share(progress: float) -> float:
        fallen = max(0.0, progress - hold) / (1.0 - hold)
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * fallen))

    return share
