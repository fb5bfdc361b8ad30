"""The training step: both streams forward, fused head and loss, backward, one AdamW step on both adapters.

    docs/step.md        the data flow in a picture, and what it costs

Whatever the whole batch decides (baselines, the mean credit, the gradient's norm) is worked out over all micro-batches,
so their number changes nothing. Nothing that is not finite reaches a weight. Left out: distribution over devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from coars_fast.config import Config
from coars_fast.data.records import Trajectory
from coars_fast.errors import NonFiniteError
from coars_fast.learn.credit import agent_means, credit_by_kind, credit_of, gather
from coars_fast.learn.metrics import AGENT_NAMES, combined, credit_by_place, token_metrics, whole
from coars_fast.learn.objective import normalise
from coars_fast.learn.packing import PackedBatch, Work, check_budget, pack, split
from coars_fast.learn.teacher import make_teacher
from coars_fast.learn.two_stream import re_prefill, two_stream
from coars_fast.model.decoder import Decoder
from coars_fast.model.lora import adapter_parameters
from coars_kernels import (
    CreditOptions,
    FusedCreditLoss,
    credit_policy_loss,
    fused_credit_loss,
    linear_logprob,
    paired_linear_logprob,
)


class Learner:
    """Updates both adapters of a decoder.

    Args:
        decoder: frozen base with adapters.
        config: objective, loss and optimization settings.
    """

    def __init__(self, decoder: Decoder, config: Config):
        self.decoder, self.config = decoder, config
        self.device = decoder.head_weight.device
        self.work = Work.of(decoder.config)
        self.teacher = make_teacher(decoder, config.loss)
        train = config.train
        wanted = (train.train_recommender, train.train_user)
        rates = (train.learning_rate, train.learning_rate * train.user_learning_rate_factor)
        self.parameters = [adapter_parameters(decoder, agent) for agent in range(2)]
        groups: list[dict[str, Any]] = []
        for agent, parameters in enumerate(self.parameters):
            for parameter in parameters.values():
                parameter.requires_grad_(wanted[agent])
            groups.append({"params": list(parameters.values()), "lr": rates[agent], "peak": rates[agent]})
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=train.weight_decay, fused=fused)

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

    @property
    def credit_center(self) -> bool:
        """Whether the credit is centred: as the settings say, or else unless the objective is Eq. 11 as it stands."""
        chosen = self.config.loss.credit_center
        return self.config.objective != "faithful" if chosen is None else chosen

    # ------------------------------------------------------------------------------------------------------- updates

    def update(self, trajectories: Sequence[Trajectory], step: int) -> dict[str, float]:
        """One training step on the episodes of one rollout; returns its metrics.

        They are exact over an update, however it is split into micro-batches. With several minibatches they are plain
        means over these, which follow one another with other weights and need not hold the same number of tokens.

        Raises:
            ConfigError: an episode is over the budget of tokens.
            NonFiniteError: a reward, a log-prob, the loss or a gradient is not finite. No weight has changed, unless
                an earlier minibatch of this step changed them.
            ValueError: there is nothing to learn from.
        """
        train = self.config.train
        _check_finite(trajectories)
        found = [t for t in trajectories if t.turns]
        if not found:
            raise ValueError("trajectories: no turn to learn from")
        found, num_dropped = check_budget(found, train.max_tokens, drop=train.over_budget == "drop")
        self.set_rates(step)
        parts = train.minibatches
        if parts > 1 and self.config.loss.importance_cap is not None:
            found = self._with_old_logp(found)
        # Both views of an episode stay in one minibatch; neighbours are spread so that minibatches look alike.
        minibatches = [[t for t in found if t.episode % parts == part] for part in range(parts)]
        seed = (self.config.seed * 1_000_003 + step) * parts
        metrics = combined(
            [self._update_minibatch(chosen, seed + part) for part, chosen in enumerate(minibatches) if chosen]
        )
        return metrics | {"episodes_dropped": float(num_dropped)}

    def _update_minibatch(self, trajectories: Sequence[Trajectory], seed: int) -> dict[str, float]:
        loss, baseline = self.config.loss, self.config.loss.baseline
        if baseline == "auto":
            baseline = "none" if self.config.objective == "faithful" else "turn"
        num_episodes = len({t.episode for t in trajectories})
        group_size = self.config.train.group_size
        ready = normalise(trajectories, baseline=baseline, num_episodes=num_episodes, group_size=group_size)
        self.optimizer.zero_grad(set_to_none=True)
        batches = self._batches(ready)
        credit_means = None
        if loss.credit_weight and (loss.credit_form != "token" or (self.credit_center and len(batches) > 1)):
            batches, credit_means = self._with_credit(batches, seed)
        parts = [self._backward(batch, credit_means) for batch in batches]
        norms = self._clip_gradients(ready, credit_means)
        self.optimizer.step()
        if self.teacher is not None:
            self.teacher.follow()
        return whole(parts) | norms

    def _batches(self, trajectories: Sequence[Trajectory]) -> list[PackedBatch]:
        groups = split(trajectories, self.config.train.max_tokens, self.work)
        return [pack(group).to(self.device) for group in groups]

    def _backward(self, batch: PackedBatch, credit_means: Tensor | None) -> dict[str, Tensor]:
        """Add a micro-batch's gradient; returns its metrics."""
        result = self._loss(batch, credit_means)
        value = result.loss.item()
        if not math.isfinite(value):
            raise NonFiniteError(f"the loss is {value}; {_suspects(batch, result)}; no weight was changed")
        if result.loss.requires_grad:
            result.loss.backward()
        return result.metrics

    def _clip_gradients(self, trajectories: Sequence[Trajectory], credit_means: Tensor | None) -> dict[str, float]:
        """Scale each agent's gradient down to the largest norm; returns the norms that they had."""
        norms = {}
        for agent, name in enumerate(AGENT_NAMES):
            trained = [p for p in self.parameters[agent].values() if p.grad is not None]
            if not trained:
                continue
            norm = torch.nn.utils.clip_grad_norm_(trained, self.config.train.max_grad_norm).item()
            if not math.isfinite(norm):
                found = self._unfit_episodes(trajectories, agent, credit_means)
                culprits = f"it comes from episodes {_some(found)}" if found else "each episode's own is finite"
                raise NonFiniteError(
                    f"the gradient of the {name} adapter has norm {norm}; {culprits}; no weight was changed"
                )
            norms[f"grad_norm_{name}"] = norm
        return norms

    def _unfit_episodes(self, trajectories: Sequence[Trajectory], agent: int, credit_means: Tensor | None) -> list[int]:
        """Episodes whose own gradient of an agent's adapter is not finite; one backward pass each.

        Credit is bounded in every form, so here it is Eq. 10's.
        """
        found = []
        for episode in sorted({t.episode for t in trajectories}):
            self.optimizer.zero_grad(set_to_none=True)
            batch = pack([t for t in trajectories if t.episode == episode]).to(self.device)
            loss = self._loss(batch, credit_means).loss
            if loss.requires_grad:
                loss.backward()
            gradients = [p.grad for p in self.parameters[agent].values() if p.grad is not None]
            if gradients and not bool(torch.nn.utils.get_total_norm(gradients).isfinite()):
                found.append(episode)
        self.optimizer.zero_grad(set_to_none=True)
        return found

    # ---------------------------------------------------------------------------------------------------------- loss

    def _loss(self, batch: PackedBatch, credit_means: Tensor | None = None) -> FusedCreditLoss:
        """Loss of a packed batch; its metrics are means over the tokens of turns that are not excluded.

        `credit_means` [2]: each agent's mean credit over the whole update; None: `batch` is the whole update.
        """
        loss, weight, attention = self.config.loss, self.decoder.head_weight, self.config.model.attention
        batch = self._with_other_teacher(batch)
        reference_logp = None
        if loss.kl_weight:
            with torch.no_grad():
                base, _ = two_stream(self.decoder, batch, teacher=False, adapters=False, backend=attention)
                reference_logp = linear_logprob(base, weight, batch.target)
        wanted = bool(loss.credit_weight) and batch.teacher_logp is None
        student, teacher = two_stream(self.decoder, batch, teacher=wanted, backend=attention)
        turn_reward = batch.turn_reward
        if credit_means is not None:  # R + w (A - mean) = (R - w mean) + w A
            turn_reward = turn_reward - loss.credit_weight * credit_means[batch.turn_agent.long()]
        options: CreditOptions = {
            "turn_weight": batch.turn_weight, "turn_agent": batch.turn_agent, "credit_weight": loss.credit_weight,
            "credit_clip": loss.credit_clip, "credit_center": self.credit_center and credit_means is None,
            "objective": self.config.objective, "clip_low": loss.clip_low, "clip_high": loss.clip_high,
            "dual_clip": loss.dual_clip, "reference_logp": reference_logp, "kl_weight": loss.kl_weight,
        }  # fmt: skip
        values = (batch.behaviour_logp, turn_reward, batch.turn_offsets)
        if batch.teacher_logp is None and loss.importance_cap is None:
            result = fused_credit_loss(student, teacher, weight, batch.target, *values, **options)
        else:
            if teacher is None:
                logp, teacher_logp = linear_logprob(student, weight, batch.target), batch.teacher_logp
            else:
                logp, teacher_logp = paired_linear_logprob(student, teacher, weight, batch.target)
            if loss.importance_cap is not None:
                options["old_logp"] = logp.detach() if batch.old_logp is None else batch.old_logp
                options["importance_cap"] = loss.importance_cap
            value, metrics = credit_policy_loss(logp, teacher_logp, *values, **options)
            result = FusedCreditLoss(value, metrics, logp.detach(), teacher_logp)
        own = token_metrics(batch, result.logp, result.metrics["num_tokens"])
        for by in (credit_by_place, credit_by_kind):
            own |= by(batch, result.logp, result.teacher_logp, loss.credit_clip)
        return result._replace(metrics=result.metrics | own | {"loss": result.loss.detach()})

    def _with_other_teacher(self, batch: PackedBatch) -> PackedBatch:
        """The batch with the log-probs of a teacher of other weights; as it is where the teacher shares ours."""
        if self.teacher is None or batch.teacher_logp is not None:
            return batch
        with self.teacher.in_place():
            hidden = re_prefill(
                self.decoder, batch, max_tokens=self.config.train.max_tokens, backend=self.config.model.attention
            )
        return replace(batch, teacher_logp=linear_logprob(hidden, self.decoder.head_weight, batch.target))

    @torch.no_grad()
    def _with_credit(self, batches: Sequence[PackedBatch], seed: int) -> tuple[list[PackedBatch], Tensor | None]:
        """What no micro-batch can know alone, from a pass over all of them.

        Returns:
            The micro-batches with log-probs of the teacher, whose difference from the student's is each token's credit
            in the form of `loss.credit_form`; and [2] the mean credit of each agent, None unless it is centred.
        """
        loss = self.config.loss
        known = [self._with_other_teacher(batch) for batch in batches]
        logp, teacher_logp = zip(*map(self._score, known), strict=True)
        tokens = gather(known, logp, teacher_logp)
        credit = credit_of(loss.credit_form, tokens, clip=loss.credit_clip, seed=seed)
        if bool(credit.isnan().any()):
            found = (tokens.order[credit.isnan()] // len(AGENT_NAMES)).tolist()
            raise NonFiniteError(f"log-probs of episodes {_some(found)} are not finite; no weight was changed")
        if loss.credit_form != "token":
            teacher_logp = (tokens.logp + credit).split([len(values) for values in logp])
        scored = [replace(batch, teacher_logp=values) for batch, values in zip(known, teacher_logp, strict=True)]
        return scored, agent_means(credit, tokens).float().to(self.device) if self.credit_center else None

    def _score(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """[R] log-probs of the trained tokens by the student and by its teacher."""
        weight, attention = self.decoder.head_weight, self.config.model.attention
        student, teacher = two_stream(self.decoder, batch, teacher=batch.teacher_logp is None, backend=attention)
        if teacher is not None:
            return paired_linear_logprob(student, teacher, weight, batch.target)
        assert batch.teacher_logp is not None
        return linear_logprob(student, weight, batch.target), batch.teacher_logp

    @torch.no_grad()
    def _with_old_logp(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """The trajectories with the trainer's log-probs of their tokens now, before the first minibatch."""
        found = []
        for group in split(trajectories, self.config.train.max_tokens, self.work):
            batch = pack(group).to(self.device)
            student, _ = two_stream(self.decoder, batch, teacher=False, backend=self.config.model.attention)
            values = linear_logprob(student, self.decoder.head_weight, batch.target).tolist()
            first = 0
            for t in group:
                last = first + len(t.behaviour_logp)
                found.append(replace(t, old_logp=tuple(values[first:last])))
                first = last
        return found


def _check_finite(trajectories: Sequence[Trajectory]) -> None:
    """Rewards, weights and log-probs, before any of them is averaged with others'."""
    for t in trajectories:
        values = {
            "behaviour_logp": t.behaviour_logp,
            "turn_reward": [turn.reward for turn in t.turns],
            "turn_weight": [turn.weight for turn in t.turns],
            "teacher_logp": t.teacher_logp or (),
        }
        for name, numbers in values.items():
            if not all(map(math.isfinite, numbers)):
                agent = AGENT_NAMES[t.agent]
                raise NonFiniteError(f"{name} of episode {t.episode} ({agent}) is not finite; no weight was changed")


def _suspects(batch: PackedBatch, result: FusedCreditLoss) -> str:
    """Which episodes have log-probs that are not finite, or else the one with the largest reward, in words."""
    bad = ~result.logp.isfinite()
    if result.teacher_logp is not None:
        bad = bad | ~result.teacher_logp.isfinite()
    lengths = batch.turn_offsets.diff()
    turns = torch.arange(len(lengths), device=bad.device).repeat_interleave(lengths)[bad].unique()
    found = [batch.episodes[int(s)] for s in batch.branch_parent[turns]]
    if found:
        return f"log-probs of episodes {_some(found)} are not finite"
    weighted = batch.turn_reward * batch.turn_weight
    largest = int(weighted.abs().argmax())
    episode, value = batch.episodes[int(batch.branch_parent[largest])], weighted[largest].item()
    return f"all log-probs are finite, and the largest weighted reward is {value:.3g} in episode {episode}"


def _some(episodes: Sequence[int]) -> str:
    """The first few episode numbers, for a message."""
    shown = sorted(set(episodes))
    return ", ".join(map(str, shown[:5])) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
