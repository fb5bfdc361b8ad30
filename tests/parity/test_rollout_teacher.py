"""The teacher's log-probs from the rollout engine are those of the training step at the weights that spoke."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from coars_fast.config import Config, LossConfig, TrainConfig
from coars_fast.data.records import Trajectory
from coars_fast.game.trajectory import trajectories
from coars_fast.learn.packing import pack
from coars_fast.learn.step import Learner
from coars_fast.learn.two_stream import two_stream
from coars_fast.model.decoder import Decoder
from coars_fast.rollout.engine import Engine
from coars_fast.rollout.play import play
from coars_fast.rollout.statistics import Statistics
from coars_fast.rollout.teacher import TeacherScores
from coars_kernels import linear_logprob
from tests import tiny
from tests.rollout_pieces import MEMORIES

BOUND = 1e-5


def scored(decoder: Decoder, count: int = 24, **options):
    """Trajectories of a rollout with the teacher's log-probs, and what was counted."""
    episodes = [tiny.new_episode(n) for n in range(count)]
    scores = TeacherScores(tiny.GAME)
    options = {"seed": 4, "temperature": 1.0, "max_reply_tokens": 24, "batch_size": 8} | options
    figures = play(decoder, episodes, branches=scores, **options)
    return scores.add_to(trajectories(episodes, tiny.GAME)), figures


@torch.no_grad()
def matches(decoder: Decoder, found: Sequence[Trajectory]) -> None:
    """The engine's log-probs and the two-stream step's are both within the bound of float64, and so near each other."""
    batch = pack([replace(t, teacher_logp=None) for t in found])
    _, teacher = two_stream(decoder, batch)
    wide = copy.deepcopy(decoder).double()
    _, exact_teacher = two_stream(wide, batch, backend="sdpa")
    assert teacher is not None and exact_teacher is not None
    exact = (exact_teacher @ wide.head_weight.T).log_softmax(-1).gather(1, batch.target[:, None])[:, 0]
    logp = linear_logprob(teacher, decoder.head_weight, batch.target)
    assert isinstance(logp, torch.Tensor)
    engine = torch.tensor([p for t in found for p in t.teacher_logp or ()])
    assert engine.shape == exact.shape
    for values in (engine, logp):
        assert (values - exact).abs().max() < BOUND


@pytest.mark.parametrize("attention", MEMORIES)
def test_log_probs_are_those_of_the_two_stream_step(attention: str) -> None:
    decoder = tiny.taught_decoder()
    found, figures = scored(decoder, attention=attention)
    assert len({t.agent for t in found}) == 2 and max(len(t.turns) for t in found) > 1
    matches(decoder, found)
    assert figures.scored_tokens == sum(t.num_teacher_tokens for t in found)  # reference and reply, nothing else
    assert figures.repeated_tokens == 0


def test_they_are_the_same_where_views_lose_their_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory so small that views are released before they are scored."""
    decoder = tiny.taught_decoder()
    page_bytes = 2 * 2 * decoder.config.num_kv_heads * decoder.config.head_dim * 16 * 4
    longest = max(max(tiny.new_episode(n).longest_views(24)) for n in range(24))
    pages = longest // 16 + 12
    found, figures = scored(decoder, kv_gib=(pages + 0.5) * page_bytes / 2**30)
    assert figures.num_pages == pages and figures.repeated_tokens > 0
    matches(decoder, found)


def test_nothing_stays_in_the_memory() -> None:
    decoder = tiny.taught_decoder()
    scored(decoder)
    engines: dict[str, Engine] = vars(decoder)["_rollout_engines"]
    for engine in engines.values():
        engine.pool.check()
        assert engine.pool.num_used == 0


@pytest.mark.parametrize("max_tokens", [65536, 700])
def test_a_step_with_them_is_the_step_that_computes_its_own_teacher(max_tokens: int) -> None:
    """Gradients of both adapters, in one batch and in micro-batches."""
    gradients = []
    for known in (True, False):
        decoder = tiny.taught_decoder()
        found, _ = scored(decoder, 12)
        config = Config(loss=LossConfig(credit_weight=0.5), train=TrainConfig(max_tokens=max_tokens, warmup_steps=0))
        learner = Learner(decoder, config)
        learner.update(found if known else [replace(t, teacher_logp=None) for t in found], 0)
        gradients.append(torch.cat([p.grad.flatten() for p in learner.named_parameters().values()]))  # pyright: ignore
    assert gradients[1].norm() > 0
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


def test_statistics_name_them() -> None:
    assert Statistics(1, 1, 1, scored_tokens=3).metrics()["rollout_scored_tokens"] == 3.0
