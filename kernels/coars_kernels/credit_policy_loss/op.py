"""`credit_policy_loss`: the public function, its checks, and the one operator behind it.

`coars_kernels::credit_policy_loss` computes loss, gradient and metrics together, so a plain `autograd.Function` around
it has only to scale the gradient. On a GPU it is the Triton kernels of `triton_credit.py`; elsewhere, for float64
log-probs, and where Triton is not installed `torch_credit.py`. The tests hold both to the reference and its autograd.
Left out: a derivative of the gradient.
"""

import math
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from coars_kernels.checks import (
    INDEX_DTYPES,
    require,
    require_device,
    require_dtype,
    require_range,
    require_shape,
    values_are_visible,
)
from coars_kernels.credit_policy_loss.reference import (
    NUM_AGENTS,
    OBJECTIVES,
    metric_names,
)
from coars_kernels.dispatch import has_triton


class CreditOptions(TypedDict, total=False):
    """The keyword arguments of `credit_policy_loss`, for functions that pass them on; that function documents them."""

    turn_weight: Tensor | None
    turn_agent: Tensor | None
    credit_weight: float
    credit_clip: float
    credit_center: bool
    objective: str
    clip_low: float
    clip_high: float
    dual_clip: float | None
    old_logp: Tensor | None
    importance_cap: float
    reference_logp: Tensor | None
    kl_weight: float


def _check_tokens(logp: Tensor, others: dict[str, Tensor | None]) -> None:
    require(logp.dim() == 1, "logp", f"expected [R], got shape {list(logp.shape)}")
    require(logp.is_floating_point(), "logp", f"expected a floating dtype, got {logp.dtype}")
    for argument, tensor in others.items():
        if tensor is not None:
            require_shape(tensor, argument, (logp.shape[0],))
            require(tensor.is_floating_point(), argument, f"expected a floating dtype, got {tensor.dtype}")
            require_device(tensor, argument, logp, "logp")


def _check_turns(
    logp: Tensor, turn_reward: Tensor, turn_offsets: Tensor, turn_weight: Tensor | None, turn_agent: Tensor | None
) -> None:
    require(turn_reward.dim() == 1, "turn_reward", f"expected [M], got shape {list(turn_reward.shape)}")
    num_turns, num_tokens = turn_reward.shape[0], logp.shape[0]
    require(turn_reward.is_floating_point(), "turn_reward", f"expected a floating dtype, got {turn_reward.dtype}")
    require_shape(turn_offsets, "turn_offsets", (num_turns + 1,))
    require_dtype(turn_offsets, "turn_offsets", INDEX_DTYPES)
    if turn_weight is not None:
        require_shape(turn_weight, "turn_weight", (num_turns,))
        require(turn_weight.is_floating_point(), "turn_weight", f"expected a floating dtype, got {turn_weight.dtype}")
        require_device(turn_weight, "turn_weight", logp, "logp")
    if turn_agent is not None:
        require_shape(turn_agent, "turn_agent", (num_turns,))
        integral = not (turn_agent.is_floating_point() or turn_agent.is_complex())
        require(integral, "turn_agent", f"expected an integer dtype, got {turn_agent.dtype}")
        require_range(turn_agent, "turn_agent", 0, NUM_AGENTS)
        require_device(turn_agent, "turn_agent", logp, "logp")
    require_device(turn_reward, "turn_reward", logp, "logp")
    require_device(turn_offsets, "turn_offsets", logp, "logp")
    if values_are_visible(turn_offsets):
        first, last = int(turn_offsets[0]), int(turn_offsets[-1])
        spans = first == 0 and last == num_tokens
        require(spans, "turn_offsets", f"must run from 0 to R = {num_tokens}, got {first}..{last}")
        require(num_turns == 0 or int(turn_offsets.diff().amin()) >= 0, "turn_offsets", "must not descend")
    if turn_weight is not None:
        _check_finite(turn_weight, "turn_weight", None)
    _check_finite(turn_reward, "turn_reward", turn_weight)


def _check_finite(values_M: Tensor, argument: str, turn_weight: Tensor | None) -> None:
    """Raise if a value of a turn with weight is NaN or infinite; looks at values where that is cheap."""
    if not values_are_visible(values_M) or math.isfinite(values_M.detach().sum()):
        return  # a sum is finite only if every value is
    unfit_M = ~values_M.isfinite()
    if turn_weight is not None:
        unfit_M &= turn_weight != 0
    if bool(unfit_M.any()):
        turn = int(unfit_M.nonzero()[0])
        raise ValueError(f"{argument}: must be finite, got {values_M[turn].item()} in turn {turn}")


def _check_objective(
    objective: str, behaviour_logp: Tensor | None, old_logp: Tensor | None, dual_clip: float | None
) -> None:
    require(objective in OBJECTIVES, "objective", f"expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if behaviour_logp is None:
        require(objective == "faithful", "behaviour_logp", f"objective {objective!r} needs it")
        require(old_logp is None, "behaviour_logp", "old_logp needs it, for the importance weight")
    if dual_clip is not None:
        require(objective in ("clipped", "gspo"), "dual_clip", f"objective {objective!r} does not use it")
        _check_number(dual_clip, dual_clip > 1.0, "dual_clip", "must be above 1")


def _check_number(value: float, fits: bool, argument: str, rule: str) -> None:
    """`require` for a number. It writes the message on failure only: torch.compile cannot print what it traces."""
    if not fits:
        raise ValueError(f"{argument}: {rule}, got {value}")


@torch.library.custom_op("coars_kernels::credit_policy_loss", mutates_args=())
def _loss_and_gradient(
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
    """(loss, d loss / d logp [R], metrics [K]), in fp32 or, for float64 log-probs, float64."""
    if has_triton(logp) and logp.dtype != torch.float64:
        from coars_kernels.credit_policy_loss.triton_credit import credit_policy_loss_triton

        return credit_policy_loss_triton(
            logp, teacher_logp, behaviour_logp, turn_reward, turn_offsets,
            turn_weight, turn_agent, old_logp, reference_logp,
            credit_weight, credit_clip, credit_center, objective, clip_low, clip_high, dual_clip,
            importance_cap, kl_weight,
        )  # fmt: skip

    from coars_kernels.credit_policy_loss.torch_credit import credit_policy_loss_torch

    return credit_policy_loss_torch(
        logp, teacher_logp, behaviour_logp, turn_reward, turn_offsets,
        turn_weight, turn_agent, old_logp, reference_logp,
        credit_weight, credit_clip, credit_center, objective, clip_low, clip_high, dual_clip,
        importance_cap, kl_weight,
    )  # fmt: skip


@_loss_and_gradient.register_fake
def _(logp: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    turn_agent, dtype = arguments[5], _compute_dtype(logp)
    loss, grad_R = logp.new_empty((), dtype=dtype), logp.new_empty(logp.shape, dtype=dtype)
    return loss, grad_R, logp.new_empty(len(metric_names(turn_agent)), dtype=dtype)


def _compute_dtype(logp: Tensor) -> torch.dtype:
    return torch.promote_types(logp.dtype, torch.float32)


class _CreditPolicyLoss(torch.autograd.Function):
    """(loss, metrics [K]) of the operator's arguments; gradient in the first one only."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        loss, grad_R, metrics = _loss_and_gradient(logp, *arguments)
        ctx.save_for_backward(grad_R)
        ctx.mark_non_differentiable(metrics)
        ctx.dtype, ctx.num_arguments = logp.dtype, len(arguments)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad_R,) = ctx.saved_tensors
        return (grad_outputs[0] * grad_R).to(ctx.dtype), *[None] * ctx.num_arguments


def credit_policy_loss(
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
    """Policy loss of a packed batch of turns: Eq. 10 to 12, with the ratio objectives as options (design, section 1).

    loss = -sum_m w_m / |y_m| sum_n (term_n - kl_weight * k3_n). Weights are not normalised here: the caller's add up to
    1 over the whole batch, so the losses of micro-batches add up. Gradient flows through `logp` only. Turns of weight 0
    contribute exactly 0 to loss and gradient whatever their values, NaN included; turns without tokens contribute 0.

    Objectives, with advantage_n = turn_reward_m + credit_weight * clip(teacher_logp_n - logp_n, -c, c) and
    ratio_n = exp(logp_n - old_n), old being `old_logp` or else `behaviour_logp`:

    - "faithful": advantage * logp, Eq. 11 as printed.
    - "clipped": min(ratio * advantage, clamp(ratio, 1 - clip_low, 1 + clip_high) * advantage), PPO's.
    - "cispo": clamp(ratio, ...) without gradient, times advantage * logp.
    - "gspo": as "clipped", with the ratio's value the turn's exp(mean_n(logp_n - old_n)) and its gradient the token's
      own.

    Args:
        logp: [R] floating (fp32 is meant), log-probs of the sampled tokens now, in nats.
        teacher_logp: [R], the same tokens given the reference; None means no credit.
        behaviour_logp: [R], log-probs when sampled; None is allowed for "faithful" only.
        turn_reward: [M] floating, R_m; finite where w_m is not 0 (checked on CPU only).
        turn_offsets: [M+1] int32 or int64: turn m owns tokens [offsets[m], offsets[m+1]). Must run from 0 to R without
            descending; checked on CPU only.
        turn_weight: [M] floating and finite (checked on CPU only), w_m; by default 1/M each.
        turn_agent: [M] integer, 0 recommender, 1 user (checked on CPU only): for centring and for metrics by agent.
        credit_weight: lambda_SD.
        credit_clip: c, in nats.
        credit_center: subtract the agent's mean credit over its tokens in this call (all tokens without `turn_agent`).
        clip_low, clip_high: the ratio's interval is [1 - clip_low, 1 + clip_high].
        dual_clip: above 1, or None: for a negative advantage the term is at least dual_clip * advantage; "clipped"
            and "gspo" only.
        old_logp: [R], log-probs under the weights before this update, if other than the sampler's: it becomes the
            ratio's denominator, and each term is multiplied by min(exp(old_logp - behaviour_logp), importance_cap).
        importance_cap: bound of that weight.
        reference_logp: [R], log-probs under the frozen base.
        kl_weight: weight of k3 = exp(d) - d - 1, d = reference_logp - logp; with 0 the divergence is only measured.

    Returns:
        loss, a scalar in fp32 (float64 for float64 `logp`), and metrics, detached scalars of that dtype on the same
        device; reading them is the caller's only synchronisation. Means run over the tokens of turns with weight other
        than 0: clip_fraction, approx_kl (ratio - 1 - log ratio), ratio_mean, advantage_mean, advantage_std,
        credit_mean, credit_abs_mean (both clipped, before centring), credit_clip_fraction, kl (k3, unweighted).
        num_tokens; num_turns (with tokens and a weight). Given `turn_agent` also loss_rec and loss_user, which add up
        to loss, credit_mean_rec, credit_mean_user.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range, or another one needs it; the message begins
            with its name.
    """
    _check_tokens(
        logp,
        {
            "teacher_logp": teacher_logp,
            "behaviour_logp": behaviour_logp,
            "old_logp": old_logp,
            "reference_logp": reference_logp,
        },
    )
    _check_turns(logp, turn_reward, turn_offsets, turn_weight, turn_agent)
    _check_objective(objective, behaviour_logp, old_logp, dual_clip)
    _check_number(credit_clip, credit_clip >= 0.0, "credit_clip", "must be at least 0")
    _check_number(clip_low, 0.0 <= clip_low <= 1.0, "clip_low", "must lie in [0, 1]")
    _check_number(clip_high, clip_high >= 0.0, "clip_high", "must be at least 0")
    _check_number(importance_cap, importance_cap > 0.0, "importance_cap", "must be above 0")
    _check_number(kl_weight, kl_weight >= 0.0, "kl_weight", "must be at least 0")
    require(kl_weight == 0.0 or reference_logp is not None, "reference_logp", "kl_weight above 0 needs it")
    loss, metrics = _CreditPolicyLoss.apply(
        logp, teacher_logp, behaviour_logp, turn_reward, turn_offsets,
        turn_weight, turn_agent, old_logp, reference_logp,
        credit_weight, credit_clip, credit_center, objective, clip_low, clip_high, dual_clip,
        importance_cap, kl_weight,
    )  # fmt: skip
    return loss, dict(zip(metric_names(turn_agent), metrics.unbind(), strict=True))
