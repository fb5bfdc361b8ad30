"""Play episodes in lockstep: all recommenders that are due, then all users, until every conversation is over.

The K/V of both views stays cached across turns; each turn prefills only what is new to the agent. Log-probs are
recorded when a token is sampled. A token depends on the seed, its episode's id and its position, never on the batch:
noise is counter-based (`coars_kernels.sample_with_logprob`). Left out: continuous batching, paging, graphs (the
engine's).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coars_fast.errors import ConfigError
from coars_fast.game.episode import Episode, Reply
from coars_fast.model.decoder import Decoder
from coars_fast.rollout.cache import CachedAttention, KVCache
from coars_kernels import sample_with_logprob

Progress = Callable[[int, int], None]


class Sampler:
    """Extends cached sequences and samples replies from them.

    Args:
        decoder: model with both adapters.
        num_sequences: rows of the cache.
        control: tokens that end a reply.
        max_reply_tokens: bound of a reply.
        seed: of the sampling noise.
    """

    def __init__(
        self, decoder: Decoder, *, num_sequences: int, control: frozenset[int], max_reply_tokens: int, seed: int
    ):
        weight, shape = decoder.head_weight, decoder.config
        self.decoder, self.seed, self.max_reply_tokens = decoder, seed, max_reply_tokens
        self.device = weight.device
        self.control = torch.zeros(weight.shape[0], dtype=torch.bool)
        self.control[sorted(control)] = True
        self.cache = KVCache(
            num_sequences=num_sequences,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=weight.dtype,
            device=self.device,
        )

    def _next_logits(self, rows: Sequence[int], tokens: Tensor, lengths: Sequence[int], agents: Tensor) -> Tensor:
        """Append packed tokens [N] to rows; [B, V] fp32 logits after each row's last one."""
        attend = CachedAttention(self.cache, rows, lengths)
        agent_ids = agents[attend.token_batch]
        hidden = self.decoder(tokens.to(self.device), attend.position_ids, attend, agent_ids)
        attend.commit()
        return hidden[attend.last].float() @ self.decoder.head_weight.T.float()

    @torch.no_grad()
    def reply(
        self,
        rows: Sequence[int],
        views: Sequence[Sequence[int]],
        agents: Sequence[int],
        ids: Sequence[int],
        temperature: float,
    ) -> list[Reply]:
        """Sample one reply for each sequence.

        Args:
            rows: cache rows; what a row has cached is a prefix of its view.
            views: all tokens that the agent has seen, its open header last.
            agents: adapter of each.
            ids: keys of the sampling noise.
            temperature: 0 is greedy.
        """
        limit = self.decoder.config.max_position_embeddings
        longest = max(len(view) for view in views) + self.max_reply_tokens
        if longest > limit:
            raise ConfigError(
                f"a conversation of {longest} tokens does not fit the model's {limit} positions: lower "
                f"data.history_length, the number of candidates, game.max_turns or rollout.max_reply_tokens"
            )
        self.cache.reserve(longest)
        count = len(rows)
        new = [view[self.cache.lengths[row] :] for row, view in zip(rows, views, strict=True)]
        agents_B = torch.tensor(agents, dtype=torch.int8, device=self.device)
        ids_B = torch.tensor(ids, device=self.device)
        position_B = torch.tensor([len(view) for view in views], device=self.device)
        tokens = torch.tensor([token for part in new for token in part])
        logits = self._next_logits(rows, tokens, [len(part) for part in new], agents_B)
        sampled: list[list[int]] = [[] for _ in range(count)]
        logps: list[list[float]] = [[] for _ in range(count)]
        alive = list(range(count))
        for drawn in range(self.max_reply_tokens):
            token_B, logp_B = sample_with_logprob(
                logits, seed=self.seed, sequence_id=ids_B, position=position_B + drawn, temperature=temperature
            )
            token_B, logp_B = token_B.cpu(), logp_B.cpu()
            ended = self.control[token_B].tolist()
            for b, token, logp in zip(alive, token_B.tolist(), logp_B.tolist(), strict=True):
                sampled[b].append(token)
                logps[b].append(logp)
            keep = [i for i, over in enumerate(ended) if not over]
            if not keep or drawn == self.max_reply_tokens - 1:
                break
            if len(keep) < len(alive):
                index = torch.tensor(keep, device=self.device)
                alive = [alive[i] for i in keep]
                agents_B, ids_B, position_B = agents_B[index], ids_B[index], position_B[index]
                token_B = token_B[torch.tensor(keep)]
            logits = self._next_logits([rows[b] for b in alive], token_B, [1] * len(alive), agents_B)
        return [Reply(tuple(s), tuple(p)) for s, p in zip(sampled, logps, strict=True)]


def play(
    decoder: Decoder,
    episodes: Sequence[Episode],
    *,
    seed: int,
    temperature: float,
    max_reply_tokens: int,
    batch_size: int,
    resample_invalid: bool = False,
    progress: Progress | None = None,
) -> None:
    """Play episodes to their end; they hold the outcome.

    Args:
        decoder: model with both adapters.
        episodes: fresh ones; episode i of this list draws its noise from (seed, i, position).
        seed: of the sampling noise.
        temperature: 1 in training; 0 is greedy.
        max_reply_tokens: longer replies are cut and invalid.
        batch_size: episodes at the same time.
        resample_invalid: draw an invalid reply once more (at temperature 1), as an evaluation does.
        progress: called with (episodes done, episodes).
    """
    for first in range(0, len(episodes), batch_size):
        batch = episodes[first : first + batch_size]
        control = batch[0].template.control
        sampler = Sampler(
            decoder,
            num_sequences=2 * len(batch),
            control=control,
            max_reply_tokens=max_reply_tokens,
            seed=seed,
        )
        agent = 0
        while any(episode.waiting is not None for episode in batch):
            due = [i for i, episode in enumerate(batch) if episode.waiting == agent]
            if due:
                _take_turn(sampler, batch, due, agent, first, temperature, resample_invalid)
            agent = 1 - agent
            if progress:
                progress(first + sum(episode.waiting is None for episode in batch), len(episodes))


def _take_turn(
    sampler: Sampler,
    batch: Sequence[Episode],
    due: Sequence[int],
    agent: int,
    first: int,
    temperature: float,
    resample_invalid: bool,
) -> None:
    """Let `agent` speak in the episodes that are due."""

    def sample(chosen: Sequence[int], heat: float, attempt: int) -> list[Reply]:
        rows = [agent * len(batch) + i for i in chosen]
        views = [batch[i].views[agent].tokens for i in chosen]
        ids = [((first + i) * 2 + agent) * 2 + attempt for i in chosen]
        return sampler.reply(rows, views, [agent] * len(rows), ids, heat)

    replies = dict(zip(due, sample(due, temperature, 0), strict=True))
    if resample_invalid:
        again = [i for i in due if not batch[i].is_valid(replies[i])]
        if again:
            for i in again:  # back to the last token of the context: the next logits come from it
                row = agent * len(batch) + i
                sampler.cache.lengths[row] = len(batch[i].views[agent].tokens) - 1
            replies |= dict(zip(again, sample(again, 1.0, 1), strict=True))
    for i in due:
        batch[i].receive(replies[i])
