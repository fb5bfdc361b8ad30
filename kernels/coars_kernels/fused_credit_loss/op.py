"""`fused_credit_loss`: `paired_linear_logprob` and `credit_policy_loss` as one call."""

from typing import NamedTuple, Unpack

from torch import Tensor

from coars_kernels.credit_policy_loss.op import CreditOptions, credit_policy_loss
from coars_kernels.linear_logprob.op import linear_logprob
from coars_kernels.paired_linear_logprob.op import paired_linear_logprob


class FusedCreditLoss(NamedTuple):
    """Results of `fused_credit_loss`; only `loss` carries gradient."""

    loss: Tensor  # scalar fp32
    metrics: dict[str, Tensor]  # detached scalars, as credit_policy_loss returns them
    logp: Tensor  # [R] fp32, detached
    teacher_logp: Tensor | None  # [R] fp32, detached; None without a teacher


def fused_credit_loss(
    student: Tensor,
    teacher: Tensor | None,
    weight: Tensor,
    target: Tensor,
    behaviour_logp: Tensor | None,
    turn_reward: Tensor,
    turn_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    chunk_rows: int | None = None,
    path: str = "auto",
    **options: Unpack[CreditOptions],
) -> FusedCreditLoss:
    """The head of a CoARS step: both log-probabilities in one sweep over the vocabulary, then the loss (Eq. 10-12).

    Differentiable in `student`, and in `weight` and `bias` where they require grad; never in `teacher`.

    Args:
        student: [R, H] fp32, bf16 or fp16 hidden states that predict the trained tokens.
        teacher: [R, H], same dtype: hidden states given the reference, or None (no credit).
        weight: [V, H], the head in the same dtype.
        target: [R] int64, the sampled tokens.
        behaviour_logp: [R] fp32, their log-probs when sampled; None is allowed for objective "faithful" only.
        turn_reward, turn_offsets: [M] floating and [M+1] int32 or int64, as `credit_policy_loss` takes them.
        bias, temperature, chunk_rows, path: as `paired_linear_logprob` takes them.
        options: every keyword argument of `credit_policy_loss`.

    Returns:
        A named tuple: loss, metrics, and the detached logp and teacher_logp ([R] fp32, None without a teacher).

    Raises:
        ValueError: an argument is unfit; the message begins with its name.
    """
    teacher_logp = None
    if teacher is None:
        logp = linear_logprob(
            student, weight, target, bias=bias, temperature=temperature, chunk_rows=chunk_rows, path=path
        )
    else:
        logp, teacher_logp = paired_linear_logprob(
            student, teacher, weight, target, bias=bias, temperature=temperature, chunk_rows=chunk_rows, path=path
        )
    loss, metrics = credit_policy_loss(logp, teacher_logp, behaviour_logp, turn_reward, turn_offsets, **options)
    return FusedCreditLoss(loss, metrics, logp.detach(), teacher_logp)
