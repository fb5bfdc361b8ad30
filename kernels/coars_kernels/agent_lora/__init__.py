"""Both agents' low-rank adapters applied to one packed batch."""

from coars_kernels.agent_lora.op import AgentRows, agent_lora

__all__ = ["AgentRows", "agent_lora"]
