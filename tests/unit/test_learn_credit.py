"""Forms of token credit, by hand on a few tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from coars_fast.config import Config, LossConfig
from coars_fast.config_checks import check
from coars_fast.errors import ConfigError
from coars_fast.learn.credit import TokenCredits, agent_means, credit_by_kind, credit_of, gather
from coars_fast.learn.packing import pack
from tests.conversations import conversations


def tokens(**changes: Any) -> TokenCredits:
    """Two turns of the recommender, one of the user, and one of the user that is not counted."""
    given: dict[str, Any] = {
        "gap": torch.tensor([0.5, -2.0, 0.1, 0.4, -0.3, 0.2, math.nan]),
        "logp": torch.tensor([0.9, 0.1, 0.4, 0.6, 0.2, 0.8, 0.3]).log(),
        "turn": torch.tensor([0, 0, 1, 1, 2, 2, 3]),
        "agent": torch.tensor([0, 0, 0, 0, 1, 1, 1]),
        "order": torch.tensor([0, 0, 2, 2, 1, 1, 3]),
        "counted": torch.tensor([True] * 6 + [False]),
    }
    return TokenCredits(**(given | changes))


def shaped(form: Any, given: TokenCredits | None = None, seed: int = 0, clip: float = 1.0) -> list[float]:
    return credit_of(form, given or tokens(), clip=clip, seed=seed).tolist()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_token_credit_is_equation_10_and_nothing_of_a_turn_that_is_not_counted() -> None:
    assert shaped("token") == pytest.approx([0.5, -1.0, 0.1, 0.4, -0.3, 0.2, 0.0])


def test_a_gate_keeps_endorsements_and_softens_rejections() -> None:
    expected = [0.5 * sigmoid(0.5), -sigmoid(-2.0), 0.1 * sigmoid(0.1), 0.4 * sigmoid(0.4)]
    assert shaped("gated") == pytest.approx([*expected, -0.3 * sigmoid(-0.3), 0.2 * sigmoid(0.2), 0.0])


def test_shuffled_credit_is_another_order_of_each_agents_own() -> None:
    many = 60
    given = tokens(
        gap=torch.linspace(-0.9, 0.9, many), logp=torch.zeros(many), turn=torch.arange(many),
        agent=torch.arange(many) % 2, order=torch.arange(many), counted=torch.arange(many) % 5 != 0,
    )  # fmt: skip
    plain, found = torch.tensor(shaped("token", given)), torch.tensor(shaped("shuffled", given))
    for agent in (0, 1):
        mine = (given.agent == agent) & given.counted
        assert sorted(found[mine].tolist()) == sorted(plain[mine].tolist())
        assert (found[mine] != plain[mine]).float().mean() > 0.7
    assert not found[~given.counted].any()
    assert shaped("shuffled", given) == found.tolist()
    assert shaped("shuffled", given, seed=1) != found.tolist()


def test_a_shuffle_depends_on_the_sequences_and_not_on_where_they_stand() -> None:
    given, moved = tokens(), torch.tensor([4, 5, 2, 3, 6, 0, 1])
    apart = TokenCredits(**{name: value[moved] for name, value in vars(given).items()})
    for seed in range(8):
        straight = credit_of("shuffled", given, clip=1.0, seed=seed)
        assert torch.equal(credit_of("shuffled", apart, clip=1.0, seed=seed), straight[moved])


def test_a_constant_is_as_much_credit_on_unlikely_tokens_alone() -> None:
    # The recommender's: |A| adds up to 2, tokens 1 and 2 are unlikely; the user's: .5, token 4.
    assert shaped("constant") == pytest.approx([0.0, -1.0, -1.0, 0.0, -0.5, 0.0, 0.0])
    # With less room, |A| adds up to .4 + .4 + .1 + .4.
    assert shaped("constant", clip=0.4) == pytest.approx([0.0, -0.4, -0.4, 0.0, -0.4, 0.0, 0.0])
    assert shaped("constant", tokens(logp=torch.zeros(7))) == [0.0] * 7


def test_means_are_those_of_the_agents_counted_tokens() -> None:
    given = tokens()
    assert agent_means(credit_of("token", given, clip=1.0, seed=0), given).tolist() == pytest.approx(
        [0.0, -0.05], abs=1e-7
    )


def test_tokens_of_micro_batches_know_their_turn_agent_and_sequence() -> None:
    found = conversations(3, 2)
    found[1] = replace(found[1], turns=tuple(replace(turn, weight=0.0) for turn in found[1].turns))
    batches = [pack([found[2], found[0]]), pack([found[1], found[3]])]
    sizes = [len(batch.target) for batch in batches]
    values = [torch.full((n,), -1.0) for n in sizes], [torch.full((n,), -0.5) for n in sizes]
    all_tokens = gather(batches, *values)
    packed = [(t, turn) for t in (found[2], found[0], found[1], found[3]) for turn in t.turns]
    expected = [
        (t.episode * 2 + t.agent, t.agent, turn.weight != 0, number)
        for number, (t, turn) in enumerate(packed)
        for _ in range(turn.end - turn.start)
    ]
    columns = (all_tokens.order, all_tokens.agent, all_tokens.counted, all_tokens.turn)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    assert all_tokens.gap.tolist() == [0.5] * sum(sizes)


def test_a_form_without_credit_is_refused() -> None:
    check(Config(loss=LossConfig(credit_form="gated", teacher="ema")))
    with pytest.raises(ConfigError, match="^loss.credit_form: shuffled does nothing at loss.credit_weight 0"):
        check(Config(loss=LossConfig(credit_form="shuffled", credit_weight=0.0)))


def test_credit_before_and_after_the_decision_is_told_apart() -> None:
    found = conversations(5, 2, (3, 3))
    found = [
        replace(t, turns=tuple(replace(u, reason=min(n, u.end - u.start), weight=n % 2) for n, u in enumerate(t.turns)))
        for t in found
    ]
    batch = pack(found)
    logp = torch.full((len(batch.target),), -1.0)
    teacher = logp + torch.linspace(-2, 2, len(logp))
    metrics = credit_by_kind(batch, logp, teacher, 0.5)
    expected: dict[str, list[float]] = {}
    row = 0
    for t in found:
        for turn in t.turns:
            for n in range(turn.end - turn.start):
                assert turn.reason is not None
                name = f"credit_{'reason' if n < turn.reason else 'decision'}_{('rec', 'user')[t.agent]}"
                if turn.weight:
                    expected.setdefault(name, []).append(max(-0.5, min(0.5, float(teacher[row] - logp[row]))))
                row += 1
    assert {name for name in metrics if not name.startswith("num_")} == set(expected)
    for name, values in expected.items():
        assert metrics[f"num_{name}"] == len(values)
        assert float(metrics[name]) == pytest.approx(sum(values) / len(values), abs=1e-6)
    assert credit_by_kind(batch, logp, None, 0.5) == {}
