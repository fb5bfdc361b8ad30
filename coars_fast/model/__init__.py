"""The language model: decoder, attention dispatch, LoRA adapters, reading and writing checkpoints."""
