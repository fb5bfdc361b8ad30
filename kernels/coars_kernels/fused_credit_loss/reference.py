"""What `fused_credit_loss` means: the references of the two log-probabilities and of the loss, one after the other."""

from typing import Unpack

from torch import Tensor

from coars_kernels.credit_policy_loss.op import CreditOptions
from coars_kernels.credit_policy_loss.reference import credit_policy_loss_reference
from coars_kernels.linear_logprob.reference import linear_logprob_reference
from coars_kernels.paired_linear_logprob.reference import paired_linear_logprob_reference


def fused_credit_loss_reference(
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
    **options: Unpack[CreditOptions],
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) from full logits; arguments as `fused_credit_loss`, without checks and chunks."""
    teacher_logp = None
    if teacher is None:
        logp = linear_logprob_reference(student, weight, target, bias=bias, temperature=temperature)
        assert isinstance(logp, Tensor)
    else:
        logp, teacher_logp = paired_linear_logprob_reference(
            student, teacher, weight, target, bias=bias, temperature=temperature
        )
    return credit_policy_loss_reference(logp, teacher_logp, behaviour_logp, turn_reward, turn_offsets, **options)
