"""d_t, the hindsight reference that only the teacher sees: a deterministic template over the finished turn (our
choice), or what `game.reference` puts in its place.

The template holds what was wrong or right, the true item and the corrected answer. A reference exists in training only:
an evaluation never writes one, and no ground truth reaches a student's sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

from coars_fast.config import Reference
from coars_fast.game.episode import RECOMMENDER, Episode, Turn
from coars_fast.game.prompts import OTHER_REFERENCES, name_item, one_line


def write_reference(episode: Episode, turn: Turn, agent: int) -> str:
    """Text of the template for this agent's reply in this turn."""
    prompts = episode.prompts
    if agent == RECOMMENDER:
        verdict = "right" if turn.hit else "wrong"
        return prompts.reference_rec.format(verdict=verdict, item=_truth(episode), transcript=turn.rec_text)
    assert turn.item is not None, "a user speaks only about a valid item"
    return prompts.reference_user.format(
        took="took" if turn.hit else "did not take",
        item=one_line(episode.titles[turn.item]),
        action=_right_action(turn),
        transcript=turn.user_text,
    )


def _truth(episode: Episode) -> str:
    """The true item as the recommender names it, or its title where it is no candidate."""
    task = episode.task
    title = one_line(episode.titles[task.target])
    if task.target not in task.candidates:
        return title
    return name_item(episode.prompts, task.candidates.index(task.target) + 1, title)


def _right_action(turn: Turn) -> str:
    return "click" if turn.hit else "dislike"


def reference_text(episodes: Sequence[Episode], number: int, turn: Turn, agent: int, kind: Reference) -> str:
    """Text of d_t for this agent's reply in this turn of episode `number`, by `game.reference`.

    Args:
        episodes: all of the step, which `other_user` chooses from.
        number: the turn's episode among them.
        turn, agent: whose reply it is for.
        kind: `template`: the template; `truth`: the true item or the right action alone; `diagnosis`: the template and
            what the agent wrote about its reply, where it wrote anything; `other_user`: the template of another user's
            turn, and nothing where no other user's episode has a turn of this agent; `empty`: nothing.
    """
    episode = episodes[number]
    texts = OTHER_REFERENCES[episode.config.prompts]
    if kind == "template":
        return write_reference(episode, turn, agent)
    if kind == "diagnosis":
        template, diagnosis = write_reference(episode, turn, agent), turn.diagnoses.get(agent)
        return texts.diagnosis.format(reference=template, diagnosis=diagnosis) if diagnosis else template
    if kind == "truth":
        if agent == RECOMMENDER:
            return texts.truth_rec.format(item=_truth(episode))
        return texts.truth_user.format(action=_right_action(turn))
    if kind == "other_user":
        return _of_another_user(episodes, number, turn, agent)
    return ""


def _of_another_user(episodes: Sequence[Episode], number: int, turn: Turn, agent: int) -> str:
    """The template for the same turn, or the last one, of the next episode with another user."""
    for other in (*episodes[number + 1 :], *episodes[:number]):
        turns = [t for t in other.turns if agent == RECOMMENDER or t.user_spoke]
        if other.task.user != episodes[number].task.user and turns:
            return write_reference(other, turns[min(turn.number, len(turns)) - 1], agent)
    return ""


def diagnosis_prompts(episode: Episode, agent: int) -> list[tuple[Turn, list[int]]]:
    """Each turn with a reply of the agent, and the tokens that ask it what was wrong with that reply: its view up to
    and with the reply, a system message with the template and the question, and its own role header."""
    view, template = episode.views[agent], episode.template
    turns = [turn for turn in episode.turns if agent == RECOMMENDER or turn.user_spoke]
    found = []
    for turn, span in zip(turns, view.spans, strict=True):
        said = view.tokens[: span.end]
        closing = template.end[1:] if said[-1] == template.end_of_turn else template.end
        asked = OTHER_REFERENCES[episode.config.prompts].ask_diagnosis.format(
            reference=write_reference(episode, turn, agent)
        )
        question = template.message("system", episode.codec.encode(asked))
        found.append((turn, [*said, *closing, *question, *template.headers["assistant"]]))
    return found


def branch(episode: Episode, turn: Turn, agent: int, text: str | None = None) -> list[int]:
    """d_t as tokens: a system message between the student's context and the reply's role header (which it repeats).

    Without a text there is no message either: the teacher then sees what the student saw, and the credit is 0.

    Args:
        episode, turn, agent: whose reply it is for.
        text: of d_t; None: the template's.
    """
    template = episode.template
    text = write_reference(episode, turn, agent) if text is None else text
    message = template.message("system", episode.codec.encode(text)) if text else []
    return [*message, *template.headers["assistant"]]
