"""Playing episodes: K/V that lives as long as a conversation, batched decoding, log-probs recorded when sampled."""
