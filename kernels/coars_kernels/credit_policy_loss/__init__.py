"""The CoARS policy loss: turn rewards and per-token self-distilled credit, under one of four objectives."""

from coars_kernels.credit_policy_loss.op import CreditOptions, credit_policy_loss

__all__ = ["CreditOptions", "credit_policy_loss"]
