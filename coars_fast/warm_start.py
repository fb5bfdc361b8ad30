"""The warm start (`--warm-start`): supervised fine-tuning on conversations written from the training part.

A model that never saw the reply formats, or was given new tokens, learns them here, with what the training part says
about users: conversations in which the recommender names the item that was really taken, because of the item of the
history that is most like it, and the user agent takes it and turns others down; the same about single items, outside of
a conversation. Some replies follow a reference, so that the teacher of CoARS can. A small model first learns to find
items in lists. It is plain imitation: CoARS comes after. With `sft.popular_rate` the recommender has a fault as well,
the one that pretrained models are known for: it names what is popular.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from coars_fast.config import Config
from coars_fast.data.records import Lesson, Task
from coars_fast.data.sasrec import ItemSpace
from coars_fast.data.tasks import TaskSource
from coars_fast.game.episode import RECOMMENDER, USER, Episode, Reply, judgement_prompt
from coars_fast.game.prompts import format_judgement, format_recommendation, name_item
from coars_fast.game.reference import branch
from coars_fast.learn.supervised import cosine, fine_tune
from coars_fast.model.decoder import Decoder
from coars_fast.progress import Screen

REFERENCE_RATE = 0.2
"""Share of conversations whose last replies are learned after a reference."""
WRONG_FIRST_RATE = 0.5
"""Share of conversations in which a wrong item comes first (the recommender does not learn that reply)."""
LISTS_PER_CONVERSATION = 0.25
"""Lists to find items in that are mixed among the conversations, for each of them, where lists came first."""
QUERIES = 8
"""Items to find in a list, at most."""
ALIKE = 20
"""An item is looked for by one of so many that are most like it."""
FOUND = 1.2
"""Lists grow when the mean loss of `GROW_EVERY` steps is below this, in nats."""
GROW_EVERY = 10
WANTED, NOT_WANTED = "that is what I want.", "not what I want."
POPULAR = "likes what is popular."


def reason(title: str) -> str:
    """Why a recommender names an item: another that is like it."""
    return f"likes {title}."


def warm_start(
    decoder: Decoder, tasks: TaskSource, new_episode: Callable[[Task], Episode], config: Config, screen: Screen
) -> None:
    """Fine-tune whatever requires a gradient, in place: the base model, or both adapters where it has them.

    Raises:
        NonFiniteError: the loss diverged.
    """
    sft, teacher = config.sft, WarmStart(tasks, new_episode, config)
    with screen.bar("warm start", sft.num_steps) as advance:

        def progress(step: int, loss: float) -> None:
            teacher.note(step, loss)
            stage = f"lists of {teacher.longest}" if step < sft.finding_steps else "conversations"
            advance(step + 1, f"{stage}, loss {loss:.3f}")

        fine_tune(
            decoder,
            teacher.batches(),
            num_steps=sft.num_steps,
            learning_rate=sft.learning_rate,
            schedule=cosine(),
            progress=progress,
        )


class WarmStart:
    """Writes the lessons: lists that grow with success for `sft.finding_steps`, then conversations.

    Args:
        tasks: users and items of the training part, and SASRec.
        new_episode: makes a fresh conversation about a task.
        config: settings.
    """

    def __init__(self, tasks: TaskSource, new_episode: Callable[[Task], Episode], config: Config):
        self.tasks, self.new_episode, self.config = tasks, new_episode, config
        self.space = ItemSpace(tasks.maker.sasrec)
        self.size = min(tasks.maker.mode.size, self.space.num_items - 1)
        self.longest = min(3, self.size)
        """Items in the longest list."""
        taken = np.bincount(
            [item for part in tasks.split.train_sequences for item in part], minlength=self.space.num_items
        )
        self.popularity = (taken + 1.0) / (taken + 1.0).sum()
        self._losses: list[float] = []

    def note(self, step: int, loss: float) -> None:
        """Make lists longer once most items of the present length are found."""
        if step < self.config.sft.finding_steps:
            self._losses.append(loss)
        if len(self._losses) == GROW_EVERY:
            self.longest = min(self.longest + (float(np.mean(self._losses)) < FOUND), self.size)
            self._losses.clear()

    def batches(self) -> Iterator[tuple[list[Lesson], list[int] | None]]:
        """Lessons and their agents (None: the base model alone) of every step."""
        sft = self.config.sft
        for step in range(sft.num_steps):
            rng, single = (np.random.default_rng([self.config.seed, stream, step]) for stream in (77, 78))
            if step < sft.finding_steps:
                yield [self.finding(rng, self.longest) for _ in range(sft.batch_size)], None
                continue
            tasks = self.tasks.warm_start_tasks(step, sft.batch_size)
            pairs = [
                pair
                for task in tasks
                for pair in conversation(self.new_episode(task), self.space, rng, self._popular_choice(task, rng))
            ]
            pairs += [(USER, judging(self.new_episode(task), single)) for task in tasks]
            if sft.trainable == "adapters":
                yield [lesson for _, lesson in pairs], [agent for agent, _ in pairs]
                continue
            lists = round(LISTS_PER_CONVERSATION * sft.batch_size) if sft.finding_steps else 0
            yield [*(lesson for _, lesson in pairs), *(self.finding(rng, self.size) for _ in range(lists))], None

    def _popular_choice(self, task: Task, rng: np.random.Generator) -> int | None:
        """The most popular candidate, in `sft.popular_rate` of all conversations."""
        if rng.random() >= self.config.sft.popular_rate:
            return None
        return int(self.popularity[list(task.candidates)].argmax())

    def finding(self, rng: np.random.Generator, longest: int) -> Lesson:
        """Many recommendations from one list, each because of an item of the history: the candidate most like that one
        is right. Conversations alone, one title to a list, teach a small model that much later.

        Args:
            rng: draws the list, popular items more often, and the history.
            longest: items in the list, at most.
        """
        shown = rng.choice(len(self.popularity), int(rng.integers(2, longest + 1)), replace=False, p=self.popularity)
        history: list[int] = []
        for item in rng.choice(shown, 3 * QUERIES):
            alike = int(rng.choice(self.space.neighbours(int(item), ALIKE)))
            if alike not in shown and alike not in history and len(history) < QUERIES:
                history.append(alike)
        if not history:
            return self.finding(rng, longest)
        task = Task(
            user=0,
            history=tuple(history[i] for i in rng.permutation(len(history))),
            target=int(shown[0]),
            candidates=tuple(shown.tolist()),
            peer_counts=(0,) * len(shown),
            num_peers=0,
            peer_similarity=0.0,
        )
        episode = self.new_episode(task)
        encode, tokens = episode.codec.encode, list(episode.views[RECOMMENDER].tokens)
        is_answer = [False] * len(tokens)
        for item in history:
            found = self.space.most_alike(item, task.candidates)
            named = name_item(episode.prompts, found + 1, episode.candidate_titles[found])
            before, answer, after = format_recommendation(reason(episode.titles[item]), ""), f" {named}", "\n"
            for text, learned in ((before.rstrip(), False), (answer, True), (after, False)):
                ids = encode(text)
                tokens += ids
                is_answer += [learned] * len(ids)
        return Lesson(tokens=tokens, is_answer=is_answer)


def conversation(
    episode: Episode, space: ItemSpace, rng: np.random.Generator, popular: int | None = None
) -> list[tuple[int, Lesson]]:
    """Lessons of both agents from one scripted conversation.

    Args:
        episode: fresh, with the truth among its candidates.
        space: says which item of the history is most like a candidate.
        rng: decides whether a wrong item comes first, and whether the replies follow a reference.
        popular: the candidate that the recommender names because it is popular; None: it names the truth. After a
            reference it always names the truth.
    """
    task = episode.task

    def because(choice: int) -> str:
        return reason(episode.titles[task.history[space.most_alike(task.candidates[choice], task.history)]])

    right = task.candidates.index(task.target)
    wrong_first = rng.random() < WRONG_FIRST_RATE and episode.config.max_turns > 1
    follows_reference = rng.random() < REFERENCE_RATE
    named, why = (right, because(right)) if popular is None or follows_reference else (popular, POPULAR)
    shown = [(named, why, True)]
    others = [i for i in range(len(task.candidates)) if i not in (right, named)]
    if wrong_first and others:
        wrong = int(rng.choice(others))
        shown.insert(0, (wrong, because(wrong), False))
    for choice, said, _ in shown:
        item = name_item(episode.prompts, choice + 1, episode.candidate_titles[choice])
        episode.receive(_reply(episode, format_recommendation(said, item)))
        episode.receive(_reply(episode, judgement_text(choice == right, rng)))
    if follows_reference:
        return [(agent, _after_reference(episode, agent)) for agent in (RECOMMENDER, USER)]
    learned = {RECOMMENDER: [learn for *_, learn in shown], USER: [True] * len(shown)}
    return [(agent, _view_lesson(episode, agent, learned[agent])) for agent in (RECOMMENDER, USER)]


def judging(episode: Episode, rng: np.random.Generator) -> Lesson:
    """The user agent about one item outside of a conversation, as F1-disc asks: the truth, or another candidate.

    Args:
        episode: fresh, with the truth and others among its candidates.
        rng: draws the item and the reply.
    """
    task, right = episode.task, bool(rng.random() < 0.5)
    others = [i for i, item in enumerate(task.candidates) if item != task.target]
    choice = task.candidates.index(task.target) if right else int(rng.choice(others))
    prompt = judgement_prompt(
        task.history, task.candidates[choice], episode.titles, task.peer_counts[choice], task.num_peers, episode.codec,
        episode.template, episode.config,
    )  # fmt: skip
    reply = _reply(episode, judgement_text(right, rng)).ids
    return Lesson(tokens=[*prompt, *reply], is_answer=[False] * len(prompt) + [True] * len(reply))


def judgement_text(right: bool, rng: np.random.Generator) -> str:
    """The user's reply to the right item or to a wrong one."""
    if right:
        return format_judgement(WANTED, "click", float(rng.choice((0.85, 0.90, 0.95))))
    if rng.random() < 0.5:
        return format_judgement(NOT_WANTED, "skip", float(rng.choice((0.30, 0.35, 0.40))))
    return format_judgement(NOT_WANTED, "dislike", float(rng.choice((0.05, 0.10, 0.15))))


def _reply(episode: Episode, text: str) -> Reply:
    ids = (*episode.codec.encode(text), episode.template.end_of_turn)
    return Reply(ids, (0.0,) * len(ids))


def _view_lesson(episode: Episode, agent: int, learned: Sequence[bool]) -> Lesson:
    """A view of which the replies marked in `learned` are learned."""
    view = episode.views[agent]
    is_answer = [False] * len(view.tokens)
    for span, learn in zip(view.spans, learned, strict=True):
        is_answer[span.start : span.end] = [learn] * (span.end - span.start)
    return Lesson(tokens=view.tokens, is_answer=is_answer)


def _after_reference(episode: Episode, agent: int) -> Lesson:
    """The last reply, after the reference that hindsight would give."""
    view = episode.views[agent]
    span = view.spans[-1]
    context = [*view.tokens[: span.fork], *branch(episode, episode.turns[-1], agent)]
    reply = view.tokens[span.start : span.end]
    return Lesson(tokens=[*context, *reply], is_answer=[False] * len(context) + [True] * len(reply))
