"""Both agents' low-rank adapters applied to one packed batch."""

from coars_kernels.agent_lora.op import agent_lora

__all__ = ["agent_lora"]
