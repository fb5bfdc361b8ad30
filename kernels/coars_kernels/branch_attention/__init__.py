"""Attention of branches that read a packed trunk's keys and values in place, then themselves causally; no gradient."""

from coars_kernels.branch_attention.op import branch_attention

__all__ = ["branch_attention"]
