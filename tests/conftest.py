"""For every test: no network, and terminal output of a known width."""

import os

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["COLUMNS"] = "120"
