"""Which settings of a run are refused: those out of range, and those that contradict each other. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from coars_fast.config import Config, parse_candidates
from coars_fast.errors import ConfigError

_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "must be above 0",
        lambda value: value > 0,
        "data.history_length data.min_interactions data.train_targets data.num_eval_users world.num_items "
        "world.num_users world.interactions_per_user sasrec.hidden_size sasrec.num_layers sasrec.num_heads "
        "sasrec.max_length sasrec.batch_size sasrec.learning_rate model.lora_rank model.lora_alpha game.max_turns "
        "rollout.max_reply_tokens rollout.batch_size rollout.kv_gib loss.credit_clip train.episodes_per_step "
        "train.group_size train.minibatches train.learning_rate train.max_grad_norm train.max_tokens "
        "sft.batch_size sft.learning_rate checkpoint.every checkpoint.keep eval.num_bootstrap loss.importance_cap",
    ),
    (
        "must not be negative",
        lambda value: value >= 0,
        "seed world.seed sasrec.seed data.eval_seed data.min_item_interactions data.num_peers sasrec.num_epochs "
        "sasrec.patience sasrec.dropout game.alpha game.memory loss.credit_weight loss.kl_weight loss.clip_low "
        "loss.clip_high train.num_steps train.user_learning_rate_factor train.warmup_steps "
        "train.weight_decay sft.num_steps sft.finding_steps eval.every eval.num_samples eval.num_disc_users",
    ),
    (
        "must lie between 0 and 1",
        lambda value: 0 <= value <= 1,
        "train.final_learning_rate loss.teacher_decay sft.popular_rate",
    ),
    ("must be below 1", lambda value: value < 1, "loss.clip_low sasrec.dropout"),
    ("must be above 1", lambda value: value > 1, "loss.dual_clip"),
)
"""What is wrong, a test of the value, and the settings that it holds for."""


def check(config: Config) -> None:
    """Raise :class:`ConfigError` for a setting out of range or two that contradict each other, before any work."""
    parse_candidates(config.data.candidates)
    numbers = _numbers(config)
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise ConfigError(f"{name}: {value} is not a finite number")
    for problem, fits, names in _RANGES:
        for name in names.split():
            if name in numbers and not fits(numbers[name]):
                raise ConfigError(f"{name}: {numbers[name]} {problem}")
    for problem in _contradictions(config):
        raise ConfigError(problem)


def _numbers(settings: Any, prefix: str = "") -> dict[str, float]:
    """Every number among the settings by its dotted name; settings that are off (None) are left out."""
    found: dict[str, float] = {}
    for setting in fields(settings):
        value, name = getattr(settings, setting.name), prefix + setting.name
        if is_dataclass(value):
            found |= _numbers(value, f"{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value
    return found


def _contradictions(config: Config) -> list[str]:
    """Settings that cannot go together, in words."""
    data, model, train, sft, objective = config.data, config.model, config.train, config.sft, config.objective
    catalogue = model.tokenizer == "catalogue"
    rules = (
        (
            data.format not in ("auto", "world") and data.path is None,
            f"data.format: {data.format} needs --data.path FOLDER, "
            + ("a MovieLens folder" if data.format == "movielens" else "the folder that holds the data set"),
        ),
        (
            data.format == "world" and data.path is not None,
            f"data.format: the synthetic world reads no data.path ({data.path}); leave one of the two away",
        ),
        (
            train.episodes_per_step % train.group_size != 0,
            f"train.group_size: {train.group_size} does not divide train.episodes_per_step ({train.episodes_per_step})",
        ),
        (train.minibatches > train.episodes_per_step, "train.minibatches: more minibatches than episodes_per_step"),
        (
            objective == "faithful" and train.minibatches > 1,
            "--objective faithful has no importance ratio: train.minibatches must be 1",
        ),
        (
            config.game.reference != "template" and not config.loss.credit_weight,
            f"game.reference: {config.game.reference} does nothing at loss.credit_weight 0; raise the weight",
        ),
        (
            config.game.reference == "other_user" and train.episodes_per_step == train.group_size,
            "game.reference: other_user needs episodes of several users in a step; raise train.episodes_per_step",
        ),
        (
            config.game.reference == "empty"
            and (config.loss.credit_form != "token" or config.game.rewards in ("form", "none")),
            "game.reference: with empty the credit is 0, which leaves loss.credit_form without effect and game.rewards "
            "form and none with nothing to learn from; use --loss.credit-form token and other rewards",
        ),
        (
            config.loss.teacher_placement == "engine"
            and (config.loss.teacher != "current" or not config.loss.credit_weight),
            "loss.teacher_placement: engine scores with the current adapters, for the credit; use it with loss.teacher "
            "current and a loss.credit_weight above 0, or choose trainer",
        ),
        (
            config.loss.teacher_placement == "engine" and config.game.reference in ("other_user", "diagnosis"),
            f"loss.teacher_placement: engine scores an episode when it ends, before game.reference "
            f"{config.game.reference} can be written; use --loss.teacher-placement trainer",
        ),
        (
            config.game.rewards in ("form", "none") and not config.loss.credit_weight,
            f"game.rewards: {config.game.rewards} leaves the credit alone to learn from, but loss.credit_weight is 0; "
            "raise it",
        ),
        (
            config.loss.credit_form != "token" and not config.loss.credit_weight,
            f"loss.credit_form: {config.loss.credit_form} does nothing at loss.credit_weight 0; raise the weight",
        ),
        (
            config.loss.baseline == "group" and train.group_size == 1,
            "loss.baseline: group compares episodes of one task; make train.group_size 2 or more",
        ),
        (
            config.loss.dual_clip is not None and objective not in ("clipped", "gspo"),
            f"loss.dual_clip: --objective {objective} does not use it; leave it away, or choose clipped or gspo",
        ),
        (
            objective == "faithful" and config.loss.importance_cap is not None,
            "loss.importance_cap: --objective faithful is Eq. 11 as it stands; leave it away, or choose another one",
        ),
        (
            config.rollout.temperature != 1.0,
            "rollout.temperature: training needs 1.0, other temperatures break the importance ratio",
        ),
        (
            config.rollout.constrained and train.num_steps > 0,
            "rollout.constrained: replies that are held to their format are no samples of the policy that is trained; "
            "use it with --train.num-steps 0, or with python -m coars_fast.evaluate",
        ),
        (
            not (train.train_recommender or train.train_user),
            "train.train_recommender and train.train_user are both off: nothing would be trained",
        ),
        (
            catalogue and (not config.warm_start or sft.trainable != "all"),
            "model.tokenizer: 'catalogue' makes new embeddings, which need --warm-start and --sft.trainable all",
        ),
        (
            sft.finding_steps > 0 and sft.trainable == "adapters",
            "sft.finding_steps: lists are learned by the base model; use --sft.trainable all, or 0 steps",
        ),
        (
            sft.cache is not None and sft.trainable == "adapters",
            "sft.cache: it keeps base models, not adapters; use --sft.trainable all, or leave it away",
        ),
        (
            sft.finding_steps > sft.num_steps,
            f"sft.finding_steps: {sft.finding_steps} are more than all steps, sft.num_steps ({sft.num_steps})",
        ),
    )
    return [problem for broken, problem in rules if broken]
