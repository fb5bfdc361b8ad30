"""Finished episodes -> what learning needs of them: tokens, rewards, weights and the teacher's references."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from coars_fast.config import GameConfig
from coars_fast.data.records import TrainedTurn, Trajectory
from coars_fast.game.episode import AGENTS, RECOMMENDER, USER, Episode
from coars_fast.game.prompts import decision_start
from coars_fast.game.reference import branch, reference_text
from coars_fast.game.template import TextCodec


def balance(hits: Sequence[bool]) -> list[float]:
    """Weights under which hits and misses count equally and the mean weight is 1; all 1 where one kind is missing."""
    num_hits = sum(hits)
    num_misses = len(hits) - num_hits
    if not num_hits or not num_misses:
        return [1.0] * len(hits)
    return [len(hits) / (2 * (num_hits if hit else num_misses)) for hit in hits]


def reason_length(codec: TextCodec, ids: Sequence[int], agent: int) -> int:
    """How many tokens of a reply come before its decision: the last `Item:` line (recommender) or `Action:` line (user
    agent), with all that follows. All of them where there is no such line; a token that holds the line's beginning is
    part of it."""
    start = decision_start(codec.decode(ids), "Item" if agent == RECOMMENDER else "Action")
    return bisect_right(range(len(ids)), start, key=lambda n: len(codec.decode(ids[: n + 1])))


def trajectories(episodes: Sequence[Episode], game: GameConfig) -> list[Trajectory]:
    """Both views of every episode, with a reward, a weight and a reference for each reply.

    Excluded turns have weight 0: they stay in the sequence and are not learned from. The user agent's other turns
    are balanced between hits and misses where the game says so (our choice; DESIGN section 1 says why).
    """
    judged = [turn for episode in episodes for turn in episode.turns if turn.reward and turn.reward.user is not None]
    balanced = balance([turn.hit for turn in judged]) if game.balance_user_turns else [1.0] * len(judged)
    user_weight = {id(turn): weight for turn, weight in zip(judged, balanced, strict=True)}
    found = []
    for number, episode in enumerate(episodes):
        for agent in (RECOMMENDER, USER):
            view = episode.views[agent]
            turns = [turn for turn in episode.turns if agent == RECOMMENDER or turn.user_spoke]
            trained = []
            for turn, span in zip(turns, view.spans, strict=True):
                assert turn.reward is not None, "the episode is not over"
                reward = getattr(turn.reward, AGENTS[agent])
                text = reference_text(episodes, number, turn, agent, game.reference)
                weight = 1.0 if agent == RECOMMENDER else user_weight.get(id(turn), 0.0)
                trained.append(
                    TrainedTurn(
                        fork=span.fork,
                        start=span.start,
                        end=span.end,
                        reward=reward or 0.0,
                        weight=0.0 if reward is None else weight,
                        reference=tuple(branch(episode, turn, agent, text)),
                        reason=reason_length(episode.codec, view.tokens[span.start : span.end], agent),
                    )
                )
            if trained:
                found.append(
                    Trajectory(
                        episode=number,
                        agent=agent,
                        tokens=tuple(view.tokens),
                        behaviour_logp=tuple(view.logp),
                        turns=tuple(trained),
                    )
                )
    return found
