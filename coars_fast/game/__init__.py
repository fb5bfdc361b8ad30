"""The conversation of the two agents: prompts, token templates, turn-taking, rewards, references. No torch here."""
