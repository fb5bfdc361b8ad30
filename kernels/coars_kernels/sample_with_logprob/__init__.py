"""Sampling of next tokens with noise that depends on the token's own place only, and their exact log-probabilities."""

from coars_kernels.sample_with_logprob.op import sample_with_logprob

__all__ = ["sample_with_logprob"]
