"""What a learner does with gradients: who is trained, how fast, in how many updates, and what stops it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from coars_fast.config import Config
from coars_fast.data.records import Trajectory
from coars_fast.errors import ConfigError, NonFiniteError
from coars_fast.learn.step import Learner
from coars_fast.model.decoder import Decoder
from coars_fast.model.lora import adapter_state
from coars_fast.rollout.play import play
from tests import tiny


def settings(objective: str = "clipped", **train: Any) -> Config:
    config = tiny.tiny_config(objective=objective)
    return replace(config, train=replace(config.train, **{"learning_rate": 1e-3, "warmup_steps": 0} | train))


@pytest.fixture(scope="module")
def episodes() -> list[Trajectory]:
    return tiny.scripted_trajectories(tiny.random_decoder(), 4)


def states(decoder: Decoder) -> list[dict[str, torch.Tensor]]:
    return [adapter_state(decoder, agent) for agent in (0, 1)]


def moves(decoder: Decoder, before: list[dict[str, torch.Tensor]]) -> list[float]:
    """Largest change of a weight, by agent."""
    after = states(decoder)
    return [max(float((a[k] - b[k]).abs().max()) for k in b) for a, b in zip(after, before, strict=True)]


def base_weights(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in decoder.named_parameters() if ".lora_" not in name}


def test_an_update_moves_both_adapters_and_nothing_else(episodes: list[Trajectory]) -> None:
    decoder = tiny.random_decoder()
    before, base = states(decoder), base_weights(decoder)
    Learner(decoder, settings()).update(episodes, 0)
    assert all(move > 0 for move in moves(decoder, before))
    assert all(torch.equal(weight, base[name]) for name, weight in base_weights(decoder).items())


@pytest.mark.parametrize("agent", [0, 1])
def test_an_agent_that_is_not_trained_keeps_its_adapter(episodes: list[Trajectory], agent: int) -> None:
    decoder = tiny.random_decoder()
    before = states(decoder)
    name = ("train_recommender", "train_user")[agent]
    learner = Learner(decoder, settings(**{name: False}, weight_decay=0.1))
    metrics = [learner.update(episodes, step) for step in range(2)][-1]
    found = moves(decoder, before)
    assert found[agent] == 0 and found[1 - agent] > 0
    assert ("grad_norm_rec" in metrics, "grad_norm_user" in metrics) == (agent == 1, agent == 0)


def test_the_user_agents_learning_rate_has_its_own_factor(episodes: list[Trajectory]) -> None:
    decoder = tiny.random_decoder()
    before = states(decoder)
    Learner(decoder, settings(user_learning_rate_factor=0.25)).update(episodes, 0)
    found = moves(decoder, before)  # AdamW's first step moves a weight by the learning rate, whatever its gradient
    assert found[0] == pytest.approx(1e-3, rel=0.05) and found[1] == pytest.approx(0.25e-3, rel=0.05)


def test_the_schedule_rises_and_falls() -> None:
    learner = Learner(
        tiny.random_decoder(),
        settings(warmup_steps=3, num_steps=10, final_learning_rate=0.2, user_learning_rate_factor=0.5),
    )
    found = []
    for step in range(10):
        learner.set_rates(step)
        rec, user = (group["lr"] for group in learner.optimizer.param_groups)
        assert user == pytest.approx(rec / 2)
        found.append(rec / 1e-3)
    expected = [0.25, 0.5 * 0.92, 0.75 * 0.84, 0.76, 0.68, 0.6, 0.52, 0.44, 0.36, 0.28]
    assert found == pytest.approx(expected)


def test_an_update_uses_the_rate_of_its_step(episodes: list[Trajectory]) -> None:
    decoder = tiny.random_decoder()
    before = states(decoder)
    Learner(decoder, settings(warmup_steps=3, num_steps=10, final_learning_rate=0.2)).update(episodes, 1)
    assert moves(decoder, before)[0] == pytest.approx(0.5 * 0.92 * 1e-3, rel=0.05)


def test_gradients_of_earlier_updates_are_forgotten(episodes: list[Trajectory]) -> None:
    learner = Learner(tiny.random_decoder(), settings(learning_rate=1e-12))  # the weights stay where they are
    norms = [learner.update(episodes, step)["grad_norm_rec"] for step in range(3)]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


def test_the_rate_of_a_step_does_not_depend_on_the_steps_before() -> None:
    learner = Learner(tiny.random_decoder(), settings(warmup_steps=2, num_steps=8))
    rates = []
    for steps in ([5], [0, 1, 7, 5]):
        for step in steps:
            learner.set_rates(step)
        rates.append(learner.optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1]


def test_each_agents_gradient_is_scaled_down_on_its_own(episodes: list[Trajectory]) -> None:
    learner = Learner(tiny.random_decoder(), settings(max_grad_norm=1e-3))
    metrics = learner.update(episodes, 0)
    for agent, name in enumerate(("rec", "user")):
        norms = [p.grad.norm() for p in learner.parameters[agent].values() if p.grad is not None]
        assert torch.stack(norms).norm() == pytest.approx(1e-3, rel=1e-3)
        assert metrics[f"grad_norm_{name}"] > 1e-3  # reported as it was


def test_minibatches_are_updates_on_their_shares_of_the_episodes(episodes: list[Trajectory]) -> None:
    together, apart = tiny.random_decoder(), tiny.random_decoder()
    metrics = Learner(together, settings(minibatches=2)).update(episodes, 0)
    learner = Learner(apart, settings())
    parts = [learner.update([t for t in episodes if t.episode % 2 == part], 0) for part in (0, 1)]
    for one, other in zip(states(together), states(apart), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert metrics["loss"] == pytest.approx(sum(part["loss"] for part in parts) / 2)
    assert metrics["logp_difference_max"] == max(part["logp_difference_max"] for part in parts)
    assert parts[1]["logp_difference_max"] > parts[0]["logp_difference_max"]  # the second one follows an update


def test_more_minibatches_than_episodes_in_the_batch_is_fine(episodes: list[Trajectory]) -> None:
    first = [t for t in episodes if t.episode == 0]
    assert all(t.turns[0].weight > 0 for t in first), "both agents have something to learn"
    metrics = Learner(tiny.random_decoder(), settings(minibatches=4)).update(first, 0)
    assert metrics["grad_norm_rec"] > 0 and metrics["grad_norm_user"] > 0


def test_metrics_are_plain_finite_numbers(episodes: list[Trajectory]) -> None:
    metrics = Learner(tiny.random_decoder(), settings()).update(episodes, 0)
    assert all(type(value) is float and value == value for value in metrics.values())
    expected = (
        "loss loss_rec loss_user clip_fraction ratio_mean credit_mean_rec credit_mean_user advantage_std "
        "grad_norm_rec grad_norm_user logp_difference logp_difference_max"
    )
    assert set(expected.split()) <= set(metrics)
    assert metrics["loss"] == pytest.approx(metrics["loss_rec"] + metrics["loss_user"], abs=1e-6)


def test_an_update_reaches_the_sampler() -> None:
    decoder = tiny.random_decoder()

    def first_logp() -> list[float]:
        played = [tiny.new_episode(n) for n in range(4)]
        play(decoder, played, seed=0, temperature=1.0, max_reply_tokens=24, batch_size=4)
        return [p for episode in played for p in episode.views[0].logp[:4]]

    before = first_logp()
    assert first_logp() == before
    found = tiny.scripted_trajectories(decoder, 3)
    Learner(decoder, settings(learning_rate=1e-2)).update(found, 0)
    assert max(abs(a - b) for a, b in zip(before, first_logp(), strict=True)) > 1e-2


def test_an_update_makes_rewarded_replies_likelier_and_others_less_likely() -> None:
    for sign in (1.0, -1.0):
        decoder = tiny.random_decoder()
        found = [
            replace(t, turns=tuple(replace(turn, reward=sign, weight=1.0) for turn in t.turns))
            for t in tiny.scripted_trajectories(decoder, 3)
        ]
        config = settings("faithful", learning_rate=1e-3)
        learner = Learner(decoder, replace(config, loss=replace(config.loss, credit_weight=0.0)))
        losses = [learner.update(found, step)["loss"] for step in range(4)]
        assert losses[-1] < losses[0]  # -E[R log p] falls: up for reward 1, down for -1


# ------------------------------------------------------------------------------------------------------------ stopping


def poisoned(found: list[Trajectory], what: str) -> list[Trajectory]:
    """One number of the last trajectory is not finite."""
    t = found[-1]
    if what == "behaviour_logp":
        bad = replace(t, behaviour_logp=(*t.behaviour_logp[:-1], float("-inf")))
    else:
        last = replace(t.turns[-1], **{what.removeprefix("turn_"): float("nan")})
        bad = replace(t, turns=(*t.turns[:-1], last))
    return [*found[:-1], bad]


@pytest.mark.parametrize("what", ["turn_reward", "turn_weight", "behaviour_logp"])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_numbers_that_are_not_finite_stop_a_step_before_any_weight_changes(
    episodes: list[Trajectory], what: str, minibatches: int
) -> None:
    decoder = tiny.random_decoder()
    before = states(decoder)
    learner = Learner(decoder, settings(minibatches=minibatches))
    bad = poisoned(episodes, what)
    with pytest.raises(NonFiniteError, match=rf"{what}.* episode {bad[-1].episode}\b"):
        learner.update(bad, 0)
    assert moves(decoder, before) == [0, 0]
    assert not learner.optimizer.state


@pytest.mark.parametrize("where", ["lora_b.0", "lora_a.1"])
def test_weights_that_are_not_finite_stop_a_step(episodes: list[Trajectory], where: str) -> None:
    decoder = tiny.random_decoder()
    learner = Learner(decoder, settings())
    name, parameter = next((n, p) for n, p in decoder.named_parameters() if n.endswith(where))
    with torch.no_grad():
        parameter.view(-1)[0] = float("nan")
    before = {n: p.detach().clone() for n, p in learner.named_parameters().items() if n != name}
    with pytest.raises(NonFiniteError, match="episodes"):
        learner.update(episodes, 0)
    assert all(torch.equal(p, before[n]) for n, p in learner.named_parameters().items() if n != name)


def test_a_gradient_that_is_not_finite_stops_a_step(episodes: list[Trajectory]) -> None:
    decoder = tiny.random_decoder()
    learner = Learner(decoder, settings())
    before = states(decoder)
    name, parameter = list(learner.named_parameters().items())[-1]
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match=f"gradient of the {'user' if name.endswith('1') else 'rec'} adapter"):
        learner.update(episodes, 0)
    assert moves(decoder, before) == [0, 0]


def test_an_update_after_one_that_was_stopped_is_as_if_it_never_was(episodes: list[Trajectory]) -> None:
    decoder, other = tiny.random_decoder(), tiny.random_decoder()
    learner = Learner(decoder, settings())
    with pytest.raises(NonFiniteError):
        learner.update(poisoned(episodes, "turn_reward"), 0)
    learner.update(episodes, 0)
    Learner(other, settings()).update(episodes, 0)
    for one, expected in zip(states(decoder), states(other), strict=True):
        assert all(torch.equal(one[name], expected[name]) for name in one)


def test_a_budget_too_small_for_one_episode_is_a_setting_to_change(episodes: list[Trajectory]) -> None:
    decoder = tiny.random_decoder()
    before = states(decoder)
    with pytest.raises(ConfigError, match="train.max_tokens: 30 is too small"):
        Learner(decoder, settings(max_tokens=30)).update(episodes, 0)
    assert moves(decoder, before) == [0, 0]
