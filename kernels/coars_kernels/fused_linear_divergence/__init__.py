"""Divergence of a student's next-token distributions from a teacher's over the whole vocabulary, without logits."""

from coars_kernels.fused_linear_divergence.op import fused_linear_divergence

__all__ = ["fused_linear_divergence"]
