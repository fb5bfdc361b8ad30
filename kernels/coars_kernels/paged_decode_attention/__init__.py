"""Attention of one new token per row over keys and values in pages; rows of a group read their common prefix once."""

from coars_kernels.paged_decode_attention.op import PrefixGroups, paged_decode_attention

__all__ = ["PrefixGroups", "paged_decode_attention"]
