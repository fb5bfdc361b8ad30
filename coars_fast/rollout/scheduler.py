"""Who works when: keeps the decode batch full while conversations stand at different turns of different agents.

A turn is admitted when pages for all that it can come to are free (the context so far and the longest reply), so no
running turn is ever interrupted. Between two blocks of decoding, all turns that were admitted are extended in one go.
Views that wait for the partner keep their pages as long as nobody who could run needs them; then they are released, and
computed again at their next turn. Prompts that several conversations share are computed once and forked. Branches of
conversations that are over (`scoring.py`) are scored in batches from what is still cached.

Imports no model: anything with `waiting`, `views` and `receive` is played.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from coars_fast.errors import ConfigError
from coars_fast.game.episode import Reply
from coars_fast.rollout.pages import CachedSequence, PagePool
from coars_fast.rollout.prefixes import Prefix, find_prefixes
from coars_fast.rollout.protocols import Conversation, Engine
from coars_fast.rollout.sampling import Constraint, PartialReply, Sampling
from coars_fast.rollout.scoring import Branch, Scoring
from coars_fast.rollout.statistics import Statistics

OVER_SHARE = 8
"""A block of decoding ends when one in so many of its rows is over: then others take their places."""


@dataclass(eq=False)
class _Seat:
    """A conversation's place in the run."""

    number: int
    conversation: Conversation
    prefixes: list[Prefix | None]
    cached: list[CachedSequence | None] = field(default_factory=lambda: [None, None])
    seen: list[int] = field(default_factory=lambda: [0, 0])
    """By agent: tokens that were cached once."""
    attempt: int = 0
    reply: PartialReply | None = None

    @property
    def turn(self) -> tuple[int, list[int]]:
        """Whose turn it is, and what that agent has seen."""
        agent = self.conversation.waiting
        assert agent is not None
        return agent, self.conversation.views[agent].tokens


def check_conversations(
    conversations: Sequence[Conversation], pool: PagePool, max_positions: int, max_reply_tokens: int
) -> None:
    """Refuse what could not be played to its end, before any work.

    Raises:
        ConfigError: a conversation begins with nothing, may outgrow the model's positions, or has turns that may
            outgrow the whole K/V memory; the message holds its size and the limit.
    """
    room = pool.num_pages * pool.page_size
    for number, conversation in enumerate(conversations):
        if conversation.waiting is None:
            continue
        if not conversation.views[conversation.waiting].tokens:
            raise ConfigError(f"episode {number}: its prompt is empty")
        longest = max(conversation.longest_views(max_reply_tokens))
        remedy = "data.history_length, the number of candidates, game.max_turns or rollout.max_reply_tokens"
        if longest > max_positions:
            raise ConfigError(
                f"episode {number}: a conversation of up to {longest} tokens does not fit the model's {max_positions} "
                f"positions: lower {remedy}"
            )
        if longest > room:
            raise ConfigError(
                f"episode {number}: a turn with up to {longest} tokens does not fit the K/V memory of {room} tokens "
                f"({pool.num_pages} pages of {pool.page_size}): raise rollout.kv_gib, or lower {remedy}"
            )


class Scheduler:
    """Plays conversations to their end; use it once.

    Args:
        engine: whose pool holds nothing else that matters: what is idle may be released.
        conversations: checked by `check_conversations`.
        sampling: seed and closing tokens.
        temperature: of every reply's first attempt.
        max_reply_tokens: longer replies are cut.
        batch_size: conversations at the same time.
        noise_id: key of the sampling noise of (conversation, agent, attempt).
        resample_invalid: draw a reply that is not valid once more, at temperature 1.
        constraint: what a reply of the waiting agent is held to, if anything.
        watch: called after each block of decoding.
        branches: of the conversation with this number, once it is over, what is to be scored.
    """

    def __init__(
        self,
        engine: Engine,
        conversations: Sequence[Conversation],
        *,
        sampling: Sampling,
        temperature: float,
        max_reply_tokens: int,
        batch_size: int,
        noise_id: Callable[[int, int, int], int],
        resample_invalid: bool = False,
        constraint: Callable[[Conversation], Constraint] | None = None,
        watch: Callable[[Statistics], None] | None = None,
        branches: Callable[[int, Conversation], Sequence[Branch]] | None = None,
    ):
        self.engine, self.pool, self.sampling = engine, engine.pool, sampling
        self.temperature, self.max_reply_tokens, self.batch_size = temperature, max_reply_tokens, batch_size
        self.noise_id, self.resample_invalid, self.constraint, self.watch = (
            noise_id,
            resample_invalid,
            constraint,
            watch,
        )
        self.statistics = Statistics(len(conversations), min(batch_size, len(conversations)), self.pool.num_pages)
        self.branches, self.scoring = branches, Scoring(engine, self.statistics)
        self.new = deque(self._seats(conversations))
        self.ready: deque[_Seat] = deque()
        """In flight and due: first come, first served."""
        self.running: list[_Seat] = []
        self.seated: dict[_Seat, None] = {}
        """In flight, in the order in which they began."""
        self.prefixes: list[Prefix] = []
        """Those that are cached."""

    def _seats(self, conversations: Sequence[Conversation]) -> Iterator[_Seat]:
        """Places for all that are not over, with the prompts that they share."""
        playing = [n for n, conversation in enumerate(conversations) if conversation.waiting is not None]
        self.statistics.done = len(conversations) - len(playing)
        prefixes: list[list[Prefix | None]] = []
        for agent in (0, 1):
            prompts = []
            for n in playing:
                view = conversations[n].views[agent].tokens
                # The last token before a reply is extended by each on its own: the reply's first logits come from it.
                prompts.append(view[:-1] if agent == conversations[n].waiting else view)
            prefixes.append(find_prefixes(agent, prompts))
        for n, *mine in zip(playing, *prefixes, strict=True):
            yield _Seat(n, conversations[n], list(mine))

    def run(self) -> Statistics:
        """Play everything."""
        begun = time.perf_counter()
        try:
            while self.new or self.seated:
                self._compute_prefixes()
                started = self._admit()
                self.running += started
                self._decode()
                self._collect()
                self.scoring.work(others_run=bool(self.new or self.seated))
                self._note(begun)
        finally:
            self._release_all()
        return self.statistics

    # ------------------------------------------------------------------------------------------------------- admission

    def _candidates(self) -> Iterator[_Seat]:
        """Who could begin a turn now, in order."""
        yield from list(self.ready)
        yield from list(self.new)[: max(0, self.batch_size - len(self.seated))]

    def _compute_prefixes(self) -> None:
        """Cache what those who could begin share with others, as long as pages are free anyway."""
        wanted: list[Prefix] = []
        free = self.pool.num_free
        for seat in self._candidates():
            agent, view = seat.turn
            prefix = seat.prefixes[agent] if seat.cached[agent] is None else None
            free -= self.pool.pages_for(len(view) + self.max_reply_tokens)
            while prefix is not None and prefix.sequence is None and prefix not in wanted:
                free -= self.pool.pages_for(len(prefix.tokens))
                if prefix.members > 1 and free >= 0:
                    wanted.append(prefix)
                prefix = prefix.parent
        for level in ([p for p in wanted if p.parent is None], [p for p in wanted if p.parent is not None]):
            self._cache_prefixes(level)

    def _cache_prefixes(self, prefixes: Sequence[Prefix]) -> None:
        sequences, parts = [], []
        for prefix in prefixes:
            source = prefix.nearest
            prefix.sequence = self.pool.new() if source is None else self.pool.fork(source)
            sequences.append(prefix.sequence)
            parts.append(prefix.tokens[prefix.sequence.length :])
            self.statistics.shared_tokens += prefix.sequence.length
            self.statistics.extended_tokens += len(parts[-1])
        if prefixes:
            self.prefixes += prefixes
            self.engine.extend(sequences, parts, [prefix.agent for prefix in prefixes])

    def _admit(self) -> list[_Seat]:
        """Begin turns, first come first served, as long as pages for whole turns can be had."""
        started = []
        for seat in self._candidates():
            agent, view = seat.turn
            sequence = self._reserve(seat, agent, len(view) + self.max_reply_tokens)
            if sequence is None:
                break
            seat.cached[agent] = sequence
            context = view[sequence.length :]
            self.statistics.extended_tokens += len(context)
            self.statistics.repeated_tokens += max(0, seat.seen[agent] - sequence.length)
            seat.reply = PartialReply(
                sequence,
                view,
                agent,
                self.noise_id(seat.number, agent, seat.attempt),
                self.max_reply_tokens,
                1.0 if seat.attempt else self.temperature,
                self.constraint(seat.conversation) if self.constraint else None,
            )
            started.append(seat)
            queue = self.ready if self.ready else self.new
            assert queue.popleft() is seat
            self.seated[seat] = None
        assert started or self.running, "nobody runs, and yet nobody can begin"
        return started

    def _reserve(self, seat: _Seat, agent: int, length: int) -> CachedSequence | None:
        """The agent's view with pages for `length` tokens: cached, forked from a prompt or new; None if there is no
        room."""
        pool, sequence, prefix = self.pool, seat.cached[agent], seat.prefixes[agent]
        if sequence is not None:
            if not self._make_room(pool.pages_to_grow(sequence, length), seat, agent, None):
                return None
        elif (source := prefix.nearest if prefix else None) is not None and self._make_room(
            pool.pages_for(length) - source.length // pool.page_size, seat, agent, source
        ):
            sequence = pool.fork(source)
            self.statistics.shared_tokens += sequence.length
        elif self._make_room(pool.pages_for(length), seat, agent, None):
            sequence = pool.new()
        else:
            return None
        pool.grow(sequence, length)
        if prefix is not None:  # used or not, the conversation has begun without it
            seat.prefixes[agent] = None
            self._leave(prefix)
        return sequence

    def _leave(self, prefix: Prefix | None) -> None:
        """A member is done with a prefix; the last one releases it."""
        while prefix is not None:
            prefix.members -= 1
            if prefix.members:
                return
            if prefix.sequence is not None:
                self.pool.release(prefix.sequence)
                self.prefixes.remove(prefix)
            prefix = prefix.parent

    def _make_room(self, pages: int, seat: _Seat, agent: int, source: CachedSequence | None) -> bool:
        """Release what is idle until so many pages are free, the views that are needed last first; whether they are.

        Neither the seat's view of `agent` nor `source` is released, nor what anybody who is running writes.
        """
        if self.scoring.make_room(pages):
            return True
        for owner in reversed(self.seated):
            speaker = owner.conversation.waiting
            for view in (0, 1):
                at_work = view == speaker and (owner.reply is not None or (owner is seat and view == agent))
                sequence = owner.cached[view]
                if sequence is not None and not at_work:
                    self.pool.release(sequence)
                    owner.cached[view] = None
                    if pages <= self.pool.num_free:
                        return True
        for prefix in [p for p in self.prefixes if p.sequence is not source]:
            assert prefix.sequence is not None
            self.pool.release(prefix.sequence)
            prefix.sequence = None
            self.prefixes.remove(prefix)
        return pages <= self.pool.num_free

    # ------------------------------------------------------------------------------------------------------------ work

    def _decode(self) -> None:
        """A block of decoding, until enough replies are over to make room for others."""
        replies = [seat.reply for seat in self.running if seat.reply is not None]
        if not replies:
            return
        until = max(1, len(replies) // OVER_SHARE)
        steps, worked = self.engine.decode(replies, self.sampling, until=until)
        self.statistics.steps += steps
        self.statistics.row_steps += worked
        self.statistics.blocks += 1

    def _collect(self) -> None:
        """Hand over the replies that are over."""
        over = [seat for seat in self.running if seat.reply is not None and seat.reply.over]
        self.running = [seat for seat in self.running if seat.reply is None or not seat.reply.over]
        for seat in over:
            self._finish(seat)

    def _finish(self, seat: _Seat) -> None:
        agent, view = seat.turn
        reply, sequence, conversation = seat.reply, seat.cached[agent], seat.conversation
        assert reply is not None and sequence is not None
        seat.reply = None
        self.statistics.sampled_tokens += len(reply.ids)
        said = Reply(tuple(reply.ids), tuple(reply.logp))
        if self.resample_invalid and not seat.attempt and not conversation.is_valid(said):
            self.pool.truncate(sequence, len(view) - 1)  # the next logits come from the last token of the context
            seat.seen[agent], seat.attempt = sequence.length, 1
            self.ready.appendleft(seat)
            return
        self.pool.trim(sequence)
        seat.seen[agent], seat.attempt = sequence.length, 0
        conversation.receive(said)
        if conversation.waiting is None:
            found = self.branches(seat.number, conversation) if self.branches else ()
            if found:
                self.scoring.add(conversation, seat.cached, found)
                seat.cached = [None, None]
            self._release(seat)
            self.statistics.done += 1
        else:
            self.ready.append(seat)

    def _release(self, seat: _Seat) -> None:
        for agent, sequence in enumerate(seat.cached):
            if sequence is not None:
                self.pool.release(sequence)
            self._leave(seat.prefixes[agent])  # an agent who never had its say
        del self.seated[seat]

    def _release_all(self) -> None:
        """Leave nothing behind in the pool."""
        for seat in list(self.seated):
            self._release(seat)
        for prefix in self.prefixes:
            if prefix.sequence is not None:
                self.pool.release(prefix.sequence)
        self.scoring.drop()

    def _note(self, begun: float) -> None:
        figures = self.statistics
        figures.pages_in_use = self.pool.num_used
        figures.most_pages_in_use = max(figures.most_pages_in_use, figures.pages_in_use)
        figures.seconds = time.perf_counter() - begun
        if self.watch is not None:
            self.watch(figures)
