"""The rollout engine: extend, decode and score sequences of both agents over one decoder and one K/V memory.

    engine = Engine(decoder, num_pages=400)
    sequence = engine.pool.new()
    hidden = engine.extend([sequence], [tokens], [agent])          # of each sequence's last token
    engine.decode([PartialReply(sequence, view, agent, ...)], sampling)
    logp = engine.score([sequence], [context], [tokens], [agent])  # on forks: the sequences stay as they are

A sequence's cached tokens were computed by the weights that the decoder has now, or it cannot be used: every call first
compares the weights with those of the last call, and drops all pages where they differ. The last sampled token of a
reply has no keys and values yet: it leads what is fed next. Left out: choosing who works when (`scheduler.py`).

Shape suffixes: N packed tokens, B sequences, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from coars_fast.errors import ConfigError, PagesError
from coars_fast.model.decoder import Decoder
from coars_fast.rollout.dense_memory import DenseMemory
from coars_fast.rollout.drafts import CONTEXT, Drafter
from coars_fast.rollout.forward import Forward
from coars_fast.rollout.paged import PagedAttention, choose_paged_attention
from coars_fast.rollout.paged_memory import PagedMemory
from coars_fast.rollout.pages import CachedSequence, PagePool
from coars_fast.rollout.sampling import PartialReply, Sampling
from coars_fast.rollout.weights import Weights
from coars_kernels import linear_logprob

STEPS = 32
"""Decoding steps after which a call returns at the latest."""
EXTEND_TOKENS = 8192
"""New tokens in one forward pass; more are split."""
PAGE_SIZE = {"cpu": 16, "cuda": 256}
"""Tokens a page: flash-attn wants multiples of 256."""


class Memory(Protocol):
    """How keys and values are stored and attended to; see `DenseMemory` and `PagedMemory`."""

    def clear(self) -> None: ...

    def extend(
        self,
        sequences: Sequence[CachedSequence],
        tokens: Sequence[Sequence[int]],
        agents: Sequence[int],
        *,
        whole: bool,
    ) -> Tensor: ...

    def decode(
        self, replies: Sequence[PartialReply], sampling: Sampling, until: int, steps: int
    ) -> tuple[int, int]: ...


class Engine:
    """Plays with one decoder.

    Args:
        decoder: with its adapters; where attention is over pages, its parameters become views of fused matrices.
        num_pages: pages of K/V memory.
        page_size: tokens a page; None takes what suits the device.
        attention: `dense` (CPU, float32: dense rows beside the pages), a backend over pages (`paged.py`), or `auto`.
        guess: where attention is dense, check guesses of several tokens in one pass.

    Raises:
        ConfigError: a memory without pages, or an attention that cannot be had here.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_pages: int,
        page_size: int | None = None,
        attention: str = "auto",
        guess: bool = True,
    ):
        shape, weight = decoder.config, decoder.head_weight
        self.decoder, self.device = decoder, weight.device
        page_size = page_size or PAGE_SIZE.get(self.device.type, 16)
        if num_pages < 1 or page_size < 1:
            raise ConfigError(f"num_pages, page_size: {num_pages} pages of {page_size} tokens hold nothing")
        fits = self.device.type == "cpu" and weight.dtype == torch.float32
        if attention == "dense" and not fits:
            raise ConfigError(
                f"rollout.attention: 'dense' is for float32 on a CPU, not {weight.dtype} on {self.device}; use auto"
            )
        dense = attention == "dense" or (attention == "auto" and fits)
        backend = "dense"
        if not dense:
            backend, _ = choose_paged_attention(self.device, weight.dtype, shape.head_dim, page_size, attention)
        self.pool = PagePool(
            num_pages=num_pages,
            page_size=page_size,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=weight.dtype,
            device=self.device,
        )
        self.weights = Weights(decoder, merge=dense)
        self.forward = Forward(self.weights)
        self.drafter = Drafter() if dense and guess else None
        self.memory: Memory
        if dense:
            self.memory = DenseMemory(self.pool, self.forward, self.drafter)
        else:
            self.memory = PagedMemory(self.pool, self.forward, PagedAttention(backend), shape.max_position_embeddings)

    # ------------------------------------------------------------------------------------------------------- the calls

    def refresh(self, *, thorough: bool = True) -> None:
        """Drop every sequence if the decoder's weights are no longer those that cached them.

        Args:
            thorough: also look for adapters that were written through `.data`, past torch's counters.
        """
        if self.weights.refresh(thorough=thorough):
            self.pool.drop_all()
            self.memory.clear()

    @torch.no_grad()
    def extend(
        self, sequences: Sequence[CachedSequence], tokens: Sequence[Sequence[int]], agents: Sequence[int]
    ) -> Tensor:
        """Append tokens to sequences of any agents.

        Args:
            sequences: each at most once; pages beyond the reserved ones are taken.
            tokens: at least one for each.
            agents: adapter of each; -1 for none.

        Returns:
            [B, H] last hidden state (after the final norm) of each sequence's last token.

        Raises:
            ConfigError: an empty or too long sequence, a token or an adapter that the decoder does not have.
            StaleCacheError: a sequence was released, or cached by other weights.
            PagesError: too few pages. In all of these cases nothing was done.
        """
        self.refresh()
        self._check(sequences, tokens, agents)
        self._grow(sequences, [len(part) for part in tokens])
        return self._extend(sequences, tokens, agents)

    @torch.no_grad()
    def decode(
        self, replies: Sequence[PartialReply], sampling: Sampling, *, until: int | None = None, steps: int = STEPS
    ) -> tuple[int, int]:
        """Draw tokens of replies, all at the same time; those without one are extended by what their views hold.

        Args:
            replies: none of them over.
            sampling: the same for all tokens of a reply.
            until: return when so many are over; None waits for all.
            steps: return after so many in any case.

        Returns:
            Steps taken, and the sum over steps of the replies that were at work.

        Raises:
            ConfigError, StaleCacheError: as `extend`.
            PagesError: too few pages for all replies to reach their limits.
        """
        self.refresh(thorough=False)
        for reply in replies:
            self.pool.require(reply.sequence)
        fresh = [reply for reply in replies if not reply.ids]
        contexts = [reply.view[reply.sequence.length :] for reply in fresh]
        if fresh:
            self._check([r.sequence for r in fresh], contexts, [r.agent for r in fresh], [r.limit for r in fresh])
        self._grow([r.sequence for r in replies], [r.longest - r.sequence.length for r in replies])
        self.forward.reserve_positions(1 + max(r.longest for r in replies))
        if sum(map(len, contexts)) > EXTEND_TOKENS:  # all but the last token, in several passes
            long = [(r, context[:-1]) for r, context in zip(fresh, contexts, strict=True) if len(context) > 1]
            self._extend([r.sequence for r, _ in long], [part for _, part in long], [r.agent for r, _ in long])
        work = self.memory.decode(replies, sampling, until or len(replies), steps)
        if self.drafter is not None:
            for reply in replies:
                if reply.over:
                    self.drafter.learn(reply.agent, [*reply.view[-CONTEXT:], *reply.ids], CONTEXT)
        return work

    @torch.no_grad()
    def score(
        self,
        sequences: Sequence[CachedSequence],
        contexts: Sequence[Sequence[int]],
        tokens: Sequence[Sequence[int]],
        agents: Sequence[int],
        *,
        lengths: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Log-probs of given tokens after a sequence and a context, on forks that are dropped again.

        Args:
            sequences: what is cached already; they stay as they are, and one may be scored several times.
            contexts: tokens between the sequence and the scored ones, at least one for each.
            tokens: what is scored, at least one for each.
            agents: as for `extend`.
            lengths: how many tokens of each sequence are read; None: all that are cached.

        Returns:
            For each sequence [n] fp32.
        """
        self.refresh()
        for sequence in sequences:
            self.pool.require(sequence)
        if any(len(part) == 0 for part in (*contexts, *tokens)):
            raise ConfigError("contexts, tokens: what is scored needs a token before it and one of its own")
        added = [[*context, *part[:-1]] for context, part in zip(contexts, tokens, strict=True)]
        whole = [[*a, t[-1]] for a, t in zip(added, tokens, strict=True)]
        self._check(sequences, whole, agents, lengths=lengths, distinct=False)
        found: list[Tensor] = [torch.empty(0)] * len(sequences)
        order = sorted(range(len(sequences)), key=lambda i: (agents[i], -len(added[i])))
        for chunk in _chunks(order, added):
            forks: dict[int, CachedSequence] = {}
            try:
                for i in chunk:
                    forks[i] = self.pool.fork(sequences[i], None if lengths is None else lengths[i])
                hidden = self._append(chunk, forks, added, agents, whole=True)
            finally:
                for fork in forks.values():
                    self.pool.release(fork)
            rows, targets, start = [], [], 0
            for i in chunk:
                rows += range(start + len(contexts[i]) - 1, start + len(added[i]))
                targets += tokens[i]
                start += len(added[i])
            logp = linear_logprob(
                hidden[torch.tensor(rows, device=self.device)],
                self.decoder.head_weight,
                torch.tensor(targets, device=self.device),
            )
            assert isinstance(logp, Tensor)
            for i, part in zip(chunk, logp.split([len(tokens[i]) for i in chunk]), strict=True):
                found[i] = part
        return found

    # ------------------------------------------------------------------------------------------------------- the parts

    def _extend(
        self, sequences: Sequence[CachedSequence], tokens: Sequence[Sequence[int]], agents: Sequence[int]
    ) -> Tensor:
        """`extend` of what was checked."""
        order = sorted(range(len(sequences)), key=lambda i: (agents[i], -len(tokens[i])))
        parts = [self._append(chunk, sequences, tokens, agents, whole=False) for chunk in _chunks(order, tokens)]
        hidden = torch.cat(parts)
        return torch.empty_like(hidden).index_copy_(0, torch.tensor(order, device=self.device), hidden)

    def _append(
        self,
        chunk: Sequence[int],
        sequences: Sequence[CachedSequence] | dict[int, CachedSequence],
        tokens: Sequence[Sequence[int]],
        agents: Sequence[int],
        *,
        whole: bool,
    ) -> Tensor:
        """One forward pass over the sequences of a chunk: hidden states of all their new tokens, or of the last."""
        chosen, parts = [sequences[i] for i in chunk], [tokens[i] for i in chunk]
        lengths = [len(part) for part in parts]
        self._grow(chosen, lengths)
        self.forward.reserve_positions(max(s.length + n for s, n in zip(chosen, lengths, strict=True)))
        return self.memory.extend(chosen, parts, [agents[i] for i in chunk], whole=whole)

    def _grow(self, sequences: Sequence[CachedSequence], more: Sequence[int]) -> None:
        """Reserve pages for so many more tokens of each, or none at all."""
        pool = self.pool
        lengths = [s.length + n for s, n in zip(sequences, more, strict=True)]
        needed = sum(map(pool.pages_to_grow, sequences, lengths))
        if needed > pool.num_free:
            raise PagesError(
                f"{needed} more pages of {pool.page_size} tokens are needed, but {pool.num_free} of {pool.num_pages} "
                "are free: release sequences, or raise rollout.kv_gib"
            )
        for sequence, length in zip(sequences, lengths, strict=True):
            pool.grow(sequence, length)

    def _check(
        self,
        sequences: Sequence[CachedSequence],
        tokens: Sequence[Sequence[int]],
        agents: Sequence[int],
        further: Sequence[int] = (),
        *,
        lengths: Sequence[int] | None = None,
        distinct: bool = True,
    ) -> None:
        """Refuse what cannot be computed, before any work; `further` tokens of each will follow. `lengths`: where the
        tokens stand, if not at the sequences' ends."""
        shape = self.decoder.config
        if not len(sequences) == len(tokens) == len(agents) or not sequences:
            raise ConfigError(
                f"sequences, tokens, agents: {len(sequences)}, {len(tokens)} and {len(agents)}; give one of each, at "
                "least once"
            )
        if distinct and len(set(map(id, sequences))) < len(sequences):
            raise ConfigError("sequences: one is given twice")
        for i, (sequence, part) in enumerate(zip(sequences, tokens, strict=True)):
            self.pool.require(sequence)
            if not len(part):
                raise ConfigError("tokens: a sequence is to be extended by nothing; give at least one token")
            start = sequence.length if lengths is None else lengths[i]
            if not 0 <= start <= sequence.length:
                raise ConfigError(f"lengths: {start} tokens of a sequence are asked for that has {sequence.length}")
            length, limit = start + len(part) + sum(further[i : i + 1]), shape.max_position_embeddings
            if length > limit:
                raise ConfigError(f"tokens: a sequence of {length} does not fit the model's {limit} positions")
            low, high = min(part), max(part)
            if low < 0 or high >= shape.vocab_size:
                wrong = low if low < 0 else high
                raise ConfigError(f"tokens: {wrong} is none of the decoder's tokens, 0 to {shape.vocab_size - 1}")
        for agent in set(agents):
            if not -1 <= agent < self.weights.num_adapters:
                raise ConfigError(
                    f"agents: {agent} has no adapter, the decoder has {self.weights.num_adapters}; add_adapters makes "
                    "them, and -1 is the base alone"
                )


def _chunks(order: Sequence[int], tokens: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Cut `order` into parts of about `EXTEND_TOKENS` tokens."""
    chunk, size = [], 0
    for i in order:
        if chunk and size + len(tokens[i]) > EXTEND_TOKENS:
            yield chunk
            chunk, size = [], 0
        chunk.append(i)
        size += len(tokens[i])
    yield chunk
