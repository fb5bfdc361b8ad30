"""One conversation as a state machine: who speaks next, what they see, what their replies mean, what they earn.

It owns two append-only token sequences, the recommender's view and the user's view (DESIGN section 2). It neither runs
a model nor knows one: a rollout asks `waiting`, extends and decodes that agent's view, and hands the reply to
`receive`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from coars_fast.config import GameConfig
from coars_fast.data.records import Task
from coars_fast.game.prompts import (
    PROMPTS,
    REPLY_LINES,
    Judgement,
    list_items,
    name_item,
    one_line,
    parse_judgement,
    parse_recommendation,
)
from coars_fast.game.rewards import TurnReward, final_reward, reward_turn
from coars_fast.game.template import TextCodec, TokenTemplate

RECOMMENDER, USER = 0, 1
AGENTS = ("rec", "user")


@dataclass(frozen=True)
class Reply:
    """Sampled tokens of one message and their log-probs when sampled."""

    ids: tuple[int, ...]
    """At least one token, the closing one included where the agent ended its reply."""
    logp: tuple[float, ...]


@dataclass(frozen=True)
class Span:
    """Where a reply stands in its view."""

    fork: int
    """Position of the role header before the reply: where a teacher's branch leaves the sequence."""
    start: int
    """First sampled token."""
    end: int
    """One past the last sampled token."""


@dataclass
class View:
    """An append-only token sequence: what one agent has seen and said."""

    tokens: list[int]
    spans: list[Span] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    """Behaviour log-probs of the sampled tokens, span after span."""


@dataclass
class Turn:
    """What happened in one turn. `item` is an index into the catalogue; None: the recommender's reply was invalid."""

    number: int
    rec_text: str
    item: int | None
    hit: bool
    user_text: str = ""
    user_spoke: bool = False
    judgement: Judgement | None = None
    reward: TurnReward | None = None
    diagnoses: dict[int, str] = field(default_factory=dict)
    """By agent: what it wrote in hindsight about its reply (`game.reference` diagnosis)."""


class Episode:
    """A conversation about one task.

    Args:
        task: user, history, truth and candidates.
        titles: the catalogue.
        codec, template: the model's tokens.
        config: turns, prompts and rewards.
        memory: of earlier sessions (`game.memory.session_text`), behind the history in both views.
    """

    def __init__(
        self,
        task: Task,
        titles: Sequence[str],
        codec: TextCodec,
        template: TokenTemplate,
        config: GameConfig,
        *,
        memory: str = "",
    ):
        self.task, self.titles, self.codec, self.template, self.config = task, titles, codec, template, config
        self.prompts = PROMPTS[config.prompts]
        self.candidate_titles = [one_line(titles[i]) for i in task.candidates]
        self.turns: list[Turn] = []
        prompts, history = self.prompts, history_text(task.history, titles, config) + memory
        candidates = list_items(prompts, self.candidate_titles)
        first = prompts.first_rec.format(history=history, candidates=candidates)
        self.views = (
            View([*template.bos, *self._message("system", prompts.system_rec), *self._message("user", first)]),
            View(user_prompt(history, codec, template, config)),
        )
        self.waiting: int | None = None
        self._ask(RECOMMENDER)

    def _message(self, role, text: str) -> list[int]:
        return self.template.message(role, self.codec.encode(text))

    def _ask(self, agent: int) -> None:
        """Open the agent's next message: its view now ends with the assistant's header."""
        self.views[agent].tokens.extend(self.template.headers["assistant"])
        self.waiting = agent

    def longest_views(self, max_reply_tokens: int) -> tuple[int, int]:
        """By agent: tokens that its view has at most when its last reply ends, from now on."""
        template = self.template
        header, end = {role: len(ids) for role, ids in template.headers.items()}, len(template.end)
        answer = max(max_reply_tokens, len(self.codec.encode(self.prompts.invalid_rec)))
        counts = {count: n for n, count in enumerate(self.task.peer_counts)}  # one candidate of each
        peers = max((len(self._peers(n)) for n in counts.values()), default=0)
        more = self.config.max_turns - len(self.turns)
        own = header["assistant"] + max_reply_tokens + end
        rec, user = (len(view.tokens) for view in self.views)
        return (
            rec + more * (own + header["user"] + answer + end),
            user + more * (own + header["user"] + max_reply_tokens + peers + end),
        )

    def reply_forms(self) -> list[tuple[int, list[int]]]:
        """By agent, tokens that every reply of the required form holds: how its lines begin, the first one behind the
        header."""
        header = self.template.headers["assistant"]
        found = []
        for agent, (first, *others) in enumerate(REPLY_LINES):
            found.append((agent, [*header, *self.codec.encode(first)]))
            found += [(agent, self.codec.encode(f"\n{line}")) for line in others]
        return found

    def is_valid(self, reply: Reply) -> bool:
        """Whether `receive` would understand this reply of the waiting agent."""
        if self.waiting == RECOMMENDER:
            return self.named_candidate(reply) is not None
        return self.judgement(reply) is not None

    def _ended(self, reply: Reply) -> bool:
        return reply.ids[-1] == self.template.end_of_turn

    def _words(self, reply: Reply) -> tuple[int, ...]:
        """The reply without a closing control token: what the partner reads."""
        return reply.ids[:-1] if reply.ids[-1] in self.template.control else reply.ids

    def named_candidate(self, reply: Reply) -> int | None:
        """Index of the candidate that a recommender's reply names; None: it cannot be read."""
        if not self._ended(reply):
            return None
        return parse_recommendation(self.codec.decode(self._words(reply)), self.candidate_titles, self.prompts)

    def judgement(self, reply: Reply) -> Judgement | None:
        """What a user agent's reply says; None: it cannot be read."""
        return parse_judgement(self.codec.decode(self._words(reply))) if self._ended(reply) else None

    def receive(self, reply: Reply) -> None:
        """Take the waiting agent's reply, and move on to the partner or to the end of the episode."""
        assert self.waiting is not None, "the episode is over"
        assert reply.ids and len(reply.ids) == len(reply.logp)
        assert self.template.control.isdisjoint(reply.ids[:-1]), "sampling ends a reply at its first control token"
        if self.waiting == RECOMMENDER:
            self._receive_recommendation(reply)
        else:
            self._receive_judgement(reply)

    def _keep(self, agent: int, reply: Reply) -> None:
        view, header = self.views[agent], len(self.template.headers["assistant"])
        start = len(view.tokens)
        view.tokens.extend(reply.ids)
        view.spans.append(Span(start - header, start, len(view.tokens)))
        view.logp.extend(reply.logp)
        view.tokens.extend(self.template.end[1:] if self._ended(reply) else self.template.end)

    def _receive_recommendation(self, reply: Reply) -> None:
        self._keep(RECOMMENDER, reply)
        named = self.named_candidate(reply)
        item = None if named is None else self.task.candidates[named]
        text = self.codec.decode(self._words(reply))
        turn = Turn(len(self.turns) + 1, text, item, hit=item == self.task.target)
        self.turns.append(turn)
        if named is None:
            self._finish_turn(turn, self.codec.encode(self.prompts.invalid_rec))
            return
        shown = [*self._words(reply), *self._peers(named)]
        self.views[USER].tokens.extend(self.template.message("user", shown))
        self._ask(USER)

    def _peers(self, candidate: int) -> list[int]:
        """What the user agent hears of its peers about a candidate."""
        peers = peers_text(self.task.peer_counts[candidate], self.task.num_peers, self.config)
        return self.codec.encode(peers) if peers else []

    def _receive_judgement(self, reply: Reply) -> None:
        judgement = self.judgement(reply)
        self._keep(USER, reply)
        turn = self.turns[-1]
        turn.user_spoke, turn.judgement = True, judgement
        turn.user_text = self.codec.decode(self._words(reply))
        self._finish_turn(turn, self._words(reply))

    def _finish_turn(self, turn: Turn, answer: Sequence[int]) -> None:
        """Reward the turn; stop on a click or after the last turn, otherwise show the recommender the answer."""
        game = self.config
        turn.reward = reward_turn(
            hit=turn.hit,
            rec_valid=turn.item is not None,
            judgement=turn.judgement,
            user_spoke=turn.user_spoke,
            turn=turn.number,
            max_turns=game.max_turns,
            stage=game.stage,
            peer_similarity=self.task.peer_similarity,
            alpha=game.alpha,
            exclude=game.exclude_accepted_misses,
        )
        clicked = turn.judgement is not None and turn.judgement.action == "click"
        if clicked or turn.number == self.config.max_turns:
            self._end()
            return
        self.views[RECOMMENDER].tokens.extend(self.template.message("user", answer))
        self._ask(RECOMMENDER)

    def _end(self) -> None:
        """The outcome is known: settle what every turn has earned."""
        self.waiting = None
        for turn in self.turns:
            assert turn.reward is not None
            turn.reward = final_reward(
                turn.reward,
                self.config.rewards,
                hit=turn.hit,
                solved=self.turns[-1].hit,
                rec_valid=turn.item is not None,
                judgement=turn.judgement,
                user_spoke=turn.user_spoke,
            )


def history_text(history: Sequence[int], titles: Sequence[str], config: GameConfig) -> str:
    """The history as both agents are shown it."""
    return PROMPTS[config.prompts].history_separator.join(one_line(titles[i]) for i in history)


def user_prompt(history: str, codec: TextCodec, template: TokenTemplate, config: GameConfig) -> list[int]:
    """Tokens that open a user agent's view."""
    text = PROMPTS[config.prompts].system_user.format(history=history)
    return [*template.bos, *template.message("system", codec.encode(text))]


def peers_text(count: int, num_peers: int, config: GameConfig) -> str:
    """p_t: how many of the similar users took the item; empty without peers."""
    return PROMPTS[config.prompts].peers.format(count=count, num=num_peers) if num_peers else ""


def judgement_prompt(
    history: Sequence[int],
    item: int,
    titles: Sequence[str],
    peer_count: int,
    num_peers: int,
    codec: TextCodec,
    template: TokenTemplate,
    config: GameConfig,
) -> list[int]:
    """Tokens of a user agent's view that is asked about one item outside a conversation (F1-disc)."""
    prompts = PROMPTS[config.prompts]
    message = prompts.neutral_rec.format(item=name_item(prompts, 1, one_line(titles[item])))
    message += peers_text(peer_count, num_peers, config)
    return [
        *user_prompt(history_text(history, titles, config), codec, template, config),
        *template.message("user", codec.encode(message)),
        *template.headers["assistant"],
    ]
