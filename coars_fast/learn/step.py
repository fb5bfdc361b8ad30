"""The training step: student forward, teacher by re-prefill, fused head and loss, one AdamW step on both adapters.

The teacher is the same model with the same adapters on [context, reference, reply], without gradient. Left out here:
the two-stream forward that spares the teacher its context, and distribution over devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coars_fast.config import Config
from coars_fast.data.records import Trajectory
from coars_fast.errors import NonFiniteError
from coars_fast.learn.objective import normalise
from coars_fast.learn.packing import PackedBatch, pack, split, teacher_inputs
from coars_fast.model.attention import PackedAttention
from coars_fast.model.decoder import Decoder
from coars_fast.model.lora import adapter_parameters
from coars_kernels import fused_credit_loss, linear_logprob

AGENT_NAMES = ("rec", "user")


class Learner:
    """Updates both adapters of a decoder.

    Args:
        decoder: frozen base with adapters.
        config: objective, loss and optimization settings.
    """

    def __init__(self, decoder: Decoder, config: Config):
        self.decoder, self.config = decoder, config
        self.device = decoder.head_weight.device
        train = config.train
        wanted = (train.train_recommender, train.train_user)
        rates = (train.learning_rate, train.learning_rate * train.user_learning_rate_factor)
        self.parameters = [adapter_parameters(decoder, agent) for agent in range(2)]
        groups: list[dict[str, Any]] = []
        for agent, parameters in enumerate(self.parameters):
            for parameter in parameters.values():
                parameter.requires_grad_(wanted[agent])
            groups.append({"params": list(parameters.values()), "lr": rates[agent], "peak": rates[agent]})
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=train.weight_decay)

    def named_parameters(self) -> dict[str, Tensor]:
        """Every parameter of the optimizer by name."""
        return {name: p for parameters in self.parameters for name, p in parameters.items()}

    def set_rates(self, step: int) -> None:
        """Learning rates of a step: linear warm-up, then linear decay."""
        train = self.config.train
        rise = min(1.0, (step + 1) / (train.warmup_steps + 1))
        fall = 1.0 - (1.0 - train.final_learning_rate) * step / max(1, train.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rise * fall

    def update(self, trajectories: Sequence[Trajectory], step: int) -> dict[str, float]:
        """One training step on the episodes of one rollout; returns its metrics.

        They are exact over an update, however it is split into micro-batches. With several minibatches they are plain
        means over these, which follow one another with other weights and need not hold the same number of tokens.

        Raises:
            NonFiniteError: a reward, a log-prob, the loss or a gradient is not finite. No weight has changed, unless
                an earlier minibatch of this step changed them.
        """
        _check_finite(trajectories)
        self.set_rates(step)
        # Both views of an episode stay in one minibatch; neighbours are spread so that minibatches look alike.
        parts = self.config.train.minibatches
        history: list[dict[str, float]] = []
        for part in range(parts):
            chosen = [t for t in trajectories if t.episode % parts == part]
            if chosen:
                history.append(self._update_minibatch(chosen))
        return {name: _combined(name, [m[name] for m in history]) for name in history[0]}

    @property
    def credit_center(self) -> bool:
        """Whether the credit is centred: as the settings say, or else unless the objective is Eq. 11 as it stands."""
        chosen = self.config.loss.credit_center
        return self.config.objective != "faithful" if chosen is None else chosen

    def _update_minibatch(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        baseline = self.config.loss.baseline
        if baseline == "auto":
            baseline = "none" if self.config.objective == "faithful" else "turn"
        num_episodes = len({t.episode for t in trajectories})
        group_size = self.config.train.group_size
        ready = normalise(trajectories, baseline=baseline, num_episodes=num_episodes, group_size=group_size)
        ready = [t for t in ready if t.turns]
        self.optimizer.zero_grad(set_to_none=True)
        batches = [pack(group) for group in split(ready, self.config.train.max_tokens)]
        credit_means = self._credit_means(batches) if self.credit_center and len(batches) > 1 else None
        parts: list[dict[str, Tensor]] = []
        for batch in batches:
            loss, metrics = self._loss(batch.to(self.device), credit_means)
            if not math.isfinite(loss.item()):
                raise NonFiniteError(f"the loss is {loss.item()} in a batch with episodes {_some(batch.episodes)}")
            if loss.requires_grad:
                loss.backward()
            parts.append(metrics)
        return _whole(parts) | self._apply_gradients()

    @torch.no_grad()
    def _credit_means(self, batches: Sequence[PackedBatch]) -> Tensor:
        """[2] mean credit of each agent over all micro-batches of an update, which none of them can know alone."""
        found = _whole([self._loss(batch.to(self.device))[1] for batch in batches])
        means = [found[f"credit_mean_{name}"] for name in AGENT_NAMES]
        if not all(map(math.isfinite, means)):
            raise NonFiniteError(f"the mean credits of the agents are {means}; no weight was changed")
        return torch.tensor(means, device=self.device)

    def _hidden(self, source: Any, *, adapters: bool = True) -> Tensor:
        """Hidden states of packed sequences (a batch or teacher inputs), [N, H]."""
        attend = PackedAttention(source.cu_seqlens, backend=self.config.model.attention)
        agent_ids = source.agent_ids if adapters else None
        return self.decoder(source.token_ids, source.position_ids, attend, agent_ids)

    def _loss(self, batch: PackedBatch, credit_means: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a packed batch and its metrics, means over the tokens of turns that are not excluded.

        `credit_means` [2]: each agent's mean credit over the whole update; None: `batch` is the whole update.
        """
        loss, weight = self.config.loss, self.decoder.head_weight
        student = self._hidden(batch)[batch.rows]
        teacher = reference_logp = None
        with torch.no_grad():
            if loss.credit_weight:
                inputs = teacher_inputs(batch)
                teacher = self._hidden(inputs)[inputs.rows]
            if loss.kl_weight:
                base = self._hidden(batch, adapters=False)[batch.rows]
                reference_logp = linear_logprob(base, weight, batch.target)
        turn_reward = batch.turn_reward
        if credit_means is not None:  # R + w (A - mean) = (R - w mean) + w A
            turn_reward = turn_reward - loss.credit_weight * credit_means[batch.turn_agent.long()]
        value, metrics, logp, _ = fused_credit_loss(
            student,
            teacher,
            weight,
            batch.target,
            batch.behaviour_logp,
            turn_reward,
            batch.turn_offsets,
            turn_weight=batch.turn_weight,
            turn_agent=batch.turn_agent,
            credit_weight=loss.credit_weight,
            credit_clip=loss.credit_clip,
            credit_center=self.credit_center and credit_means is None,
            objective=self.config.objective,
            clip_low=loss.clip_low,
            clip_high=loss.clip_high,
            dual_clip=loss.dual_clip,
            reference_logp=reference_logp,
            kl_weight=loss.kl_weight,
        )
        lengths = batch.turn_offsets.diff()
        counted = batch.turn_weight != 0
        difference = (logp - batch.behaviour_logp).abs() * counted.repeat_interleave(lengths)
        metrics["loss"] = value.detach()
        metrics["logp_difference"] = difference.sum() / metrics["num_tokens"].clamp(min=1)
        metrics["logp_difference_max"] = difference.max()
        for agent, name in enumerate(AGENT_NAMES):
            metrics[f"num_tokens_{name}"] = lengths[counted & (batch.turn_agent == agent)].sum()
        return value, metrics

    def _apply_gradients(self) -> dict[str, float]:
        """Clip each agent's gradient and step, unless something is not finite."""
        norms = {}
        for name, parameters in zip(AGENT_NAMES, self.parameters, strict=True):
            trained = [p for p in parameters.values() if p.grad is not None]
            if not trained:
                continue
            norm = torch.nn.utils.clip_grad_norm_(trained, self.config.train.max_grad_norm).item()
            if not math.isfinite(norm):
                raise NonFiniteError(f"the gradient of the {name} adapter has norm {norm}; no weight was changed")
            norms[f"grad_norm_{name}"] = norm
        self.optimizer.step()
        return norms


def _check_finite(trajectories: Sequence[Trajectory]) -> None:
    """Rewards, weights and log-probs, before any of them is averaged with others'."""
    for t in trajectories:
        values = {
            "behaviour_logp": t.behaviour_logp,
            "turn_reward": [turn.reward for turn in t.turns],
            "turn_weight": [turn.weight for turn in t.turns],
        }
        for name, numbers in values.items():
            if not all(map(math.isfinite, numbers)):
                agent = AGENT_NAMES[t.agent]
                raise NonFiniteError(f"{name} of episode {t.episode} ({agent}) is not finite; no weight was changed")


def _whole(parts: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Metrics of an update from those of its micro-batches; counts of turns and tokens are left out."""
    columns = {name: [part[name].item() for part in parts] for name in parts[0]}

    def mean(values: Sequence[float], count: str = "num_tokens") -> float:
        counts = columns[count]
        return sum(value * n for value, n in zip(values, counts, strict=True)) / max(1.0, sum(counts))

    found = {}
    for name, values in columns.items():
        if name.endswith("_max"):
            found[name] = max(values)
        elif name.startswith("loss"):
            found[name] = sum(values)
        elif name.startswith("credit_mean_"):  # of one agent
            found[name] = mean(values, name.replace("credit_mean", "num_tokens"))
        elif not name.startswith("num_"):
            found[name] = mean(values)
    moments = zip(columns["advantage_mean"], columns["advantage_std"], strict=True)
    squares = mean([m**2 + s**2 for m, s in moments])
    found["advantage_std"] = math.sqrt(max(0.0, squares - found["advantage_mean"] ** 2))
    return found


def _combined(name: str, values: Sequence[float]) -> float:
    """A metric of a step from its minibatches'."""
    return max(values) if name.endswith("_max") else sum(values) / len(values)


def _some(episodes: Sequence[int]) -> str:
    """The first few episode numbers, for a message."""
    shown = sorted(set(episodes))
    return ", ".join(map(str, shown[:5])) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
