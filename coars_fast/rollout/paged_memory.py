"""How the engine works on a GPU: extends over pages in place, and replays of captured decoding steps.

It also runs on a CPU, slowly, which is how its logic is tested.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coars_fast.rollout.forward import Forward
from coars_fast.rollout.graphs import Replays
from coars_fast.rollout.paged import PagedAttention, PagedExtend
from coars_fast.rollout.pages import CachedSequence, PagePool
from coars_fast.rollout.sampling import PartialReply, Sampling, Temperatures, constrain, draw


class PagedMemory:
    """How an engine works with pages alone.

    Args:
        pool: the pages.
        forward: of the decoder, with shared adapters.
        attention: who computes it.
        longest: tokens that a sequence may have at most.
    """

    def __init__(self, pool: PagePool, forward: Forward, attention: PagedAttention, longest: int):
        self.pool, self.forward, self.attention = pool, forward, attention
        self.width = min(pool.pages_for(longest), pool.num_pages)
        self.clear()

    def clear(self) -> None:
        """The weights have changed: keep what was captured if they still lie where they did."""
        addresses = self.forward.weights.addresses()
        if addresses != self._addresses:
            self._addresses = addresses
            weights = self.forward.weights  # not self: in a cycle the pages would outlive their last use
            self.replays = Replays(self.pool, self.attention, lambda: Forward(weights), self.width)

    _addresses: list[int] | None = None

    def extend(
        self,
        sequences: Sequence[CachedSequence],
        tokens: Sequence[Sequence[int]],
        agents: Sequence[int],
        *,
        whole: bool,
    ) -> Tensor:
        """Append tokens; [N, H] hidden states of all of them, or [B, H] of the last ones."""
        lengths, device = [len(part) for part in tokens], self.pool.kv.device
        attend = PagedExtend(self.pool, self.attention, sequences, lengths)
        packed = torch.tensor([token for part in tokens for token in part]).to(device)
        each, weights = torch.tensor(agents).to(device), self.forward.weights
        mask = weights.masked(each.repeat_interleave(torch.tensor(lengths, device=device), output_size=len(packed)))
        last, last_mask = (None, None) if whole else (attend.last, weights.masked(each))
        hidden = self.forward(packed, attend.positions, mask, attend, last, last_mask)
        for sequence, length in zip(sequences, lengths, strict=True):
            sequence.length += length
        return hidden

    def decode(self, replies: Sequence[PartialReply], sampling: Sampling, until: int, steps: int) -> tuple[int, int]:
        """Draw tokens until so many replies are over; see `Engine.decode`."""
        fresh = [reply for reply in replies if not reply.ids]
        if fresh:
            self._begin(fresh, sampling)
        # Neighbours share pages where any do. Else in the order given: which pages are free decides nothing.
        place: dict[int, int] = {}
        for reply in replies:
            place.setdefault(reply.sequence.pages[0], len(place))
        replies = sorted((r for r in replies if not r.over), key=lambda reply: place[reply.sequence.pages[0]])
        over = sum(reply.over for reply in fresh)
        if not replies or over >= until:
            return 0, 0
        longest = max(reply.longest - reply.sequence.length - 1 for reply in replies)
        if any(reply.constraint is not None for reply in replies):
            drawn = self.replays.step_constrained(replies, sampling)
        else:
            drawn = self.replays.run(replies, sampling, until - over, min(steps, longest))
        worked = 0
        for reply, tokens, logp in zip(replies, *(part.tolist() for part in drawn), strict=True):
            before = len(reply.ids)
            for token, value in zip(tokens, logp, strict=True):
                if reply.over:
                    break
                reply.take(token, value, sampling.control)
            reply.sequence.length += len(reply.ids) - before
            worked += len(reply.ids) - before
        return drawn[0].shape[1], worked

    def _begin(self, replies: Sequence[PartialReply], sampling: Sampling) -> None:
        """Extend by what the views hold, and draw the first token of each."""
        hidden = self.extend(
            [reply.sequence for reply in replies],
            [reply.view[reply.sequence.length :] for reply in replies],
            [reply.agent for reply in replies],
            whole=False,
        )
        logits = constrain(self.forward.logits(hidden), replies)
        places = torch.tensor([(reply.noise_id, len(reply.view)) for reply in replies]).to(logits.device)
        heat = Temperatures([reply.temperature for reply in replies], logits.device)
        token, logp = draw(logits, sampling.seed, heat, places[:, 0], places[:, 1])
        for reply, drawn, value in zip(replies, token.tolist(), logp.tolist(), strict=True):
            reply.take(drawn, value, sampling.control)
