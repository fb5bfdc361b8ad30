"""`credit_policy_loss` where the Triton kernels do not run: loss, gradient and metrics in plain torch without autograd.

The equations are `reference.py`'s, the gradient is written out as in `triton_credit.py`, in the order of operations
that autograd takes: without a divergence it is autograd's to the last bit. Tokens are worked on in blocks of whole
turns, small enough to stay in the cache, because a step of elementwise torch over a large batch waits for memory.
Tokens of turns with weight 0 are left out before anything looks at them. What is true or false is held in the numbers'
own dtype: torch compares, counts and multiplies such masks several times as fast as booleans.

On a GPU (float64 log-probs, or no Triton) it waits for the device.

Shape suffixes: M turns, R tokens, A = 2 agents; B and T are the tokens and the turns of a block.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from coars_kernels.credit_policy_loss.reference import METRICS, NUM_AGENTS, metric_names, sum_by_agent

BLOCK_TOKENS = 2**16
"""256 KiB a tensor in fp32, about ten of which are alive at a time. Measured on two cores with 1 MiB of own and 32 MiB
of shared cache: 2**16 and 2**17 are best, by one thread and by two; 2**14 takes half as long again."""
NUM_MEANS = METRICS.index("advantage_std")
"""So many metrics are means over tokens; they come first, and a block returns their sums in this order."""
ADVANTAGE, CREDIT = METRICS.index("advantage_mean"), METRICS.index("credit_mean")


class _Tokens(NamedTuple):
    """Values of each token, in the computing dtype; None where not given."""

    logp: Tensor
    teacher: Tensor | None
    anchor: Tensor | None
    sampler: Tensor | None
    reference: Tensor | None


class _Turns(NamedTuple):
    """Turns with a weight and at least one token."""

    lengths: Tensor  # int64
    factor: Tensor  # -w_m / |y_m|: of a token's term in the loss
    reward: Tensor
    center: Tensor | None  # what is subtracted from the credit
    agent: Tensor | None  # int64


@dataclass(frozen=True)
class _Options:
    """What is the same for all tokens; as `credit_policy_loss` documents it."""

    credit_weight: float
    credit_clip: float
    objective: str
    low: float
    high: float
    dual_clip: float | None
    importance_cap: float
    kl_weight: float


class _Sums(NamedTuple):
    """What a block adds to the results; numbers of Python, so float64."""

    num_tokens: int
    squares: float  # of the advantage's differences from its mean in the block
    loss: float
    means: list[float]  # the sums behind the means
    by_agent: list[list[float]] | None  # [2, A]: loss and credit


def credit_policy_loss_torch(
    logp: Tensor,
    teacher_logp: Tensor | None,
    behaviour_logp: Tensor | None,
    turn_reward: Tensor,
    turn_offsets: Tensor,
    turn_weight: Tensor | None,
    turn_agent: Tensor | None,
    old_logp: Tensor | None,
    reference_logp: Tensor | None,
    credit_weight: float,
    credit_clip: float,
    credit_center: bool,
    objective: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    importance_cap: float,
    kl_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient in logp [R], metrics [K]) in fp32, or float64 for float64 log-probs; arguments are checked."""
    dtype = torch.promote_types(logp.dtype, torch.float32)
    options = _Options(
        credit_weight, credit_clip, objective, 1.0 - clip_low, 1.0 + clip_high, dual_clip, importance_cap, kl_weight
    )
    anchor, sampler = (behaviour_logp, None) if old_logp is None else (old_logp, behaviour_logp)
    given = (logp, teacher_logp, anchor, sampler, reference_logp)
    turns, kept_R = _counted_turns(turn_reward, turn_offsets, turn_weight, turn_agent, dtype)
    tokens = _Tokens(
        *(None if x is None else (x if kept_R is None else x[kept_R]).detach().to(dtype) for x in given)  # type: ignore[arg-type]
    )
    if credit_center and tokens.teacher is not None:
        turns = turns._replace(center=_mean_credit(tokens, turns, credit_clip))

    grad = torch.empty_like(tokens.logp)
    sums = []
    for block_tokens, block_turns, block_grad in _blocks(tokens, turns, grad):
        sums.append(_block(block_tokens, block_turns, options, block_grad))
    if kept_R is not None:
        grad = torch.zeros_like(logp, dtype=dtype).index_copy_(0, kept_R, grad)
    metrics = _metrics(sums, turns) if sums else [0.0] * len(metric_names(turn_agent))
    made = [torch.tensor(x, dtype=dtype, device=logp.device) for x in (sum(one.loss for one in sums), metrics)]
    return made[0], grad, made[1]


def _metrics(sums: list[_Sums], turns: _Turns) -> list[float]:
    """In the order of `metric_names`."""
    num_tokens = sum(one.num_tokens for one in sums)
    means = [sum(column) / num_tokens for column in zip(*(one.means for one in sums), strict=True)]
    # differences from the block's mean, then of the block's mean from that of all
    variance = sum(
        one.squares + one.num_tokens * (one.means[ADVANTAGE] / one.num_tokens - means[ADVANTAGE]) ** 2 for one in sums
    )
    metrics = [*means, math.sqrt(variance / num_tokens), num_tokens, turns.lengths.shape[0]]
    if turns.agent is not None:
        counts = _by_agent(turns.lengths, turns.agent).tolist()
        for agent, count in enumerate(counts):
            losses, credits = zip(*((x[agent] for x in one.by_agent) for one in sums if one.by_agent), strict=True)
            metrics += [sum(losses), sum(credits) / max(count, 1)]
    return metrics


def _counted_turns(
    turn_reward: Tensor, turn_offsets: Tensor, turn_weight: Tensor | None, turn_agent: Tensor | None, dtype: torch.dtype
) -> tuple[_Turns, Tensor | None]:
    """The turns that count, and the index of their tokens; None where all tokens do."""
    lengths_M = turn_offsets.diff().long()
    num_turns = lengths_M.shape[0]
    if turn_weight is None:
        weight_M = torch.full((num_turns,), 1.0 / max(num_turns, 1), dtype=dtype, device=turn_reward.device)
        counted_M = lengths_M.bool()
    else:
        weight_M = turn_weight.detach().to(dtype)
        counted_M = (weight_M != 0) & (lengths_M > 0)
    reward_M, agent_M = turn_reward.detach().to(dtype), None if turn_agent is None else turn_agent.long()
    kept_R = None
    if not counted_M.all():
        if turn_weight is not None:
            kept_R = counted_M.repeat_interleave(lengths_M).nonzero().squeeze(1)
        lengths_M, weight_M, reward_M = lengths_M[counted_M], weight_M[counted_M], reward_M[counted_M]
        agent_M = None if agent_M is None else agent_M[counted_M]
    return _Turns(lengths_M, (weight_M / lengths_M).neg_(), reward_M, None, agent_M), kept_R


def _blocks(tokens: _Tokens, turns: _Turns, grad_R: Tensor) -> Iterator[tuple[_Tokens, _Turns, Tensor]]:
    """Whole turns with about `BLOCK_TOKENS` tokens, and where their gradient goes."""
    num_tokens = grad_R.shape[0]
    if num_tokens <= BLOCK_TOKENS:
        if num_tokens:
            yield tokens, turns, grad_R
        return
    ends_M = turns.lengths.cumsum(0)
    marks = torch.arange(BLOCK_TOKENS, num_tokens + BLOCK_TOKENS, BLOCK_TOKENS, device=grad_R.device)
    # the turn in which each mark lies is the last of its block
    lasts = torch.searchsorted(ends_M, marks).clamp_(max=len(ends_M) - 1).unique_consecutive()
    turn = token = 0
    for last, end in zip(lasts.tolist(), ends_M[lasts].tolist(), strict=True):
        part, span = slice(turn, last + 1), slice(token, end)
        yield (
            _Tokens(*(None if x is None else x[span] for x in tokens)),  # type: ignore[arg-type]
            _Turns(*(None if x is None else x[part] for x in turns)),  # type: ignore[arg-type]
            grad_R[span],
        )
        turn, token = last + 1, end


def _by_turn(values_B: Tensor, lengths_T: Tensor) -> Tensor:
    """[T] sums over each turn's tokens."""
    return torch.segment_reduce(values_B, "sum", lengths=lengths_T, unsafe=True)


def _by_agent(values_T: Tensor, agent_T: Tensor) -> Tensor:
    """[A] sums, in float64."""
    return values_T.new_zeros(NUM_AGENTS, dtype=torch.float64).index_add_(0, agent_T, values_T.double())


def _spread(values_T: Tensor, lengths_T: Tensor, num_tokens: int) -> Tensor:
    """[B], each turn's value for each of its tokens."""
    return torch.repeat_interleave(values_T, lengths_T, output_size=num_tokens)


def _mean_credit(tokens: _Tokens, turns: _Turns, credit_clip: float) -> Tensor:
    """[M], the mean credit of each turn's agent, or of all tokens; it sums as the reference does."""
    assert tokens.teacher is not None
    credit_R = (tokens.teacher - tokens.logp).clamp_(-credit_clip, credit_clip)
    agent_M = torch.zeros_like(turns.lengths) if turns.agent is None else turns.agent
    counts_A = _by_agent(turns.lengths, agent_M).to(credit_R.dtype).clamp_(min=1)
    return (sum_by_agent(credit_R, _spread(agent_M, turns.lengths, credit_R.shape[0])) / counts_A)[agent_M]


def _block(tokens: _Tokens, turns: _Turns, options: _Options, grad_B: Tensor) -> _Sums:
    """Write the gradient of a block's tokens, and return its sums."""
    logp_B, num_tokens = tokens.logp, tokens.logp.shape[0]
    # One row for every sum: a sum of its own costs more than the row.
    columns = logp_B.new_empty(NUM_MEANS + 1, num_tokens)
    clipped_B, approx_kl_B, ratio_B, advantage_B, credit_B, credit_abs_B, cut_B, k3_B, loss_B = columns.unbind()
    reward_B, factor_B = (_spread(x, turns.lengths, num_tokens) for x in (turns.reward, turns.factor))
    if tokens.teacher is None:
        columns[CREDIT : CREDIT + 3] = 0.0
        advantage_B.copy_(reward_B)
    else:
        raw_B, clip = tokens.teacher - logp_B, options.credit_clip
        torch.clamp(raw_B, -clip, clip, out=credit_B)
        used_B = credit_B if turns.center is None else credit_B - _spread(turns.center, turns.lengths, num_tokens)
        torch.mul(used_B, options.credit_weight, out=advantage_B).add_(reward_B)
        torch.clamp(raw_B.abs_(), max=clip, out=credit_abs_B)
        torch.gt(raw_B, clip, out=cut_B)
    log_ratio_B = torch.zeros_like(logp_B) if tokens.anchor is None else logp_B - tokens.anchor
    torch.expm1(log_ratio_B, out=approx_kl_B).sub_(log_ratio_B)
    _ratio(log_ratio_B, turns.lengths, options.objective, ratio_B)
    # d loss / d (term), the reference's upstream gradient of the objective
    pull_B, importance_B = factor_B, None
    if tokens.sampler is not None and tokens.anchor is not None:
        importance_B = (tokens.anchor - tokens.sampler).exp_().clamp_(max=options.importance_cap)
        pull_B = factor_B * importance_B
    gain_B = _policy_term(logp_B, ratio_B, advantage_B, pull_B, options, clipped_B, grad_B)
    if importance_B is not None:
        gain_B = gain_B * importance_B
    if tokens.reference is None:
        k3_B.zero_()
    else:
        difference_B = tokens.reference - logp_B
        expm1_B = difference_B.expm1()
        torch.sub(expm1_B, difference_B, out=k3_B)
        if options.kl_weight:
            gain_B = gain_B.sub(k3_B, alpha=options.kl_weight)
            grad_B.addcmul_(expm1_B, factor_B, value=options.kl_weight)
    torch.mul(gain_B, factor_B, out=loss_B)

    by_agent = None
    if turns.agent is not None:
        by_agent = [_by_agent(_by_turn(x, turns.lengths), turns.agent).tolist() for x in (loss_B, credit_B)]
    *means, loss = columns.sum(1).tolist()
    difference_B = advantage_B.sub_(means[ADVANTAGE] / num_tokens)
    squares = difference_B.dot(difference_B).item()
    return _Sums(num_tokens, squares, loss, means, by_agent)


def _ratio(log_ratio_B: Tensor, lengths_T: Tensor, objective: str, out_B: Tensor) -> None:
    """The ratio of each token, or with "gspo" of its turn."""
    if objective != "gspo":
        torch.exp(log_ratio_B, out=out_B)
        return
    ratio_T = _by_turn(log_ratio_B, lengths_T).div_(lengths_T).exp_()
    # plus 0, or NaN where a log-prob is infinite: as the reference has it
    torch.add(_spread(ratio_T, lengths_T, log_ratio_B.shape[0]), log_ratio_B - log_ratio_B, out=out_B)


def _policy_term(
    logp_B: Tensor,
    ratio_B: Tensor,
    advantage_B: Tensor,
    pull_B: Tensor,
    options: _Options,
    clipped_B: Tensor,
    grad_B: Tensor,
) -> Tensor:
    """`policy_term` of the reference. `clipped` becomes 1 where a clip decides, else 0; `grad` becomes `pull` times the
    term's derivative in logp."""
    if options.objective == "faithful":
        clipped_B.zero_()
        torch.mul(pull_B, advantage_B, out=grad_B)
        return advantage_B * logp_B
    bounded_B = ratio_B.clamp(options.low, options.high)
    excess_B = ratio_B - bounded_B
    if options.objective == "cispo":
        torch.gt(excess_B.abs_(), 0.0, out=clipped_B)
        torch.mul(bounded_B.mul_(advantage_B), pull_B, out=grad_B)
        return bounded_B.mul_(logp_B)
    outside_B = torch.ne(excess_B, 0.0, out=torch.empty_like(excess_B))
    torch.gt(excess_B.mul_(advantage_B), 0.0, out=clipped_B)
    free_B, held_B = ratio_B * advantage_B, bounded_B.mul_(advantage_B)
    # Where both products round to one number outside the interval, half of the gradient passes: as autograd has it.
    passing_B = torch.le(free_B, held_B, out=excess_B)
    passing_B.sub_(torch.eq(free_B, held_B, out=torch.empty_like(free_B)).mul_(outside_B), alpha=0.5)
    torch.mul(pull_B, advantage_B, out=grad_B).mul_(passing_B).mul_(ratio_B)
    term_B = torch.minimum(free_B, held_B, out=held_B)
    if options.dual_clip is not None:
        floor_B, negative_B = options.dual_clip * advantage_B, advantage_B < 0
        below_B = negative_B & (term_B < floor_B)
        grad_B.masked_fill_(below_B, 0.0)
        grad_B[negative_B & (term_B == floor_B)] *= 0.5
        clipped_B.masked_fill_(below_B, 1.0)
        term_B = torch.where(below_B, floor_B, term_B)
    return term_B
