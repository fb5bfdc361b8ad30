"""What `credit_policy_loss` means, in plain torch: the specification, and what runs where the Triton kernels do not.

    J = sum_m w_m / |y_m| sum_n [ iw_n term_n - kl_weight k3_n ],    loss = -J

For token n of turn m: credit A_n = clip(teacher_logp_n - logp_n, -c, c) (Eq. 10, no gradient), advantage = R_m +
credit_weight A_n (Eq. 11), term_n by objective, iw_n a truncated importance weight when the log-probs of the last
update and of the sampler differ, and k3 the estimator of the divergence from the frozen base. Gradient flows through
logp alone.

Every per-token value of a turn with weight 0 is replaced before it is used, so that not even a NaN there can reach the
loss, its gradient, or a metric. No step waits for the device.

Shape suffixes: R tokens, M turns, A = 2 agents.
"""

from typing import NamedTuple

import torch
from torch import Tensor

OBJECTIVES = ("faithful", "clipped", "cispo", "gspo")
NUM_AGENTS = 2
AGENT_SUFFIXES = ("rec", "user")
# In the order in which the operator returns them; the agents' follow where the turns' agents are given.
METRICS = (
    "clip_fraction", "approx_kl", "ratio_mean", "advantage_mean", "credit_mean", "credit_abs_mean",
    "credit_clip_fraction", "kl", "advantage_std", "num_tokens", "num_turns",
)  # fmt: skip
AGENT_METRICS = ("loss_rec", "credit_mean_rec", "loss_user", "credit_mean_user")


class TokenLayout(NamedTuple):
    """How tokens belong to turns."""

    turn_R: Tensor  # int64, the turn of each token
    coefficient_R: Tensor  # w_m / |y_m|; exactly 0 in turns of weight 0
    active_R: Tensor  # bool, False in turns of weight 0
    active_M: Tensor  # bool, weight not 0 and at least one token
    lengths_M: Tensor  # int64


class PolicyTerm(NamedTuple):
    """One objective's value for each token, and what the metrics need; only `term_R` carries gradient."""

    term_R: Tensor
    ratio_R: Tensor
    clipped_R: Tensor  # bool, where the clip decides the value


def metric_names(turn_agent: Tensor | None) -> tuple[str, ...]:
    """Names of the metrics of a call, in order."""
    return METRICS if turn_agent is None else METRICS + AGENT_METRICS


def token_layout(turn_offsets: Tensor, turn_weight: Tensor | None, num_tokens: int, dtype: torch.dtype) -> TokenLayout:
    """Spread the turns over their tokens; `turn_weight` None means 1/M each."""
    lengths_M = turn_offsets.diff().long()
    num_turns = lengths_M.shape[0]
    if turn_weight is None:
        weight_M = torch.full((num_turns,), 1.0 / max(num_turns, 1), dtype=dtype, device=turn_offsets.device)
    else:
        weight_M = turn_weight.detach().to(dtype)
    turns = torch.arange(num_turns, device=turn_offsets.device)
    turn_R = torch.repeat_interleave(turns, lengths_M, output_size=num_tokens)
    nonzero_M = weight_M != 0
    coefficient_M = weight_M / lengths_M.clamp(min=1)
    return TokenLayout(turn_R, coefficient_M[turn_R], nonzero_M[turn_R], nonzero_M & (lengths_M > 0), lengths_M)


def sum_by_agent(values_R: Tensor, agent_R: Tensor) -> Tensor:
    """[A] sums of per-token values."""
    return values_R.new_zeros(NUM_AGENTS).index_add(0, agent_R, values_R)


def policy_term(
    objective: str,
    logp_R: Tensor,
    log_ratio_R: Tensor,
    advantage_R: Tensor,
    layout: TokenLayout,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> PolicyTerm:
    """The objective of one token, before weights: larger is better."""
    low, high = 1.0 - clip_low, 1.0 + clip_high
    if objective == "faithful":
        never_R = torch.zeros_like(layout.active_R)
        return PolicyTerm(advantage_R * logp_R, log_ratio_R.detach().exp(), never_R)
    if objective == "cispo":
        ratio_R = log_ratio_R.detach().exp()
        outside_R = (ratio_R < low) | (ratio_R > high)
        return PolicyTerm(ratio_R.clamp(low, high) * advantage_R * logp_R, ratio_R, outside_R)
    if objective == "gspo":
        # GSPO-token: the value is the turn's ratio, the gradient goes through the token's own log-prob
        totals_M = logp_R.new_zeros(layout.lengths_M.shape[0]).index_add(0, layout.turn_R, log_ratio_R.detach())
        turn_log_ratio_M = totals_M / layout.lengths_M.clamp(min=1)
        ratio_R = turn_log_ratio_M[layout.turn_R].exp() * (logp_R - logp_R.detach()).exp()
    else:
        ratio_R = log_ratio_R.exp()
    term_R = torch.minimum(ratio_R * advantage_R, ratio_R.clamp(low, high) * advantage_R)
    value_R = ratio_R.detach()
    clipped_R = torch.where(advantage_R > 0, value_R > high, (value_R < low) & (advantage_R < 0))
    if dual_clip is not None:
        floor_R = dual_clip * advantage_R
        negative_R = advantage_R < 0
        clipped_R = clipped_R | (negative_R & (term_R.detach() < floor_R))
        term_R = torch.where(negative_R, torch.maximum(term_R, floor_R), term_R)
    return PolicyTerm(term_R, value_R, clipped_R)


class _Credit(NamedTuple):
    """Credit of each token: as it enters the advantage, before centring, and where the clip cut it."""

    used_R: Tensor
    clipped_R: Tensor
    cut_R: Tensor


def _credit(
    logp_R: Tensor, teacher_R: Tensor | None, layout: TokenLayout, agent_R: Tensor, credit_clip: float, center: bool
) -> _Credit:
    """Eq. 10; `center` subtracts each agent's mean over its tokens in turns of weight other than 0."""
    if teacher_R is None:
        zero_R = torch.zeros_like(logp_R)
        return _Credit(zero_R, zero_R, torch.zeros_like(layout.active_R))
    raw_R = teacher_R - logp_R
    credit_R = raw_R.clamp(-credit_clip, credit_clip)
    used_R = credit_R
    if center:
        counts_A = sum_by_agent(layout.active_R.to(credit_R.dtype), agent_R).clamp(min=1)
        means_A = sum_by_agent(credit_R, agent_R) / counts_A
        used_R = torch.where(layout.active_R, credit_R - means_A[agent_R], 0.0)
    return _Credit(used_R, credit_R, raw_R.abs() > credit_clip)


def _token_means(columns: dict[str, Tensor], layout: TokenLayout, num_tokens: Tensor) -> dict[str, Tensor]:
    """Mean of each per-token column over the tokens that count, in one product; 0 where none counts."""
    stacked = torch.stack([column.detach().to(layout.coefficient_R.dtype) for column in columns.values()])
    means = (stacked @ layout.active_R.to(stacked.dtype)) / num_tokens.clamp(min=1)
    return dict(zip(columns, means.unbind(), strict=True))


def _metrics(
    columns: dict[str, Tensor], loss_R: Tensor, layout: TokenLayout, agent_R: Tensor | None
) -> dict[str, Tensor]:
    """Token means of the columns, the spread of the advantage, counts, and sums and means by agent."""
    num_tokens = layout.active_R.sum()
    metrics = _token_means(columns, layout, num_tokens)
    spread_R = columns["advantage_mean"] - metrics["advantage_mean"]
    metrics["advantage_std"] = _token_means({"variance": spread_R.square()}, layout, num_tokens)["variance"].sqrt()
    metrics["num_tokens"], metrics["num_turns"] = num_tokens, layout.active_M.sum()
    if agent_R is not None:
        counts_A = sum_by_agent(layout.active_R.to(loss_R.dtype), agent_R).clamp(min=1)
        losses_A = sum_by_agent(loss_R, agent_R)
        credits_A = sum_by_agent(columns["credit_mean"], agent_R) / counts_A
        for agent, suffix in enumerate(AGENT_SUFFIXES):
            metrics[f"loss_{suffix}"], metrics[f"credit_mean_{suffix}"] = losses_A[agent], credits_A[agent]
    return metrics


def credit_policy_loss_reference(
    logp: Tensor,
    teacher_logp: Tensor | None,
    behaviour_logp: Tensor | None,
    turn_reward: Tensor,
    turn_offsets: Tensor,
    *,
    turn_weight: Tensor | None = None,
    turn_agent: Tensor | None = None,
    credit_weight: float = 0.1,
    credit_clip: float = 1.0,
    credit_center: bool = False,
    objective: str = "clipped",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    old_logp: Tensor | None = None,
    importance_cap: float = 2.0,
    reference_logp: Tensor | None = None,
    kl_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics); the signature of `credit_policy_loss`, without its checks. float64 log-probs stay float64."""
    dtype = torch.promote_types(logp.dtype, torch.float32)
    layout = token_layout(turn_offsets, turn_weight, logp.shape[0], dtype)

    def clean(values_R: Tensor) -> Tensor:
        return torch.where(layout.active_R, values_R.detach().to(dtype), 0.0)

    logp_R = torch.where(layout.active_R, logp.to(dtype), 0.0)
    fixed_logp_R = logp_R.detach()
    agent_R = torch.zeros_like(layout.turn_R) if turn_agent is None else turn_agent.long()[layout.turn_R]
    teacher_R = None if teacher_logp is None else clean(teacher_logp)
    credit = _credit(fixed_logp_R, teacher_R, layout, agent_R, credit_clip, credit_center)
    advantage_R = clean(turn_reward[layout.turn_R]) + credit_weight * credit.used_R

    anchor = behaviour_logp if old_logp is None else old_logp
    log_ratio_R = torch.zeros_like(fixed_logp_R) if anchor is None else logp_R - clean(anchor)
    policy = policy_term(objective, logp_R, log_ratio_R, advantage_R, layout, clip_low, clip_high, dual_clip)
    gain_R = policy.term_R
    if old_logp is not None and behaviour_logp is not None:
        gain_R = gain_R * (clean(old_logp) - clean(behaviour_logp)).exp().clamp(max=importance_cap)
    k3_R = torch.zeros_like(fixed_logp_R)
    if reference_logp is not None:
        difference_R = clean(reference_logp) - logp_R
        k3_R = torch.expm1(difference_R) - difference_R
        if kl_weight != 0.0:
            gain_R = gain_R - kl_weight * k3_R
    loss_R = -(layout.coefficient_R * gain_R)

    columns = {
        "clip_fraction": policy.clipped_R,
        "approx_kl": torch.expm1(log_ratio_R.detach()) - log_ratio_R.detach(),
        "ratio_mean": policy.ratio_R,
        "advantage_mean": advantage_R,
        "credit_mean": credit.clipped_R,
        "credit_abs_mean": credit.clipped_R.abs(),
        "credit_clip_fraction": credit.cut_R,
        "kl": k3_R,
    }
    metrics = _metrics(columns, loss_R.detach(), layout, None if turn_agent is None else agent_R)
    return loss_R.sum(), metrics
