"""Figures of an update from those of its micro-batches and minibatches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from coars_fast.learn.packing import PackedBatch

AGENT_NAMES = ("rec", "user")
NUM_TURNS = 5
"""Turns whose credit is told apart."""


def token_metrics(batch: PackedBatch, logp: Tensor, num_tokens: Tensor) -> dict[str, Tensor]:
    """What the loss does not measure: how far log-probs are from those at sampling (mean and largest absolute
    difference), by agent too, over turns that are not excluded; and how many tokens were computed."""
    lengths = batch.turn_offsets.diff()
    counted = batch.turn_weight != 0
    difference = (logp - batch.behaviour_logp).abs().where(counted.repeat_interleave(lengths), 0.0)
    found = {
        "logp_difference": difference.sum() / num_tokens.clamp(min=1),
        "logp_difference_max": difference.max(),
        "tokens_student": torch.tensor(float(len(batch.token_ids))),
        "tokens_teacher": torch.tensor(float(len(batch.branch_tokens))),
    }
    for agent, name in enumerate(AGENT_NAMES):
        turns = counted & (batch.turn_agent == agent)
        count = lengths[turns].sum()
        mine = difference.where(turns.repeat_interleave(lengths), 0.0)
        found[f"num_tokens_{name}"] = count
        found[f"logp_difference_{name}"] = mine.sum() / count.clamp(min=1)
    return found


@torch.no_grad()
def credit_by_place(
    batch: PackedBatch, logp: Tensor, teacher_logp: Tensor | None, credit_clip: float
) -> dict[str, Tensor]:
    """Each agent's mean credit, clipped and before it is centred, by where a token stands: `credit_turn2_rec` over
    second replies (`NUM_TURNS` stands for later ones too), `credit_quarter4_user` over the last quarter of a reply's
    tokens. Beside each, as `num_credit_...`, the number of tokens that it is the mean of.

    Args:
        batch: R trained tokens in M turns; those of weight 0 are left out.
        logp: [R] of the student.
        teacher_logp: [R]; None: there is no credit, and nothing is returned.
        credit_clip: bound of a token's credit.
    """
    if teacher_logp is None:
        return {}
    device, lengths = logp.device, batch.turn_offsets.diff().long()
    turns = torch.arange(len(lengths), device=device)
    number = turns - torch.searchsorted(batch.branch_parent, batch.branch_parent)  # in its sequence, from 0
    turn_of = turns.repeat_interleave(lengths)
    position = torch.arange(len(logp), device=device) - batch.turn_offsets.long()[turn_of]
    counted = (batch.turn_weight != 0)[turn_of]
    credit = (teacher_logp - logp).clamp(-credit_clip, credit_clip).where(counted, 0.0).double()
    found = {}
    for kind, size, place in (
        ("turn", NUM_TURNS, number.clamp(max=NUM_TURNS - 1)[turn_of]),
        ("quarter", 4, 4 * position // lengths[turn_of]),
    ):
        group = batch.turn_agent.long()[turn_of] * size + place
        sums = credit.new_zeros(len(AGENT_NAMES) * size).index_add(0, group, credit)
        counts = torch.zeros_like(sums).index_add(0, group, counted.double())
        for index, (total, count) in enumerate(zip(sums, counts, strict=True)):
            name = f"credit_{kind}{index % size + 1}_{AGENT_NAMES[index // size]}"
            found |= {name: total / count.clamp(min=1), f"num_{name}": count}
    return found


def whole(parts: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Metrics of an update from those of its micro-batches: exact, not a mean of means. Counts of turns and trained
    tokens, which they are weighted by, are left out, and so is a mean over none."""
    columns = {name: [part[name].item() for part in parts] for name in parts[0]}

    def mean(values: Sequence[float], count: str = "num_tokens") -> float:
        counts = columns[count]
        return sum(value * n for value, n in zip(values, counts, strict=True)) / max(1.0, sum(counts))

    found = {}
    for name, values in columns.items():
        agent = name.rpartition("_")[2]
        if name.endswith("_max"):
            found[name] = max(values)
        elif name.startswith(("loss", "tokens_")):
            found[name] = sum(values)
        elif name.startswith("num_"):
            continue
        elif f"num_{name}" in columns:
            if sum(columns[f"num_{name}"]):
                found[name] = mean(values, f"num_{name}")
        elif agent in AGENT_NAMES:
            found[name] = mean(values, f"num_tokens_{agent}")
        else:
            found[name] = mean(values)
    moments = zip(columns["advantage_mean"], columns["advantage_std"], strict=True)
    squares = mean([m**2 + s**2 for m, s in moments])
    found["advantage_std"] = math.sqrt(max(0.0, squares - found["advantage_mean"] ** 2))
    return found


def combined(history: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of a step from its minibatches': plain means, since they follow one another with other weights; largest
    values and counts of tokens are those of the step."""
    names = dict.fromkeys(name for metrics in history for name in metrics)
    found = {}
    for name in names:
        values = [metrics[name] for metrics in history if name in metrics]
        if name.endswith("_max"):
            found[name] = max(values)
        else:
            found[name] = sum(values) if name.startswith("tokens_") else sum(values) / len(values)
    return found
