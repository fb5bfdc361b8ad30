"""Causal attention of packed new tokens whose keys, and those of all before them, lie in pages already."""

from coars_kernels.paged_prefill_attention.op import paged_prefill_attention

__all__ = ["paged_prefill_attention"]
