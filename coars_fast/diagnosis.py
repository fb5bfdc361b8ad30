"""What agents write in hindsight about their own replies, for the teacher to read (`game.reference` diagnosis).

The same model with the same adapter answers, greedily, once for every reply of a step; a small model will write little
of use. It is shown the truth, so what it writes goes into references alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from coars_fast.build import Parts
from coars_fast.game.episode import RECOMMENDER, USER, Episode
from coars_fast.game.prompts import one_line
from coars_fast.game.reference import diagnosis_prompts
from coars_fast.rollout.play import ask


def diagnose(parts: Parts, episodes: Sequence[Episode]) -> None:
    """Ask both agents about all their replies, one batch an agent, and note what they write in the episodes' turns;
    nothing happens under another `game.reference`.

    Args:
        parts: model and settings.
        episodes: finished ones.

    Raises:
        ConfigError: as `ask` does: a prompt does not fit the model's positions.
    """
    config, codec, control = parts.config, parts.codec, parts.template.control
    if config.game.reference != "diagnosis":
        return
    for agent in (RECOMMENDER, USER):
        asked = [question for episode in episodes for question in diagnosis_prompts(episode, agent)]
        replies = ask(
            parts.decoder,
            [prompt for _, prompt in asked],
            agent,
            control=control,
            is_valid=lambda reply: True,
            seed=0,  # greedy replies draw nothing
            temperature=0.0,
            max_reply_tokens=config.rollout.max_reply_tokens,
            batch_size=config.rollout.batch_size,
            kv_gib=config.rollout.kv_gib,
            attention=config.rollout.attention,
        )
        for (turn, _), reply in zip(asked, replies, strict=True):
            turn.diagnoses[agent] = one_line(codec.decode([token for token in reply.ids if token not in control]))
