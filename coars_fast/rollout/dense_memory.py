"""How the engine works on a CPU: one forward pass at a time over dense rows, with a look at every token.

A pass feeds whatever is due: the context of a turn that begins, the last token of one that goes on, and behind either
the guesses of a drafter, which the pass itself checks (`drafts.py`). So extending costs no pass of its own.

Shape suffixes: N packed tokens, n rows that are wanted, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from coars_fast.rollout.dense import DenseAttend, DenseRows, Segment
from coars_fast.rollout.drafts import CONTEXT, Drafter
from coars_fast.rollout.forward import Forward
from coars_fast.rollout.pages import CachedSequence, PagePool
from coars_fast.rollout.sampling import PartialReply, Sampling, Temperatures, constrain, draw

WORTH = 4
"""Guesses are checked where there is at least one for so many rows."""


class DenseMemory:
    """How an engine works on a CPU. Each agent has its own rows, since a batch is sorted by agent (see `weights.py`).

    Args:
        pool: what the rows are copies of.
        forward: of the decoder, with merged adapters.
        drafter: guesses tokens; None feeds only what was drawn.
    """

    def __init__(self, pool: PagePool, forward: Forward, drafter: Drafter | None):
        self.pool, self.forward, self.drafter = pool, forward, drafter
        self.rows: dict[int, DenseRows] = {}

    def clear(self) -> None:
        """Forget everything: the weights have changed."""
        for rows in self.rows.values():
            rows.clear()

    def _rows_of(self, agent: int) -> DenseRows:
        if agent not in self.rows:
            self.rows[agent] = DenseRows(self.pool)
        return self.rows[agent]

    def extend(
        self,
        sequences: Sequence[CachedSequence],
        tokens: Sequence[Sequence[int]],
        agents: Sequence[int],
        *,
        whole: bool,
    ) -> Tensor:
        """Append tokens, sorted by agent and then from many to few; [N, H] hidden states of all of them, or [B, H] of
        the last ones."""
        segments, apart = [], set(sequences)
        for agent, indices in _by_agent(agents):
            rows, mine, parts = self._rows_of(agent), sequences[indices], tokens[indices]
            lengths = [len(part) for part in parts]
            rows.keep([sequence for sequence, _ in rows.occupants if sequence not in apart])
            longest = max(sequence.length + n for sequence, n in zip(mine, lengths, strict=True))
            rows.reserve(len(rows.occupants) + len(mine), longest)
            needed = lengths if whole else [1] * len(lengths)
            segments.append(Segment(rows, rows.enter(mine), [s.length for s in mine], lengths, needed))
        hidden = self._run(segments, [token for part in tokens for token in part], agents)[0]
        for segment, (_, indices) in zip(segments, _by_agent(agents), strict=True):
            segment.rows.append(sequences[indices], segment.lengths)
        return hidden

    def _run(self, segments: Sequence[Segment], tokens: Sequence[int], agents: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Hidden states of the needed tokens [n, H], and the positions after theirs [n]."""
        attend = DenseAttend(segments)
        lengths = [length for segment in segments for length in segment.lengths]
        needed = [count for segment in segments for count in segment.needed]
        each, last = self.forward.weights.agents(agents, lengths), None
        if attend.last is not None:
            last = self.forward.weights.agents(agents, needed)
        hidden = self.forward(torch.tensor(tokens), attend.positions, each, attend, attend.last, last)
        return hidden, attend.last_positions + 1

    def decode(self, replies: Sequence[PartialReply], sampling: Sampling, until: int, steps: int) -> tuple[int, int]:
        """Draw tokens until so many replies are over; see `Engine.decode`."""
        replies = sorted(replies, key=lambda reply: reply.agent)
        for agent, indices in _by_agent([reply.agent for reply in replies]):
            rows, mine = self._rows_of(agent), replies[indices]
            rows.keep([reply.sequence for reply in mine])
            rows.reserve(len(mine), 1 + max(reply.longest for reply in mine))
            rows.enter([reply.sequence for reply in mine if reply.sequence not in rows.row_of])
            replies[indices] = sorted(mine, key=lambda reply: rows.row_of[reply.sequence])
        batch = _Batch(self, replies, sampling)
        done = worked = 0
        while done < steps and batch.num_over < until:
            done, worked = done + 1, worked + len(replies) - batch.num_over
            batch.step()
        for agent, indices in _by_agent(batch.agents):
            mine = [reply.sequence for reply in replies[indices]]
            counts = [start - sequence.length for start, sequence in zip(batch.starts[indices], mine, strict=True)]
            self.rows[agent].append(mine, counts)
        return done, worked


def _by_agent(agents: Sequence[int]) -> list[tuple[int, slice]]:
    """Runs of equal numbers."""
    found, start = [], 0
    for agent, run in groupby(agents):
        end = start + len(list(run))
        found.append((agent, slice(start, end)))
        start = end
    return found


class _Batch:
    """Replies between two looks at the pages, in the order of their rows.

    A row whose reply is over is fed its last token again, and nobody looks at what comes of it: closing the gap would
    cost more.
    """

    def __init__(self, memory: DenseMemory, replies: list[PartialReply], sampling: Sampling):
        self.memory, self.replies, self.sampling = memory, replies, sampling
        self.agents = [reply.agent for reply in replies]
        self.starts = [reply.sequence.length for reply in replies]
        """Tokens cached in each row."""
        self.due = [[r.ids[-1]] if r.ids else list(r.view[r.sequence.length :]) for r in replies]
        """Tokens that each row is fed next."""
        self.num_over = 0
        self.constrained = any(reply.constraint is not None for reply in replies)
        self.drafter = None if self.constrained else memory.drafter

    def step(self) -> None:
        """One forward pass over the tokens that are due and what may follow them."""
        guesses: list[list[int]] = [self._guess(reply) for reply in self.replies]
        if WORTH * sum(map(len, guesses)) < len(guesses):
            guesses = [[] for _ in guesses]
        fed = [[*part, *more] for part, more in zip(self.due, guesses, strict=True)]
        needed = [1 + len(more) for more in guesses]
        segments = [
            Segment(self.memory.rows[agent], 0, self.starts[rows], [len(part) for part in fed[rows]], needed[rows])
            for agent, rows in _by_agent(self.agents)
        ]
        hidden, positions = self.memory._run(segments, [token for part in fed for token in part], self.agents)
        each = [reply for reply, count in zip(self.replies, needed, strict=True) for _ in range(count)]
        logits = self.memory.forward.logits(hidden)
        token, logp = draw(
            constrain(logits, each) if self.constrained else logits,
            self.sampling.seed,
            Temperatures([reply.temperature for reply in each], logits.device),
            torch.tensor([reply.noise_id for reply in each]),
            positions,
        )
        self._take(guesses, token.tolist(), logp.tolist())

    def _guess(self, reply: PartialReply) -> list[int]:
        if reply.over or self.drafter is None:
            return []
        context = reply.ids if len(reply.ids) >= CONTEXT else [*reply.view[-CONTEXT:], *reply.ids]
        return self.drafter.guess(reply.agent, context, reply.view, reply.limit - len(reply.ids) - 1)

    def _take(self, guesses: Sequence[list[int]], drawn: list[int], logp: list[float]) -> None:
        """Give each reply what was drawn after its last token, and on as long as the guess before was right."""
        first = 0
        for row, (reply, more) in enumerate(zip(self.replies, guesses, strict=True)):
            if not reply.over:
                count = 0
                while count == 0 or (count <= len(more) and more[count - 1] == drawn[first + count - 1]):
                    reply.take(drawn[first + count], logp[first + count], self.sampling.control)
                    count += 1
                    if reply.over:
                        self.num_over += 1
                        break
                self.starts[row] += len(self.due[row]) + count - 1
                self.due[row] = [reply.ids[-1]]
            first += 1 + len(more)
