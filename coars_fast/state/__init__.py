"""What a run leaves on disk: its folder, its records and its checkpoints."""
