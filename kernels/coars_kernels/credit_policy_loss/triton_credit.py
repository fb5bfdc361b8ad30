"""`credit_policy_loss` on a GPU: loss, gradient in logp and metrics in O(R) work, without waiting for the device.

One program per turn walks over the turn's tokens, writes their gradient and one row of float64 sums. The rows are added
up by `torch.sum`, in an order that depends on M alone, and a last program of one warp makes loss and metrics from the
total: two runs are equal bit for bit, and there are no atomics. With `credit_center` the mean credit must be known
before the first advantage, so a smaller pass of the same form goes first; for "gspo" a program reads its turn twice.

Arithmetic is fp32, as in `reference.py`, which says what everything here means; sums are float64, so that a spread is
found from a sum of squares and long turns cost no accuracy. NaN is carried as the reference carries it, and the
gradient at a tie of minimum or clamp is split as autograd splits it. Left out: float64 log-probs (the reference
computes them), autotuning (no choice of block matters at this amount of work), and checks of values: offsets that do
not run from 0 to R make the kernel write where it must not.

Shape suffixes: M turns, R tokens, B tokens of a block; no suffix: a scalar, the program's turn or the whole call.
"""

# To a type checker a kernel is the Python function: no grid, no num_warps, and helpers that never return.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from coars_kernels import aot_library
from coars_kernels.credit_policy_loss.reference import OBJECTIVES, metric_names

aot_library.install()  # where COARS_KERNELS_AOT is set; before the first launch

# A turn is some dozens to some hundreds of tokens: one to three rounds of a block, two tokens per thread.
BLOCK_TOKENS = 256
NUM_WARPS = 4

FAITHFUL, CISPO, GSPO = (tl.constexpr(OBJECTIVES.index(name)) for name in ("faithful", "cispo", "gspo"))

# The row of sums that a turn writes. The first NUM_MEANS become means over tokens, in the order of the metrics.
NUM_MEANS = tl.constexpr(8)
SUM_CLIPPED, SUM_APPROX_KL, SUM_RATIO, SUM_ADVANTAGE = (tl.constexpr(column) for column in range(4))
SUM_CREDIT, SUM_CREDIT_ABS, SUM_CREDIT_CUT, SUM_KL = (tl.constexpr(column) for column in range(4, 8))
SUM_ADVANTAGE_SQUARE, SUM_TURNS = tl.constexpr(8), tl.constexpr(9)
# By agent: the recommender's column, and the user's after it.
SUM_LOSS, SUM_AGENT_CREDIT, SUM_TOKENS = tl.constexpr(10), tl.constexpr(12), tl.constexpr(14)
NUM_SUMS = tl.constexpr(16)
# The row of the pass for `credit_center`, likewise by agent.
CENTER_CREDIT, CENTER_TOKENS, NUM_CENTER_SUMS = tl.constexpr(0), tl.constexpr(2), tl.constexpr(4)


@triton.jit
def _load_turn(offsets_ptr, weight_ptr, agent_ptr, default_weight, turn):
    """(first token, end of its tokens, end of those that count, weight, is the user's) of a turn.

    No token of a turn with weight 0 counts. Without `agent_ptr` every turn is the recommender's.
    """
    begin = tl.load(offsets_ptr + turn).to(tl.int64)
    end = tl.load(offsets_ptr + turn + 1).to(tl.int64)
    weight = default_weight if weight_ptr is None else tl.load(weight_ptr + turn).to(tl.float32)
    is_user = False if agent_ptr is None else tl.load(agent_ptr + turn).to(tl.int64) == 1
    return begin, end, tl.where(weight != 0.0, end, begin), weight, is_user


@triton.jit
def _store_by_agent(pointer, is_user, value):
    """Write `value` in the agent's column and 0 in the other's."""
    tl.store(pointer, tl.where(is_user, 0.0, value))
    tl.store(pointer + 1, tl.where(is_user, value, 0.0))


@triton.jit
def _expm1_and_k3(x):
    """(exp(x) - 1, exp(x) - 1 - x) without the cancellation near 0, where both matter: log-ratios are small.

    Taylor's series within 1, where its first neglected term is under 2**-24 of the sum.
    """
    series = 1 / 40320 + x * (1 / 362880 + x * (1 / 3628800))
    series = 1 / 720 + x * (1 / 5040 + x * series)
    series = x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * series))))
    near = tl.abs(x) < 1.0
    beyond = tl.exp(x) - 1.0
    return tl.where(near, x + series, beyond), tl.where(near, series, beyond - x)


@triton.jit
def _policy_term(logp, log_ratio, turn_ratio, advantage, low, high, dual_clip, OBJECTIVE: tl.constexpr):
    """`policy_term` of the reference and its derivative: (term, d term / d logp, ratio, where the clip decides).

    Autograd gives half of the gradient to each side of a tie of minimum or maximum, and all of it to a clamped value
    that lies on the bound. Inside the interval both halves meet again, so ties show only where the products are equal
    and the ratios are not, and at the dual clip's bound.
    """
    if OBJECTIVE == GSPO:
        ratio = turn_ratio * tl.exp(logp - logp)  # times 1, or NaN where the reference has it
    else:
        ratio = tl.exp(log_ratio)
    outside = (ratio < low) | (ratio > high)
    bounded = tl.clamp(ratio, low, high, propagate_nan=tl.PropagateNan.ALL)
    if OBJECTIVE == FAITHFUL:
        term, slope, clipped = advantage * logp, advantage, outside & False
    elif OBJECTIVE == CISPO:
        slope = bounded * advantage
        term, clipped = slope * logp, outside
    else:
        free, held = ratio * advantage, bounded * advantage
        term = tl.minimum(free, held, propagate_nan=tl.PropagateNan.ALL)
        tie = free == held
        free_share = tl.where(tie, 0.5, tl.where(free > held, 0.0, 1.0))
        held_share = tl.where(outside, 0.0, tl.where(tie, 0.5, tl.where(held > free, 0.0, 1.0)))
        slope = free * (free_share + held_share)
        clipped = tl.where(advantage > 0.0, ratio > high, (ratio < low) & (advantage < 0.0))
        if dual_clip is not None:
            floor = dual_clip * advantage
            negative = advantage < 0.0
            clipped = clipped | (negative & (term < floor))
            share = tl.where(term == floor, 0.5, tl.where(term < floor, 0.0, 1.0))
            slope = tl.where(negative, slope * share, slope)
            term = tl.where(negative, tl.maximum(term, floor, propagate_nan=tl.PropagateNan.ALL), term)
    return term, slope, ratio, clipped


@triton.jit
def credit_center_kernel(
    sums_ptr, logp_ptr, teacher_ptr, offsets_ptr, weight_ptr, agent_ptr,
    default_weight, credit_clip, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of the clipped credit and counts of tokens by agent, one row [NUM_CENTER_SUMS] for each turn."""
    turn = tl.program_id(0).to(tl.int64)
    begin, end, counted_end, weight, is_user = _load_turn(offsets_ptr, weight_ptr, agent_ptr, default_weight, turn)
    credit_sum_B = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, counted_end, BLOCK):
        token_B = start + tl.arange(0, BLOCK)
        counted_B = token_B < counted_end
        logp_B = tl.load(logp_ptr + token_B, mask=counted_B, other=0.0).to(tl.float32)
        teacher_B = tl.load(teacher_ptr + token_B, mask=counted_B, other=0.0).to(tl.float32)
        credit_B = tl.clamp(teacher_B - logp_B, -credit_clip, credit_clip, propagate_nan=tl.PropagateNan.ALL)
        credit_sum_B += tl.where(counted_B, credit_B, 0.0).to(tl.float64)
    row_ptr = sums_ptr + turn * NUM_CENTER_SUMS
    _store_by_agent(row_ptr + CENTER_CREDIT, is_user, tl.sum(credit_sum_B))
    _store_by_agent(row_ptr + CENTER_TOKENS, is_user, (counted_end - begin).to(tl.float64))


@triton.jit
def credit_policy_kernel(
    grad_ptr, sums_ptr,
    logp_ptr, teacher_ptr, anchor_ptr, sampler_ptr, reference_ptr,
    reward_ptr, offsets_ptr, weight_ptr, agent_ptr, center_ptr,
    default_weight, credit_weight, credit_clip, low, high, dual_clip, importance_cap, kl_weight,
    OBJECTIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One turn: the gradient of its tokens and its row [NUM_SUMS].

    Pointers from `teacher_ptr` to `reference_ptr`, `weight_ptr`, `agent_ptr` and `center_ptr` may be None, as may
    `dual_clip` and `kl_weight` (the divergence is then measured only). `anchor_ptr` is the ratio's denominator;
    `sampler_ptr` is given when the sampler's log-probs are others, for the importance weight.
    """
    turn = tl.program_id(0).to(tl.int64)
    begin, end, counted_end, weight, is_user = _load_turn(offsets_ptr, weight_ptr, agent_ptr, default_weight, turn)
    length = tl.maximum(end - begin, 1)
    coefficient = tl.div_rn(weight, length.to(tl.float32))
    reward = tl.load(reward_ptr + turn, mask=weight != 0.0, other=0.0).to(tl.float32)
    center = 0.0
    if center_ptr is not None:
        side = tl.where(is_user, 1, 0)
        mean_credit = tl.load(center_ptr + CENTER_CREDIT + side)
        center = (mean_credit / tl.maximum(tl.load(center_ptr + CENTER_TOKENS + side), 1.0)).to(tl.float32)
    turn_ratio = 1.0
    if OBJECTIVE == GSPO:
        log_ratio_sum_B = tl.zeros([BLOCK], tl.float64)
        for start in range(begin, counted_end, BLOCK):
            token_B = start + tl.arange(0, BLOCK)
            counted_B = token_B < counted_end
            logp_B = tl.load(logp_ptr + token_B, mask=counted_B, other=0.0).to(tl.float32)
            anchor_B = tl.load(anchor_ptr + token_B, mask=counted_B, other=0.0).to(tl.float32)
            log_ratio_sum_B += (logp_B - anchor_B).to(tl.float64)
        turn_ratio = tl.exp((tl.sum(log_ratio_sum_B) / length.to(tl.float64)).to(tl.float32))

    loss_sum_B, ratio_sum_B = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    advantage_sum_B, square_sum_B = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    credit_sum_B, credit_abs_sum_B = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    approx_kl_sum_B, kl_sum_B = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    clipped_sum_B, cut_sum_B = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        token_B = start + tl.arange(0, BLOCK)
        inside_B = token_B < end
        # What a turn of weight 0 holds is never read: it may be NaN.
        counted_B = token_B < counted_end
        logp_B = tl.load(logp_ptr + token_B, mask=counted_B, other=0.0).to(tl.float32)
        anchor_B = logp_B
        if anchor_ptr is not None:
            anchor_B = tl.load(anchor_ptr + token_B, mask=counted_B, other=0.0).to(tl.float32)
        log_ratio_B = tl.zeros([BLOCK], tl.float32) if anchor_ptr is None else logp_B - anchor_B
        advantage_B = tl.zeros([BLOCK], tl.float32) + reward
        if teacher_ptr is not None:
            raw_B = tl.load(teacher_ptr + token_B, mask=counted_B, other=0.0).to(tl.float32) - logp_B
            credit_B = tl.clamp(raw_B, -credit_clip, credit_clip, propagate_nan=tl.PropagateNan.ALL)
            advantage_B += credit_weight * (credit_B - center)
            credit_sum_B += tl.where(counted_B, credit_B, 0.0).to(tl.float64)
            credit_abs_sum_B += tl.where(counted_B, tl.abs(credit_B), 0.0).to(tl.float64)
            cut_sum_B += (counted_B & (tl.abs(raw_B) > credit_clip)).to(tl.int32)
        gain_B, slope_B, ratio_B, clipped_B = _policy_term(
            logp_B, log_ratio_B, turn_ratio, advantage_B, low, high, dual_clip, OBJECTIVE
        )
        if sampler_ptr is not None:
            sampler_B = tl.load(sampler_ptr + token_B, mask=counted_B, other=0.0).to(tl.float32)
            importance_B = tl.exp(anchor_B - sampler_B)
            importance_B = tl.minimum(importance_B, importance_cap, propagate_nan=tl.PropagateNan.ALL)
            gain_B, slope_B = gain_B * importance_B, slope_B * importance_B
        if reference_ptr is not None:
            reference_B = tl.load(reference_ptr + token_B, mask=counted_B, other=0.0).to(tl.float32)
            expm1_B, k3_B = _expm1_and_k3(reference_B - logp_B)
            kl_sum_B += tl.where(counted_B, k3_B, 0.0).to(tl.float64)
            if kl_weight is not None:
                gain_B, slope_B = gain_B - kl_weight * k3_B, slope_B + kl_weight * expm1_B
        tl.store(grad_ptr + token_B, tl.where(counted_B, -(coefficient * slope_B), 0.0), mask=inside_B)

        _, approx_kl_B = _expm1_and_k3(log_ratio_B)
        loss_sum_B += tl.where(counted_B, -(coefficient * gain_B), 0.0).to(tl.float64)
        ratio_sum_B += tl.where(counted_B, ratio_B, 0.0).to(tl.float64)
        approx_kl_sum_B += tl.where(counted_B, approx_kl_B, 0.0).to(tl.float64)
        clipped_sum_B += (counted_B & clipped_B).to(tl.int32)
        counted_advantage_B = tl.where(counted_B, advantage_B, 0.0).to(tl.float64)
        advantage_sum_B += counted_advantage_B
        square_sum_B += counted_advantage_B * counted_advantage_B

    row_ptr = sums_ptr + turn * NUM_SUMS
    tl.store(row_ptr + SUM_CLIPPED, tl.sum(clipped_sum_B).to(tl.float64))
    tl.store(row_ptr + SUM_APPROX_KL, tl.sum(approx_kl_sum_B))
    tl.store(row_ptr + SUM_RATIO, tl.sum(ratio_sum_B))
    tl.store(row_ptr + SUM_ADVANTAGE, tl.sum(advantage_sum_B))
    tl.store(row_ptr + SUM_ADVANTAGE_SQUARE, tl.sum(square_sum_B))
    credit_sum = tl.sum(credit_sum_B)
    tl.store(row_ptr + SUM_CREDIT, credit_sum)
    tl.store(row_ptr + SUM_CREDIT_ABS, tl.sum(credit_abs_sum_B))
    tl.store(row_ptr + SUM_CREDIT_CUT, tl.sum(cut_sum_B).to(tl.float64))
    tl.store(row_ptr + SUM_KL, tl.sum(kl_sum_B))
    tl.store(row_ptr + SUM_TURNS, (counted_end > begin).to(tl.float64))
    _store_by_agent(row_ptr + SUM_LOSS, is_user, tl.sum(loss_sum_B))
    _store_by_agent(row_ptr + SUM_AGENT_CREDIT, is_user, credit_sum)
    _store_by_agent(row_ptr + SUM_TOKENS, is_user, (counted_end - begin).to(tl.float64))


@triton.jit
def credit_metrics_kernel(loss_ptr, metrics_ptr, sums_ptr, BY_AGENT: tl.constexpr):
    """Loss and metrics (in the order of `metric_names`) from the sums over all turns."""
    tokens_rec, tokens_user = tl.load(sums_ptr + SUM_TOKENS), tl.load(sums_ptr + SUM_TOKENS + 1)
    loss_rec, loss_user = tl.load(sums_ptr + SUM_LOSS), tl.load(sums_ptr + SUM_LOSS + 1)
    tl.store(loss_ptr, (loss_rec + loss_user).to(tl.float32))
    num_tokens = tokens_rec + tokens_user
    count = tl.maximum(num_tokens, 1.0)
    column = tl.arange(0, NUM_MEANS)
    tl.store(metrics_ptr + column, (tl.load(sums_ptr + column) / count).to(tl.float32))
    mean = tl.load(sums_ptr + SUM_ADVANTAGE) / count
    variance = tl.load(sums_ptr + SUM_ADVANTAGE_SQUARE) / count - mean * mean
    variance = tl.where(variance < 0.0, 0.0, variance)  # rounding; maximum would lose a NaN
    tl.store(metrics_ptr + NUM_MEANS, tl.sqrt(variance).to(tl.float32))
    tl.store(metrics_ptr + NUM_MEANS + 1, num_tokens.to(tl.float32))
    tl.store(metrics_ptr + NUM_MEANS + 2, tl.load(sums_ptr + SUM_TURNS).to(tl.float32))
    if BY_AGENT:
        agent_ptr = metrics_ptr + NUM_MEANS + 3
        credit_rec, credit_user = tl.load(sums_ptr + SUM_AGENT_CREDIT), tl.load(sums_ptr + SUM_AGENT_CREDIT + 1)
        tl.store(agent_ptr, loss_rec.to(tl.float32))
        tl.store(agent_ptr + 1, (credit_rec / tl.maximum(tokens_rec, 1.0)).to(tl.float32))
        tl.store(agent_ptr + 2, loss_user.to(tl.float32))
        tl.store(agent_ptr + 3, (credit_user / tl.maximum(tokens_user, 1.0)).to(tl.float32))


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def credit_policy_loss_triton(
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
    """(loss, gradient in logp [R], metrics [K]), all fp32; arguments as the public function's, already checked."""
    num_turns, num_metrics = turn_reward.shape[0], len(metric_names(turn_agent))
    logp, turn_offsets = logp.contiguous(), turn_offsets.contiguous()
    turn_weight, turn_agent, teacher_logp = map(_contiguous, (turn_weight, turn_agent, teacher_logp))
    anchor = _contiguous(behaviour_logp if old_logp is None else old_logp)
    sampler = None if old_logp is None else _contiguous(behaviour_logp)
    turns = (turn_offsets, turn_weight, turn_agent)
    default_weight = 1.0 / max(num_turns, 1)

    grad = torch.empty(logp.shape, dtype=torch.float32, device=logp.device)
    sums = torch.empty(num_turns, NUM_SUMS.value, dtype=torch.float64, device=logp.device)
    loss = torch.empty((), dtype=torch.float32, device=logp.device)
    metrics = torch.empty(num_metrics, dtype=torch.float32, device=logp.device)
    center = None
    # Kernels go to the current device, which need not be the tensors'.
    with torch.cuda.device_of(logp):
        if credit_center and teacher_logp is not None:
            center = torch.empty(num_turns, NUM_CENTER_SUMS.value, dtype=torch.float64, device=logp.device)
            if num_turns:
                credit_center_kernel[(num_turns,)](
                    center, logp, teacher_logp, *turns, default_weight, credit_clip,
                    BLOCK=BLOCK_TOKENS, num_warps=NUM_WARPS,
                )  # fmt: skip
            center = center.sum(0)
        if num_turns:
            credit_policy_kernel[(num_turns,)](
                grad, sums,
                logp, teacher_logp, anchor, sampler, _contiguous(reference_logp),
                turn_reward.contiguous(), *turns, center,
                default_weight, credit_weight, credit_clip, 1.0 - clip_low, 1.0 + clip_high,
                dual_clip, importance_cap, kl_weight or None,
                OBJECTIVE=OBJECTIVES.index(objective), BLOCK=BLOCK_TOKENS, num_warps=NUM_WARPS,
            )  # fmt: skip
        credit_metrics_kernel[(1,)](loss, metrics, sums.sum(0), BY_AGENT=turn_agent is not None, num_warps=1)
    return loss, grad, metrics
