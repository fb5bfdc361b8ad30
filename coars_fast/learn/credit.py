"""Other forms of token credit than Eq. 10's: variants from the literature, and the sceptic's controls.

A form is a function of the credits of a whole update, so that micro-batches change nothing. Credit carries no gradient:
what comes out is written back as the log-probs of a teacher that would have given just this credit, and the loss is the
same op in every form. The readings of what is cited are ours; docs/method.md says why.

Shape suffixes: R trained tokens of an update, over all its micro-batches; M turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coars_fast.config import CreditForm
from coars_fast.learn.packing import PackedBatch

NUM_AGENTS = 2
UNLIKELY = 0.5
"""Under this probability a token is punished by `constant`: the student itself would rather say something else."""


@dataclass(frozen=True, kw_only=True)
class TokenCredits:
    """The trained tokens of an update, micro-batch after micro-batch."""

    gap: Tensor
    """[R] fp32: the teacher's log-prob minus the student's, in nats."""
    logp: Tensor
    """[R] fp32: the student's."""
    turn: Tensor
    """[R] int64: its turn, counted over all micro-batches."""
    agent: Tensor
    """[R] int64."""
    order: Tensor
    """[R] int64: a number of its sequence that does not depend on how micro-batches were made."""
    counted: Tensor
    """[R] bool: False in turns of weight 0, whose credit is never used."""


def gather(batches: Sequence[PackedBatch], logp: Sequence[Tensor], teacher_logp: Sequence[Tensor]) -> TokenCredits:
    """The tokens of all micro-batches of an update, with both log-probs [R of the batch] of each."""
    turns, agents, orders, counted = [], [], [], []
    first = 0
    for batch in batches:
        lengths = batch.turn_offsets.diff().long()
        episodes = torch.tensor(batch.episodes, device=lengths.device)[batch.branch_parent]
        agent = batch.turn_agent.long()
        turns.append(torch.arange(first, first + len(lengths), device=lengths.device).repeat_interleave(lengths))
        agents.append(agent.repeat_interleave(lengths))
        orders.append((episodes * NUM_AGENTS + agent).repeat_interleave(lengths))
        counted.append((batch.turn_weight != 0).repeat_interleave(lengths))
        first += len(lengths)
    student = torch.cat(list(logp))
    return TokenCredits(
        gap=torch.cat(list(teacher_logp)) - student,
        logp=student,
        turn=torch.cat(turns),
        agent=torch.cat(agents),
        order=torch.cat(orders),
        counted=torch.cat(counted),
    )


def credit_of(form: CreditForm, tokens: TokenCredits, *, clip: float, seed: int) -> Tensor:
    """[R] credit of each token, within [-clip, clip], before centring; 0 in turns that are not counted.

    `token`: clip(gap), Eq. 10. `gated` (after arXiv 2605.15155): clip(gap) sigmoid(gap), so that what the teacher
    endorses keeps its credit and what it rejects loses most of it. `shuffled`: clip(gap) of another token of the same
    agent, drawn without replacement from `seed`. `constant` (after arXiv 2608.31046): the same negative number for
    every token under which the student's probability is below `UNLIKELY`, 0 for the others; per agent so large that the
    credits' absolute sum is that of `token`, unless the clip is in the way.
    """
    credit = tokens.gap.clamp(-clip, clip).where(tokens.counted, 0.0)
    if form == "gated":
        return credit * torch.sigmoid(tokens.gap).where(tokens.counted, 0.0)
    if form == "shuffled":
        return _shuffled(credit, tokens, seed)
    if form == "constant":
        return _constant(credit, tokens, clip)
    return credit


def _shuffled(credit: Tensor, tokens: TokenCredits, seed: int) -> Tensor:
    """Each agent's counted tokens exchange their credits."""
    found = credit.clone()
    by_sequence = tokens.order.argsort(stable=True)  # a sequence's own tokens are in order
    for agent in range(NUM_AGENTS):
        mine = by_sequence[(tokens.counted & (tokens.agent == agent))[by_sequence]]
        generator = torch.Generator().manual_seed(seed * NUM_AGENTS + agent)
        found[mine] = credit[mine[torch.randperm(len(mine), generator=generator).to(mine.device)]]
    return found


def _constant(credit: Tensor, tokens: TokenCredits, clip: float) -> Tensor:
    unlikely = tokens.counted & (tokens.logp.exp() < UNLIKELY)
    sums = credit.new_zeros(NUM_AGENTS).index_add(0, tokens.agent, credit.abs())
    size = (sums / tokens.agent[unlikely].bincount(minlength=NUM_AGENTS).clamp(min=1)).clamp(max=clip)
    return -size[tokens.agent].where(unlikely, 0.0)


def agent_means(credit: Tensor, tokens: TokenCredits) -> Tensor:
    """[2] fp64 mean credit of each agent over its counted tokens; 0 where it has none."""
    sums = credit.new_zeros(NUM_AGENTS, dtype=torch.float64).index_add(
        0, tokens.agent[tokens.counted], credit[tokens.counted].double()
    )
    return sums / tokens.agent[tokens.counted].bincount(minlength=NUM_AGENTS).clamp(min=1)


@torch.no_grad()
def credit_by_kind(
    batch: PackedBatch, logp: Tensor, teacher_logp: Tensor | None, credit_clip: float
) -> dict[str, Tensor]:
    """Each agent's mean credit, clipped and before it is centred, of the tokens before a reply's decision
    (`credit_reason_rec`) and from there on (`credit_decision_rec`), with the number of tokens beside each
    (`num_credit_...`). Arguments as for `learn.metrics.credit_by_place`."""
    if teacher_logp is None:
        return {}
    tokens = gather([batch], [logp], [teacher_logp])
    credit = credit_of("token", tokens, clip=credit_clip, seed=0).double()
    position = torch.arange(len(credit), device=credit.device) - batch.turn_offsets.long()[tokens.turn]
    decides = position >= batch.turn_reason[tokens.turn]
    found = {}
    for agent, agent_name in enumerate(("rec", "user")):
        for kind, of_kind in (("reason", ~decides), ("decision", decides)):
            mine = tokens.counted & of_kind & (tokens.agent == agent)
            name, count = f"credit_{kind}_{agent_name}", mine.sum()
            found |= {name: credit.where(mine, 0.0).sum() / count.clamp(min=1), f"num_{name}": count}
    return found
