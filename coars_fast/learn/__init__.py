"""From finished conversations to new adapter weights. It sees token ids, rewards and references, never prompts."""
