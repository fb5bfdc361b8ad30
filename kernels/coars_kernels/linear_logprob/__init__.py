"""Log-probabilities of given tokens from hidden states and the language-model head, without [R, V] logits."""

from coars_kernels.linear_logprob.op import linear_logprob

__all__ = ["linear_logprob"]
