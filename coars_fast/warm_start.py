"""The warm start (`--warm-start`): supervised fine-tuning on conversations written from the training part.

A model that never saw the reply formats, or was given a new tokenizer, learns them here, with what the training part
says about users: conversations in which the recommender names the item that was really taken, and the user agent takes
it and turns others down. Some replies follow a reference, so that the teacher of CoARS can. It is plain imitation:
CoARS comes after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from coars_fast.config import Config
from coars_fast.data.records import Lesson, Task
from coars_fast.data.tasks import TaskSource
from coars_fast.game.episode import RECOMMENDER, USER, Episode, Reply
from coars_fast.game.prompts import format_judgement, format_recommendation, name_item
from coars_fast.game.reference import branch
from coars_fast.learn.supervised import cosine, fine_tune
from coars_fast.model.decoder import Decoder
from coars_fast.progress import Screen

REFERENCE_RATE = 0.2
"""Share of conversations whose last replies are learned after a reference."""
WRONG_FIRST_RATE = 0.5
"""Share of conversations in which a wrong item comes first (the recommender does not learn that reply)."""


def warm_start(
    decoder: Decoder, tasks: TaskSource, new_episode: Callable[[Task], Episode], config: Config, screen: Screen
) -> None:
    """Fine-tune whatever requires a gradient, in place: the base model, or both adapters where it has them.

    Raises:
        NonFiniteError: the loss diverged.
    """
    sft = config.sft
    with_adapters = sft.trainable == "adapters"
    with screen.bar("warm start", sft.num_steps) as advance:
        fine_tune(
            decoder,
            _batches(tasks, new_episode, config, with_adapters),
            num_steps=sft.num_steps,
            learning_rate=sft.learning_rate,
            schedule=cosine(),
            progress=lambda step, loss: advance(step + 1, f"loss {loss:.3f}"),
        )


def _batches(
    tasks: TaskSource, new_episode: Callable[[Task], Episode], config: Config, with_adapters: bool
) -> Iterator[tuple[list[Lesson], list[int] | None]]:
    copying = config.sft.copying_steps if config.sft.trainable == "all" else 0
    for step in range(config.sft.num_steps):
        rng = np.random.default_rng([config.seed, 77, step])
        if step < copying:
            yield copying_lessons(tasks, new_episode, config, rng, in_order=3 * step < copying), None
            continue
        pairs = [
            pair
            for task in tasks.warm_start_tasks(step, config.sft.batch_size)
            for pair in conversation(new_episode(task), rng)
        ]
        yield [lesson for _, lesson in pairs], [agent for agent, _ in pairs] if with_adapters else None


def copying_lessons(
    tasks: TaskSource,
    new_episode: Callable[[Task], Episode],
    config: Config,
    rng: np.random.Generator,
    *,
    in_order: bool,
) -> list[Lesson]:
    """Lists of candidates to copy from: a small model learns here that what it names comes from the list.
    Conversations alone, one title to a list, teach it that much later.

    Args:
        tasks, new_episode, config: as in `warm_start`.
        rng: draws tasks and orders.
        in_order: the same list again, word for word (learned first); otherwise each title once, in any order, as a
            recommender names it.
    """
    lessons = []
    for task in tasks.warm_start_tasks(int(rng.integers(1 << 30)), config.sft.batch_size):
        episode = new_episode(task)
        codec, template = episode.codec, episode.template
        titles = [codec.encode(f" {title}") for title in episode.candidate_titles]
        shown = codec.encode("Candidates:" + "".join(f" {title};" for title in episode.candidate_titles))
        tokens = [*template.bos, *template.message("user", shown), *template.headers["assistant"]]
        is_answer = [False] * len(tokens)
        before, after = ([], codec.encode(";")) if in_order else (codec.encode("Item:"), codec.encode("\n"))
        for i in range(len(titles)) if in_order else rng.permutation(len(titles)):
            tokens += [*before, *titles[i], *after]
            is_answer += [False] * len(before) + [True] * len(titles[i]) + [False] * len(after)
        lessons.append(Lesson(tokens=tokens, is_answer=is_answer))
    return lessons


def conversation(episode: Episode, rng: np.random.Generator) -> list[tuple[int, Lesson]]:
    """Lessons of both agents from one scripted conversation about the truth.

    Args:
        episode: fresh, with the truth among its candidates.
        rng: decides whether a wrong item comes first, and whether the replies follow a reference.
    """
    task = episode.task
    right = task.candidates.index(task.target)
    shown = [right]
    if rng.random() < WRONG_FIRST_RATE and episode.config.max_turns > 1:
        wrong = int(rng.choice([i for i in range(len(task.candidates)) if i != right]))
        shown.insert(0, wrong)
    for choice in shown:
        item = name_item(episode.prompts, choice + 1, episode.candidate_titles[choice])
        episode.receive(_reply(episode, format_recommendation("fits the history.", item)))
        episode.receive(_reply(episode, judgement_text(choice == right, rng)))
    if rng.random() < REFERENCE_RATE:
        return [(agent, _after_reference(episode, agent)) for agent in (RECOMMENDER, USER)]
    return [(agent, _view_lesson(episode, agent)) for agent in (RECOMMENDER, USER)]


def judgement_text(right: bool, rng: np.random.Generator) -> str:
    """The user's reply to the right item or to a wrong one."""
    if right:
        return format_judgement("that is what I want.", "click", float(rng.choice((0.85, 0.90, 0.95))))
    if rng.random() < 0.5:
        return format_judgement("not what I want.", "skip", float(rng.choice((0.30, 0.35, 0.40))))
    return format_judgement("not what I want.", "dislike", float(rng.choice((0.05, 0.10, 0.15))))


def _reply(episode: Episode, text: str) -> Reply:
    ids = (*episode.codec.encode(text), episode.template.end_of_turn)
    return Reply(ids, (0.0,) * len(ids))


def _learned(episode: Episode, agent: int) -> Sequence[bool]:
    """Which of the agent's replies are worth learning: the user's all, the recommender's only the right one."""
    return [agent == USER or turn.hit for turn in episode.turns]


def _view_lesson(episode: Episode, agent: int) -> Lesson:
    view = episode.views[agent]
    is_answer = [False] * len(view.tokens)
    for span, learned in zip(view.spans, _learned(episode, agent), strict=True):
        is_answer[span.start : span.end] = [learned] * (span.end - span.start)
    return Lesson(tokens=view.tokens, is_answer=is_answer)


def _after_reference(episode: Episode, agent: int) -> Lesson:
    """The last reply, after the reference that hindsight would give."""
    view = episode.views[agent]
    span = view.spans[-1]
    context = [*view.tokens[: span.fork], *branch(episode, episode.turns[-1], agent)]
    reply = view.tokens[span.start : span.end]
    return Lesson(tokens=[*context, *reply], is_answer=[False] * len(context) + [True] * len(reply))
