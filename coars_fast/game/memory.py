"""What an agent is told of earlier sessions with the same user: a deterministic template over finished episodes (our
choice; a feedback loop without training, after AFL).

It holds what was recommended, what the user agent answered and what the user really took: the truth of an earlier
session is history in this one. It stands behind the history in the opening of both views, so these stay append-only.
"""

from __future__ import annotations

from dataclasses import dataclass

from coars_fast.game.episode import Episode, Turn
from coars_fast.game.prompts import one_line


@dataclass(frozen=True, kw_only=True)
class MemoryTexts:
    """Texts with named fields."""

    session: str
    turn: str
    turn_separator: str
    invalid_item: str
    no_action: str


MEMORY_TEXTS = {
    "brief": MemoryTexts(
        session="\nBefore: {turns}; took {item}.",
        turn="{item}, {action}",
        turn_separator="; ",
        invalid_item="no item",
        no_action="no answer",
    ),
    "full": MemoryTexts(
        session="\n\nIn an earlier session: {turns}. The item that the user then really took: {item}.",
        turn="{item} was recommended, the answer was {action}",
        turn_separator="; ",
        invalid_item="nothing",
        no_action="not given",
    ),
}


def session_text(episode: Episode) -> str:
    """One finished episode as later sessions with its user are told of it."""
    texts = MEMORY_TEXTS[episode.config.prompts]

    def told(turn: Turn) -> str:
        item = texts.invalid_item if turn.item is None else one_line(episode.titles[turn.item])
        action = texts.no_action if turn.judgement is None else turn.judgement.action
        return texts.turn.format(item=item, action=action)

    assert episode.waiting is None, "the session is not over"
    turns = texts.turn_separator.join(told(turn) for turn in episode.turns)
    return texts.session.format(turns=turns, item=one_line(episode.titles[episode.task.target]))
