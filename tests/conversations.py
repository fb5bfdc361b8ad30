"""Conversations of random tokens and any number of turns, for tests of learning that need no words."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from coars_fast.data.records import TrainedTurn, Trajectory
from coars_fast.model.decoder import Decoder
from tests import tiny

VOCAB = 60


def conversation(
    rng: np.random.Generator, agent: int, turns: int, episode: int = 0, longest_reference: int = 9
) -> Trajectory:
    """A prompt, then replies of 1 to 7 tokens with something between them; the branch repeats a header of 2 tokens."""

    def text(low: int, high: int) -> list[int]:
        return [int(token) for token in rng.integers(0, VOCAB, rng.integers(low, high + 1))]

    tokens, trained = text(3, 20), []
    for _ in range(turns):
        fork, header = len(tokens), text(2, 2)
        tokens += header
        start = len(tokens)
        tokens += text(1, 7)
        turn = TrainedTurn(
            fork=fork, start=start, end=len(tokens), reward=float(rng.normal()), weight=float(rng.choice([1.0, 0.5])),
            reference=(*text(0, longest_reference), *header),
        )  # fmt: skip
        trained.append(turn)
        tokens += text(0, 8)
    num_sampled = sum(turn.end - turn.start for turn in trained)
    return Trajectory(
        episode=episode, agent=agent, tokens=tuple(tokens), behaviour_logp=(-1.0,) * num_sampled, turns=tuple(trained)
    )  # fmt: skip


def conversations(seed: int, episodes: int = 3, turns: tuple[int, int] = (2, 8)) -> list[Trajectory]:
    """Both agents' views of some episodes."""
    rng = np.random.default_rng(seed)
    return [
        conversation(rng, agent, int(rng.integers(turns[0], turns[1] + 1)), episode)
        for episode in range(episodes)
        for agent in (0, 1)
    ]


def as_sampled(decoder: Decoder, found: list[Trajectory]) -> list[Trajectory]:
    """With the log-probs that a decoder gives the replies, one sequence at a time."""
    ready = []
    for t in found:
        logp = tiny.sequence_logp(decoder, t.tokens, t.agent).detach()
        values = [float(logp[p - 1]) for turn in t.turns for p in range(turn.start, turn.end)]
        ready.append(replace(t, behaviour_logp=tuple(values)))
    return ready
