"""Decoding over pages: one step of a batch, the state that it moves on, and CUDA graphs of several steps.

The step is a function of tensors that stay where they are and never looks at their values. On a GPU `STEPS` of them are
captured in one graph for each bucket of batch sizes and replayed; on a CPU, or for what is rare (constrained replies),
the same function runs eagerly. The host learns how many replies are over from a pinned number
that arrives while the next replay runs: no step, and no replay, waits for it. Only decoding is ever captured, once for
all runs: the seed of the noise is a tensor, too.

Shape suffixes: B rows, K steps, W columns of the page table, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from coars_fast.rollout.forward import Forward
from coars_fast.rollout.paged import PagedAttention, page_table
from coars_fast.rollout.pages import PagePool
from coars_fast.rollout.sampling import PartialReply, Sampling, Temperatures, constrain, draw
from coars_fast.rollout.weights import Agents
from coars_kernels import PrefixGroups

STEPS = 8
"""K: steps of a replay."""
SMALLEST_BUCKET = 8
"""Batches are padded to powers of two from here, and from 128 to multiples of 64."""


def bucket(rows: int) -> int:
    """The batch size that `rows` are padded to."""
    if rows > 128:
        return -(-rows // 64) * 64
    return max(SMALLEST_BUCKET, 1 << (rows - 1).bit_length())


class DecodeState:
    """What a batch of replies needs on the device, row by row, in tensors that are never replaced.

    Args:
        size: rows; those without a reply write to the scratch page.
        width: columns of the page table: no sequence may have more pages.
        pool, forward, attention: the engine's.
    """

    def __init__(self, size: int, width: int, pool: PagePool, forward: Forward, attention: PagedAttention):
        device = pool.kv.device
        self.size, self.width, self.pool, self.forward, self.attention = size, width, pool, forward, attention
        self.rows = torch.zeros(6, size, dtype=torch.int64, device=device)
        self.token, self.position, self.last_position, self.noise_id, self.agent, self.alive = self.rows
        """[B] each: the token that is fed next; where it stands; where the last one that the reply may have would
        stand; key of the noise; adapter; 1 while the reply goes on. A row that is over writes behind its reply."""
        self.table = torch.full((size, width), pool.scratch_page, dtype=torch.int32, device=device)
        self.lengths = torch.ones(size, dtype=torch.int32, device=device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.hotter = torch.zeros(size, dtype=torch.bool, device=device)
        """[B] rows with the second temperature, where there are two."""
        self.goes_on = torch.ones(forward.weights.head.shape[0], dtype=torch.int64, device=device)
        """[V] 1 for tokens that do not end a reply."""
        self.group_offsets = torch.zeros(size + 1, dtype=torch.int32, device=device)
        self.group_prefix = torch.zeros(size, dtype=torch.int32, device=device)
        self.groups: PrefixGroups | None = None
        self.agents = Agents()
        self.tokens = torch.zeros(STEPS, size, dtype=torch.int64, device=device)
        self.logp = torch.zeros(STEPS, size, dtype=torch.float32, device=device)
        """[K, B] what was drawn; nobody reads what a row draws after its end."""
        self.num_alive = torch.zeros(1, dtype=torch.int64, device=device)

    def load(self, replies: Sequence[PartialReply], sampling: Sampling) -> None:
        """Set the first rows to replies that have begun; the others are over and change nothing that counts."""
        self.seed.fill_((sampling.seed + 2**63) % 2**64 - 2**63)  # the low 64 bits, signed
        rows = [(r.ids[-1], r.sequence.length, r.longest - 1, r.noise_id, r.agent, 1) for r in replies]
        rows += [(0, 0, 0, 0, -1, 0)] * (self.size - len(rows))
        self.rows.copy_(torch.tensor(rows).T)
        self.table.copy_(page_table(self.pool, [r.sequence for r in replies], self.size, self.width))
        self.goes_on.fill_(1)
        self.goes_on[sorted(sampling.control)] = 0
        masks = self.forward.weights.masked(self.agent).masks
        if not self.agents.masks:
            self.agents = Agents(masks=[mask.clone() for mask in masks])
        for mask, new in zip(self.agents.masks, masks, strict=True):
            mask.copy_(new)
        self.groups = self._load_groups(replies)

    def _load_groups(self, replies: Sequence[PartialReply]) -> PrefixGroups | None:
        """Neighbouring rows that begin with the same pages; None where no two do."""
        offsets, prefixes, size = [0], [], self.pool.page_size
        for row, reply in enumerate(replies):
            pages = reply.sequence.pages
            if row > offsets[-1] and prefixes and pages[:1] == replies[row - 1].sequence.pages[:1]:
                before = replies[row - 1].sequence
                whole = min(before.length, reply.sequence.length) // size  # the page that is written is its own
                common = next((i for i in range(whole) if pages[i] != before.pages[i]), whole)
                prefixes[-1] = min(prefixes[-1], common * size)
            else:
                if row:
                    offsets.append(row)
                prefixes.append(reply.sequence.length // size * size)
        if len(offsets) == len(replies):
            return None
        offsets = [*offsets, len(replies)]
        prefixes = [p if b - a > 1 else 0 for p, a, b in zip(prefixes, offsets, offsets[1:], strict=False)]
        # The rows that stand for no reply are one more group that shares nothing; further groups are empty.
        offsets += [self.size] * (self.size + 1 - len(offsets))
        prefixes += [0] * (self.size - len(prefixes))
        self.group_offsets.copy_(torch.tensor(offsets, dtype=torch.int32))
        self.group_prefix.copy_(torch.tensor(prefixes, dtype=torch.int32))
        return PrefixGroups(self.group_offsets, self.group_prefix)

    def __call__(self, layer: int, q: Tensor, kv: Tensor, last: Tensor | None) -> Tensor:
        """`CachedAttend` of the step at hand."""
        self.pool.kv[layer][self.pages, :, self.offsets] = kv
        keys, values = self.pool.layer(layer)
        return self.attention.decode_groups(q, keys, values, self.table, self.lengths, self.groups).flatten(1)

    def step(self, index: int, temperatures: Temperatures, replies: Sequence[PartialReply] = ()) -> None:
        """Feed each row's token, draw the next one, and note which rows go on.

        Args:
            index: which of the K steps it is.
            temperatures: of the rows.
            replies: those of the rows, where they are constrained.
        """
        size = self.pool.page_size
        column = torch.div(self.position, size, rounding_mode="floor")[:, None]
        self.pages, self.offsets = self.table.gather(1, column)[:, 0].long(), self.position % size
        self.lengths.copy_(self.position + 1)
        hidden = self.forward(self.token, self.position, self.agents, self)
        self.position.add_(self.alive)
        logits = constrain(self.forward.logits(hidden), replies)
        token, logp = draw(logits, self.seed, temperatures, self.noise_id, self.position)
        self.token.copy_(token)
        self.tokens[index].copy_(token)
        self.logp[index].copy_(logp)
        self.alive.mul_(self.goes_on.index_select(0, token)).mul_(self.position < self.last_position)
        self.num_alive.copy_(self.alive.sum())


class _Flag:
    """How many replies went on when a replay ended: on its way to the host."""

    def __init__(self, number: Tensor):
        if number.is_cuda:
            self._host = torch.empty(1, dtype=torch.int64, pin_memory=True)
            self._host.copy_(number, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host, self._event = number.clone(), None

    def read(self) -> int:
        """Waits for this replay alone; a later one may be running."""
        if self._event is not None:
            self._event.synchronize()
        return int(self._host)


class Replays:
    """Runs blocks of K decoding steps.

    Args:
        pool, attention: the engine's.
        weights: what makes a forward pass: each bucket has its own, whose buffers never move.
        width: columns of the page table.
    """

    def __init__(self, pool: PagePool, attention: PagedAttention, make_forward: Callable[[], Forward], width: int):
        self.pool, self.attention, self.make_forward, self.width = pool, attention, make_forward, width
        self.captures = pool.kv.is_cuda
        self._states: dict[int, DecodeState] = {}
        self._graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self._graph_memory: Any = None
        self._warm_up_stream: torch.cuda.Stream | None = None

    def run(self, replies: Sequence[PartialReply], sampling: Sampling, until: int, steps: int) -> list[Tensor]:
        """Draw tokens until so many replies are over; [steps, n] tokens and log-probs."""
        state = self._state(len(replies))
        state.load(replies, sampling)
        block = self._block(state, replies, sampling)
        found: list[tuple[Tensor, Tensor]] = []
        flag: _Flag | None = None
        for _ in range(-(-steps // STEPS)):
            block()
            found.append((state.tokens.clone(), state.logp.clone()))
            before, flag = flag, _Flag(state.num_alive)
            if before is not None and len(replies) - before.read() >= until:
                break
        return [torch.cat(parts)[:, : len(replies)].T for parts in zip(*found, strict=True)]

    def step_constrained(self, replies: Sequence[PartialReply], sampling: Sampling) -> list[Tensor]:
        """One step; what is allowed next is known on the host alone."""
        state = self._state(len(replies))
        state.load(replies, sampling)
        state.step(0, self._temperatures(state, replies), replies)
        return [state.tokens[:1, : len(replies)].T, state.logp[:1, : len(replies)].T]

    def _temperatures(self, state: DecodeState, replies: Sequence[PartialReply]) -> Temperatures:
        """Of the rows. Where there are two, which rows have the second one stands in the state, as a graph needs it."""
        values = [reply.temperature for reply in replies]
        found = Temperatures(values + values[:1] * (state.size - len(values)), self.pool.kv.device)
        if len(found.others) == 1:
            ((temperature, rows),) = found.others
            state.hotter.copy_(rows)
            found.others = [(temperature, state.hotter)]
        return found

    def _state(self, rows: int) -> DecodeState:
        size = bucket(rows)
        if size not in self._states:
            forward = self.make_forward()
            forward.reserve_positions(self.width * self.pool.page_size)
            self._states[size] = DecodeState(size, self.width, self.pool, forward, self.attention)
        return self._states[size]

    def _block(self, state: DecodeState, replies: Sequence[PartialReply], sampling: Sampling) -> Callable[[], None]:
        """K steps: a replay, or the steps themselves."""
        temperatures = self._temperatures(state, replies)

        def eagerly() -> None:
            for index in range(STEPS):
                state.step(index, temperatures)

        others = tuple(temperature for temperature, _ in temperatures.others)
        if not self.captures or len(others) > 1:
            return eagerly
        key = (state.size, temperatures.first, others, state.groups is not None)
        if key not in self._graphs:
            self._graphs[key] = self._capture(state, replies, sampling, eagerly)
        return self._graphs[key].replay

    def _capture(
        self, state: DecodeState, replies: Sequence[PartialReply], sampling: Sampling, steps: Callable[[], None]
    ) -> torch.cuda.CUDAGraph:
        """Record K steps; the run that warms up has no replies, and the state is as before afterwards."""
        groups = state.groups
        state.load([], sampling)
        state.groups = groups  # as many operations as with them
        if self._warm_up_stream is None:  # one for all captures: libraries keep a workspace for each stream
            self._warm_up_stream = torch.cuda.Stream()
        stream = self._warm_up_stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            steps()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if self._graph_memory is None:
            self._graph_memory = torch.cuda.graph_pool_handle()
        # One memory for all: they are replayed one after the other, and what counts is in tensors of the states.
        with torch.cuda.graph(graph, pool=self._graph_memory):
            steps()
        state.load(replies, sampling)
        return graph
