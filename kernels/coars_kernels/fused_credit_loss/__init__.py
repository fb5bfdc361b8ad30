"""The whole head of a CoARS step: from student and teacher hidden states to the policy loss."""

from coars_kernels.fused_credit_loss.op import FusedCreditLoss, fused_credit_loss

__all__ = ["FusedCreditLoss", "fused_credit_loss"]
