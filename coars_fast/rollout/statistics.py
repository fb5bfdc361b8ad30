"""The figures of a rollout."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Statistics:
    """What a run has done so far."""

    conversations: int
    batch_size: int
    num_pages: int
    done: int = 0
    sampled_tokens: int = 0
    extended_tokens: int = 0
    """Prompts and partners' messages, computed in bulk."""
    shared_tokens: int = 0
    """Not computed, since another conversation's prompt begins alike."""
    repeated_tokens: int = 0
    """Computed again, since their pages had been given to others."""
    scored_tokens: int = 0
    """Of branches: contexts and what was scored."""
    blocks: int = 0
    steps: int = 0
    row_steps: int = 0
    pages_in_use: int = 0
    most_pages_in_use: int = 0
    seconds: float = 0.0

    @property
    def fill(self) -> float:
        """Mean share of the decode batch that was at work."""
        return self.row_steps / (self.steps * self.batch_size) if self.steps else 0.0

    def metrics(self) -> dict[str, float]:
        """For a log of steps."""
        return {
            "rollout_tokens": float(self.sampled_tokens),
            "rollout_fill": self.fill,
            "rollout_shared_tokens": float(self.shared_tokens),
            "rollout_repeated_tokens": float(self.repeated_tokens),
            "rollout_scored_tokens": float(self.scored_tokens),
        }

    def line(self) -> str:
        """For a progress bar."""
        seconds = max(self.seconds, 1e-9)
        return (
            f"{self.done}/{self.conversations} episodes  {self.done / seconds:.1f}/s  "
            f"{self.sampled_tokens / seconds:,.0f} tokens/s  batch {self.fill:.0%} full  "
            f"pages {self.pages_in_use}/{self.num_pages}"
        )
