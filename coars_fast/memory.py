"""Fresh episodes whose agents have been told of earlier sessions with the same user (`game.memory`).

The sessions are played here, by the model as it is now: the first without memory, each later one with that of those
before it. Nothing is trained on them, and no figure counts them.
"""

from __future__ import annotations

from collections.abc import Sequence

from coars_fast.build import Parts
from coars_fast.data.records import Task
from coars_fast.game.episode import Episode
from coars_fast.game.memory import session_text
from coars_fast.rollout.play import play

NOISE_APART = 2**40
"""Between the seeds of sessions, and of sessions and episodes."""


def fresh_episodes(
    parts: Parts,
    tasks: Sequence[Task],
    *,
    seed: int,
    temperature: float,
    resample_invalid: bool = False,
) -> list[Episode]:
    """An episode for each task, ready to be played; without `game.memory` nothing else happens.

    Args:
        parts: model, data and templates.
        tasks: what the episodes are about.
        seed: of the sessions' sampling noise: that with which the episodes will be played.
        temperature, resample_invalid: how the sessions are played: as the episodes will be.

    Raises:
        ConfigError: as `play` does.
    """
    config, rollout = parts.config, parts.config.rollout
    memories = [""] * len(tasks)
    count = config.game.memory
    earlier = [parts.tasks.earlier_tasks(task, count) if count else [] for task in tasks]
    for number in range(max(map(len, earlier), default=0)):
        told = [i for i, sessions in enumerate(earlier) if number < len(sessions)]
        episodes = [parts.episode(earlier[i][number], memories[i]) for i in told]
        play(
            parts.decoder,
            episodes,
            seed=seed + (1 + number) * NOISE_APART,
            temperature=temperature,
            max_reply_tokens=rollout.max_reply_tokens,
            batch_size=rollout.batch_size,
            resample_invalid=resample_invalid,
            constrained=rollout.constrained,
            kv_gib=rollout.kv_gib,
            attention=rollout.attention,
        )
        for i, episode in zip(told, episodes, strict=True):
            memories[i] += session_text(episode)
    return [parts.episode(task, memory) for task, memory in zip(tasks, memories, strict=True)]
