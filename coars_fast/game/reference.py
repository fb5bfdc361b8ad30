"""d_t, the hindsight reference that only the teacher sees: a deterministic template over the finished turn (our
choice).

It holds what was wrong or right, the true item and the corrected answer. It exists in training only: an evaluation
never writes one, and no ground truth reaches a student's sequence.
"""

from __future__ import annotations

from coars_fast.game.episode import RECOMMENDER, Episode, Turn
from coars_fast.game.prompts import name_item, one_line


def write_reference(episode: Episode, turn: Turn, agent: int) -> str:
    """Text of d_t for this agent's reply in this turn."""
    titles, task, prompts = episode.titles, episode.task, episode.prompts
    if agent == RECOMMENDER:
        truth = one_line(titles[task.target])
        if task.target in task.candidates:
            truth = name_item(prompts, task.candidates.index(task.target) + 1, truth)
        verdict = "right" if turn.hit else "wrong"
        return prompts.reference_rec.format(verdict=verdict, item=truth, transcript=turn.rec_text)
    assert turn.item is not None, "a user speaks only about a valid item"
    return prompts.reference_user.format(
        took="took" if turn.hit else "did not take",
        item=one_line(titles[turn.item]),
        action="click" if turn.hit else "dislike",
        transcript=turn.user_text,
    )


def branch(episode: Episode, turn: Turn, agent: int) -> list[int]:
    """d_t as tokens: a system message between the student's context and the reply's role header (which it repeats).

    Without a text there is no message either: the teacher then sees what the student saw, and the credit is 0.
    """
    text, template = write_reference(episode, turn, agent), episode.template
    message = template.message("system", episode.codec.encode(text)) if text else []
    return [*message, *template.headers["assistant"]]
