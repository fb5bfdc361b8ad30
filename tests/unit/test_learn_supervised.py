"""Supervised fine-tuning: what it scores, whom it trains, and that it stops before a weight is spoilt."""

from __future__ import annotations

import pytest
import torch

from coars_fast.data.records import Lesson
from coars_fast.errors import NonFiniteError
from coars_fast.learn.supervised import cosine, fine_tune, lesson_logp
from coars_fast.model.lora import adapter_state
from tests import tiny


def lesson(length: int, first: int, answers: range) -> Lesson:
    return Lesson(tokens=[first + n for n in range(length)], is_answer=[n in answers for n in range(length)])


LESSONS = [lesson(9, 20, range(5, 9)), lesson(5, 50, range(1, 2)), lesson(12, 70, range(6, 8))]


@torch.no_grad()
def test_a_lessons_log_probs_are_those_of_its_answers() -> None:
    decoder = tiny.random_decoder()
    for agents in (None, [0, 1, 1]):
        found = lesson_logp(decoder, LESSONS, agents)
        expected = []
        for n, taught in enumerate(LESSONS):
            logp = tiny.sequence_logp(decoder, taught.tokens, None if agents is None else agents[n])
            expected.append(logp[torch.tensor(taught.is_answer[1:])])
        torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=0)


def test_fine_tuning_learns_its_lessons() -> None:
    decoder = tiny.random_decoder(adapters=False)
    losses: list[float] = []
    fine_tune(
        decoder, [(LESSONS, None)] * 60, num_steps=60, learning_rate=2e-2, schedule=cosine(),
        progress=lambda step, loss: losses.append(loss),
    )  # fmt: skip
    assert len(losses) == 60 and losses[-1] < 0.3 * losses[0]


def test_only_what_requires_a_gradient_is_trained() -> None:
    decoder = tiny.random_decoder()
    base = {n: p.detach().clone() for n, p in decoder.named_parameters() if ".lora_" not in n}
    before = [adapter_state(decoder, agent) for agent in (0, 1)]
    fine_tune(
        decoder, [(LESSONS, [0, 0, 0])] * 2, num_steps=2, learning_rate=1e-2, schedule=cosine(),
        progress=lambda *_: None,
    )  # fmt: skip
    assert all(torch.equal(p, base[n]) for n, p in decoder.named_parameters() if n in base)
    moved = [any(not torch.equal(adapter_state(decoder, a)[k], before[a][k]) for k in before[a]) for a in (0, 1)]
    assert moved[0]


def test_a_loss_that_is_not_finite_stops_before_the_step() -> None:
    decoder = tiny.random_decoder(adapters=False)
    with torch.no_grad():
        decoder.head_weight[3] = float("nan")
    before = {n: p.detach().clone() for n, p in decoder.named_parameters()}
    with pytest.raises(NonFiniteError, match="supervised step 0"):
        fine_tune(
            decoder, [(LESSONS, None)], num_steps=1, learning_rate=1.0, schedule=cosine(), progress=lambda *_: None
        )
    assert all(torch.equal(p.nan_to_num(7), before[n].nan_to_num(7)) for n, p in decoder.named_parameters())


def test_fewer_batches_than_steps_end_the_training() -> None:
    steps: list[int] = []
    fine_tune(
        tiny.random_decoder(adapters=False), [(LESSONS, None)] * 2, num_steps=5, learning_rate=1e-3, schedule=cosine(),
        progress=lambda step, _: steps.append(step),
    )  # fmt: skip
    assert steps == [0, 1]


def test_a_cosine_holds_and_falls() -> None:
    share = cosine(hold=0.5, final=0.1)
    assert [share(0.0), share(0.5), share(0.75), share(1.0)] == pytest.approx([1.0, 1.0, 0.55, 0.1])
