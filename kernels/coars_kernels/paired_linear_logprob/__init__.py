"""Student's and teacher's log-probabilities of the same tokens, with one sweep over the head."""

from coars_kernels.paired_linear_logprob.op import paired_linear_logprob

__all__ = ["paired_linear_logprob"]
