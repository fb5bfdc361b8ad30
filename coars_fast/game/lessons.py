"""Supervised lessons in the synthetic world, as token sequences: skills, conversations, following a reference.

`python -m coars_fast.pretrain` makes `tiny_base` from them. Every lesson is drawn from a random world of its own: only
the meaning of words carries over. A lesson's `is_answer` marks the tokens that are learned (the replies).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from coars_fast.config import GameConfig
from coars_fast.data.records import Lesson, Task
from coars_fast.data.world import GENRES, MATCH_RATES, STYLES, draw_titles, kind
from coars_fast.game import personas
from coars_fast.game.episode import RECOMMENDER, Episode, Reply, Turn
from coars_fast.game.prompts import format_recommendation, parse_recommendation
from coars_fast.game.reference import branch
from coars_fast.game.rewards import TurnReward
from coars_fast.game.template import TextCodec, TokenTemplate

RANDOM_RATE = 0.25
"""Share of a conversation's recommendations that are random."""
INVALID_RATE = 0.2
"""Share of those that name a title from elsewhere."""


class LessonMaker:
    """Draws lessons.

    Args:
        codec, template: the model's tokens.
        game: turns and prompts, as in training.
        num_candidates, history_length: sizes in conversations.
    """

    def __init__(
        self,
        codec: TextCodec,
        template: TokenTemplate,
        game: GameConfig,
        num_candidates: int = 10,
        history_length: int = 6,
    ):
        self.codec, self.template, self.game = codec, template, game
        self.num_candidates, self.history_length = num_candidates, history_length

    # ------------------------------------------------------------------------------------------------------- skills

    def _drill(self, question: str, *answer: tuple[str, bool]) -> Lesson:
        """A question and its answer in pieces, each with whether it is to be learned, in the chat format."""
        encode, template = self.codec.encode, self.template
        tokens = [*template.bos, *template.message("user", encode(question)), *template.headers["assistant"]]
        is_answer = [False] * len(tokens)
        for text, learned in answer:
            ids = encode(text)
            tokens += ids
            is_answer += [learned] * len(ids)
        return Lesson(tokens=[*tokens, template.end_of_turn], is_answer=[*is_answer, True])

    def kinds(self, rng: np.random.Generator) -> Lesson:
        """What the words of a title mean."""
        titles = draw_titles(int(rng.integers(3, 9)), rng)
        return self._drill("Kinds: " + "; ".join(titles), (" " + "; ".join(" ".join(kind(t)) for t in titles), True))

    def copying(self, rng: np.random.Generator, num_items: int) -> Lesson:
        """A list again, word for word: titles of the same kind must not be mixed up."""
        titles = "; ".join(draw_titles(num_items, rng))
        return self._drill("Candidates: " + titles, (f" {titles};", True))

    def retrieval(self, rng: np.random.Generator, num_items: int) -> Lesson:
        """Titles in a list by what they are (style and genre, or one of them alone), many queries to a list. Of several
        that fit, the first is right."""
        titles = draw_titles(num_items, rng)
        kinds = [kind(title) for title in titles]
        answers: list[tuple[str, bool]] = []
        for i in rng.integers(num_items, size=10):
            wanted = [{0, 1}, {1}, {0}][int(rng.choice(3, p=(0.7, 0.2, 0.1)))]
            found = next(j for j, other in enumerate(kinds) if all(other[w] == kinds[i][w] for w in wanted))
            query = " ".join(kinds[i][w] for w in sorted(wanted))
            answers += [(f" {query}:", False), (f" {titles[found]}", True), (";", False)]
        return self._drill("Candidates: " + "; ".join(titles), *answers)

    def recommending(
        self,
        rng: np.random.Generator,
        num_items: int,
        *,
        repeat: bool = True,
        popular_rate: float = 0.25,
        absent_rate: float = 0.0,
        history_length: int = 0,
    ) -> Lesson:
        """Titles by what is wanted, in the words of a recommender's reply, many to a list.

        Args:
            rng: draws the list and the queries.
            num_items: length of the list.
            repeat: a query may come again (and can be answered from before).
            popular_rate: share of queries for what is popular within a genre.
            absent_rate: share of queries for a title of the history, or where there is none for any style and genre.
                The list may hold no such title: the best that it does hold is right then, never one from the history.
            history_length: other titles shown before the list, as a user's history.
        """
        drawn = draw_titles(num_items + history_length, rng)
        titles, history = drawn[:num_items], drawn[num_items:]
        answers: list[tuple[str, bool]] = []
        for i in rng.integers(num_items, size=6) if repeat else rng.permutation(num_items)[:6]:
            style, genre = kind(titles[i])
            if absent_rate and rng.random() < absent_rate:
                if history:
                    style, genre = kind(history[rng.integers(len(history))])
                else:
                    style, genre = list(STYLES)[rng.integers(len(STYLES))], list(GENRES)[rng.integers(len(GENRES))]
            if rng.random() < popular_rate:
                style = personas.POPULAR
            found = personas.choose(titles, style, genre, set())
            answers += [(f"Reason: likes {style} {genre}.\nItem:", False), (f" {titles[found]}", True), ("\n", False)]
        shown = "Candidates: " + "; ".join(titles)
        return self._drill(f"History: {'; '.join(history)}\n{shown}" if history else shown, *answers)

    def taste(self, rng: np.random.Generator) -> Lesson:
        """What a history says about its user."""
        history, _ = self._user(rng, 0)
        style, genre = personas.taste(history)
        return self._drill("History: " + "; ".join(history), (f" likes {style} {genre}.", True))

    def matches(self, rng: np.random.Generator) -> Lesson:
        """Whether titles fit a history."""
        history, others = self._user(rng, 6)
        words = ("no", "yes")
        lines = []
        for title in others:
            (style, genre), (fits_style, fits_genre) = kind(title), personas.fits(history, title)
            lines.append(f" {style} {words[fits_style]}, {genre} {words[fits_genre]}.")
        question = f"History: {'; '.join(history)}\nItems: {'; '.join(others)}"
        return self._drill(question, ("".join(lines), True))

    # ------------------------------------------------------------------------------------------------ conversations

    def _user(self, rng: np.random.Generator, num_others: int) -> tuple[list[str], list[str]]:
        """A history of a random user, and other titles of which about half would be to their taste in part."""
        styles, genres = list(STYLES), list(GENRES)
        liked = (styles[rng.integers(len(styles))], genres[rng.integers(len(genres))])
        pool = draw_titles(400, rng)
        history = _draw_liked(pool, liked, self.history_length, rng)
        rest = [title for title in pool if title not in history]
        likely = _draw_liked(rest, liked, num_others, rng)
        random = rest[-num_others:] if num_others else []
        others = [a if rng.random() < 0.4 else b for a, b in zip(likely, random, strict=True)]
        return history, others

    def _episode(self, rng: np.random.Generator) -> Episode:
        """A fresh episode in a small random world."""
        styles, genres = list(STYLES), list(GENRES)
        liked = (styles[rng.integers(len(styles))], genres[rng.integers(len(genres))])
        pool = draw_titles(300, rng)
        taken = _draw_liked(pool, liked, self.history_length + 1, rng)
        wrong = [title for title in pool if title not in taken][: self.num_candidates - 1]
        shown = [taken[-1], *wrong]
        order = rng.permutation(self.num_candidates)
        titles = taken[:-1] + [shown[i] for i in order]
        first = self.history_length
        rate = (0.02, 0.1, 0.6)
        counts = [int(rng.binomial(5, rate[sum(personas.fits(taken[:-1], t))])) for t in titles[first:]]
        task = Task(
            user=0,
            history=tuple(range(first)),
            target=first + int(np.flatnonzero(order == 0)[0]),
            candidates=tuple(range(first, first + self.num_candidates)),
            peer_counts=tuple(counts),
            num_peers=5,
            peer_similarity=0.0,
        )
        return Episode(task, titles, self.codec, self.template, self.game)

    def _reply(self, text: str) -> Reply:
        ids = (*self.codec.encode(text), self.template.end_of_turn)
        return Reply(ids, (0.0,) * len(ids))

    def _speak(self, episode: Episode, rng: np.random.Generator) -> str:
        """What the persona whose turn it is says."""
        history = [episode.titles[i] for i in episode.task.history]
        if episode.waiting == RECOMMENDER:
            tried = {episode.titles[turn.item] for turn in episode.turns if turn.item is not None}
            return personas.recommend(history, episode.candidate_titles, tried, rng)
        item = episode.turns[-1].item
        assert item is not None
        return personas.judge(history, episode.titles[item], rng)

    def conversation(self, rng: np.random.Generator) -> list[Lesson]:
        """Both views of a conversation of the scripted pair.

        Some recommendations are random ones, from which only the user learns: else it would learn to believe the
        recommender's reason instead of reading the title. A few name no candidate, so that what follows is known too.
        """
        episode = self._episode(rng)
        learned: tuple[list[bool], list[bool]] = ([], [])
        while episode.waiting is not None:
            agent, text, genuine = episode.waiting, self._speak(episode, rng), True
            if agent == RECOMMENDER and rng.random() < RANDOM_RATE:
                titles = draw_titles(1, rng) if rng.random() < INVALID_RATE else episode.candidate_titles
                text = format_recommendation(_random_reason(rng), str(rng.choice(titles)))
                genuine = False
            learned[agent].append(genuine)
            episode.receive(self._reply(text))
        lessons = []
        for view, genuine in zip(episode.views, learned, strict=True):
            is_answer = [False] * len(view.tokens)
            for span, learn in zip(view.spans, genuine, strict=True):
                is_answer[span.start : span.end] = [learn] * (span.end - span.start)
            if any(is_answer):
                lessons.append(Lesson(tokens=view.tokens, is_answer=is_answer))
        return lessons

    def reference(self, rng: np.random.Generator) -> Lesson:
        """One reply after a hindsight reference: say what the reference says is right."""
        episode = self._episode(rng)
        for _ in range(int(rng.integers(0, 2 * self.game.max_turns - 1))):
            before = episode.waiting
            episode.receive(self._reply(self._speak(episode, rng)))
            if episode.waiting is None or before is None:
                return self.reference(rng)
        agent = episode.waiting
        assert agent is not None
        history = [episode.titles[i] for i in episode.task.history]
        truth = episode.titles[episode.task.target]
        if agent == RECOMMENDER:
            named = parse_recommendation(self._speak(episode, rng), episode.candidate_titles, episode.prompts)
            assert named is not None
            turn = Turn(len(episode.turns) + 1, "", None, hit=episode.task.candidates[named] == episode.task.target)
            style, genre = kind(truth)
            answer = format_recommendation(f"likes {style} {genre}.", truth)
        else:
            turn = episode.turns[-1]
            assert turn.item is not None
            action = "click" if turn.hit else "dislike"
            answer = personas.write_judgement(history, episode.titles[turn.item], action, rng)
        turn.reward = TurnReward(None, None, False)
        tokens = branch(episode, turn, agent)
        answered = self._reply(answer).ids
        header = len(self.template.headers["assistant"])
        context = [*episode.views[agent].tokens[: len(episode.views[agent].tokens) - header], *tokens]
        return Lesson(tokens=[*context, *answered], is_answer=[False] * len(context) + [True] * len(answered))


def _draw_liked(pool: Sequence[str], liked: tuple[str, str], count: int, rng: np.random.Generator) -> list[str]:
    """`count` titles as a user with this (style, genre) taste takes them."""
    kinds = [kind(title) for title in pool]
    groups: list[list[int]] = [[], [], [], []]
    for i, (style, genre) in enumerate(kinds):
        groups[(style != liked[0]) + 2 * (genre != liked[1])].append(i)
    both, genre_only, style_only, neither = groups
    queues = [both, genre_only, style_only, neither]
    taken = []
    for drawn in rng.choice(4, size=count, p=MATCH_RATES):
        queue = queues[drawn] or neither
        taken.append(pool[queue.pop()])
    return taken


def _random_reason(rng: np.random.Generator) -> str:
    """A recommender's reason that says nothing about the item."""
    if rng.random() < 0.3:
        return "try this."
    style = [personas.POPULAR, *STYLES][rng.integers(len(STYLES) + 1)]
    return f"likes {style} {list(GENRES)[rng.integers(len(GENRES))]}."


Draw = Callable[[np.random.Generator], list[Lesson]]


class Curriculum:
    """Which lessons come when, in rounds that each begin with a fresh learning rate: reading titles and finding them in
    lists that grow with success, then conversations; exact copying and mostly conversations.

    Short lists first: a model this small sits on a long plateau otherwise (docs/log.md has the figures).
    """

    FINDING = 0.45
    """Share of the first round at which conversations begin at the latest."""

    def __init__(self, maker: LessonMaker):
        self.maker = maker
        self.longest = 3
        """Items in the longest list of a lesson."""
        self.finds_all = False

    def grow(self, share_found: float) -> None:
        """Make lists longer once most items of the present length are found."""
        if share_found > 0.72:
            self.finds_all = self.finds_all or self.longest == self.maker.num_candidates
            self.longest = min(self.longest + 1, self.maker.num_candidates)

    def _lists(self, lesson: Callable[[np.random.Generator, int], Lesson]) -> Draw:
        def draw(rng: np.random.Generator) -> list[Lesson]:
            return [lesson(rng, self.longest if rng.random() < 0.5 else int(rng.integers(2, self.longest + 1)))]

        return draw

    def lessons(self, number: int, progress: float) -> list[tuple[float, Draw]]:
        """Kinds of lessons with their weights in round 1 or 2, at this share (0 to 1) of it."""
        return self.first_round(progress) if number == 1 else self.second_round()

    def first_round(self, progress: float) -> list[tuple[float, Draw]]:
        """Kinds of lessons with their weights at this share (0 to 1) of the first round."""
        maker = self.maker
        skills: list[tuple[float, Draw]] = [
            (0.12, lambda rng: [maker.kinds(rng)]),
            (0.1, lambda rng: [maker.taste(rng)]),
            (0.13, lambda rng: [maker.matches(rng)]),
            (0.4, self._lists(maker.retrieval)),
            (0.25, self._lists(maker.recommending)),
        ]
        if progress < self.FINDING and not self.finds_all:
            return skills
        return [
            *[(0.4 * weight, draw) for weight, draw in skills],
            (0.4, maker.conversation),
            (0.2, lambda rng: [maker.reference(rng)]),
        ]

    def second_round(self) -> list[tuple[float, Draw]]:
        """Kinds of lessons with their weights in the second round."""
        maker = self.maker
        length = maker.history_length
        beside_history = partial(
            maker.recommending, repeat=False, popular_rate=0.1, absent_rate=0.7, history_length=length
        )
        return [
            (0.1, lambda rng: [maker.kinds(rng), maker.taste(rng), maker.matches(rng)]),
            (0.15, self._lists(maker.copying)),
            (0.35, self._lists(beside_history)),
            (0.28, maker.conversation),
            (0.12, lambda rng: [maker.reference(rng)]),
        ]
