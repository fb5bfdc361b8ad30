"""Every setting of a run, as frozen dataclasses; a field's docstring is its `--help`.

This file imports no torch, so `--help` and a wrong setting answer at once. Presets are TOML files beside it
(`presets/*.toml`) with the same names; command-line flags win over the preset, the preset over the defaults here. What
is refused stands in `config_checks.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from coars_fast.errors import ConfigError

Objective = Literal["faithful", "clipped", "cispo", "gspo"]
StageSensitivity = Literal["asym", "linear", "log", "none"]
Excluded = Literal["recommender", "both", "none"]
CreditForm = Literal["token", "gated", "shuffled", "constant"]
Reference = Literal["template", "truth", "diagnosis", "other_user", "empty"]
Rewards = Literal["coupled", "outcome", "form", "none"]


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """The synthetic world that the embedded default plays in (see `data.format`)."""

    num_items: int = 600
    """Titles in the catalogue."""
    num_users: int = 900
    """Users with a taste and a history."""
    interactions_per_user: int = 20
    """Length of every user's history."""
    seed: int = 7
    """Makes another world of the same kind."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Who is recommended what: the data set, its split and the candidates."""

    path: str | None = None
    """Folder of a data set, or its file of interactions where a folder holds several (docs/data.md). Default: the
    synthetic world."""
    format: Literal["auto", "world", "movielens", "lastfm", "llara", "amazon", "recbole", "plain"] = "auto"
    """`world`: the synthetic world; the others: the layout of `data.path`, `plain` being one's own `interactions.csv`
    and `items.csv`; `auto`: by the files found there, or the world without `data.path`."""
    candidates: str = "random9+gt"
    """What the recommender chooses from. `topK`: SASRec's K best (truth possibly absent; the paper uses top20);
    `topK+gt`: the same, truth in place of the K-th where absent; `randomK+gt`: the truth and K items that the user has
    not seen. Figures of different modes are not comparable."""
    history_length: int = 6
    """How many of the latest items both agents are shown."""
    num_peers: int = 5
    """Similar users whose choices the user agent hears about."""
    min_interactions: int = 5
    """Users with fewer interactions are left out."""
    min_item_interactions: int = 0
    """Items with fewer interactions are left out, before users are counted and again after, until both hold."""
    train_targets: int = 1
    """Items at the end of each user's history (before the test item) used as targets of training episodes. SASRec and
    the peers see only what comes before them."""
    num_eval_users: int = 150
    """Users that the evaluation plays with, drawn by `eval_seed`."""
    hold_out_users: bool = True
    """Keep the evaluation's users out of the training episodes altogether."""
    eval_seed: int = 1000
    """Draws the evaluation's users, candidates and sampling noise; unrelated to `seed`."""


@dataclass(frozen=True, kw_only=True)
class SASRecConfig:
    """SASRec (arXiv 1808.09781): proposes candidates, and its user embeddings say who is similar to whom."""

    num_epochs: int = 12
    """Passes over the training part."""
    hidden_size: int = 48
    """Width of item embeddings and layers."""
    num_layers: int = 2
    """Self-attention blocks."""
    num_heads: int = 2
    """Attention heads."""
    max_length: int = 50
    """Latest items that the model sees."""
    dropout: float = 0.2
    """Dropout in training."""
    batch_size: int = 32
    """Users a step."""
    similar_lengths: bool = False
    """Batches of windows of like length: less padding, faster where `max_length` is large."""
    learning_rate: float = 4e-3
    """Adam's learning rate; it falls to a twentieth over `num_epochs`."""
    patience: int = 0
    """Stop after so many epochs in which the ranking of validation items (the last one of each training part) did not
    improve, and go back to the best; 0: train for `num_epochs` on everything."""
    seed: int = 0
    """Draws its weights, order and dropout; apart from the run's seed, so that runs share candidates."""
    cache: str | None = None
    """Folder that keeps trained models for other runs of the same data and settings (every run folder has its own)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The language model that both agents share, and the adapters that are trained."""

    path: str | None = None
    """Hugging Face folder or hub id of a Llama, Qwen2 or Qwen3 model (safetensors). Default: the shipped
    `tiny_base`."""
    tokenizer: Literal["own", "catalogue"] = "own"
    """`own`: the model's. `catalogue`: the same with every title of the catalogue as one more token, placed by SASRec's
    item vectors; for the shipped model, which cannot spell titles, and with `--warm-start`, which teaches them."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Storage of the base weights; `auto`: float32 on a CPU, bfloat16 on a GPU. Adapters are always float32."""
    device: str = "auto"
    """`auto`: a CUDA device where there is one, otherwise the CPU."""
    attention: Literal["auto", "flash_attn", "varlen_attn", "sdpa"] = "auto"
    """Attention of the packed training batch. An explicit choice that cannot be met here is an error."""
    lora_rank: int = 8
    """Rank of both adapters."""
    lora_alpha: float = 16.0
    """LoRA scale is alpha / rank."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass to save memory."""


@dataclass(frozen=True, kw_only=True)
class GameConfig:
    """The conversation and its rewards (CoARS, Eq. 7 and 8)."""

    max_turns: int = 3
    """T: turns of an episode; a click ends it earlier."""
    prompts: Literal["brief", "full"] = "brief"
    """`full` explains the task and the reply format to a model that has never seen them; `brief` suits models trained
    on them."""
    memory: int = 0
    """Earlier sessions with the same user that both agents are told about before an episode: what was recommended, what
    was answered, what was really taken. They are about the items taken before this target, and played first, one
    after the other, by the same model. F1-disc asks without. The shipped model was never taught to read it."""
    rewards: Rewards = "coupled"
    """`coupled`: Eq. 7 and 8; `outcome`: +1 or -1 by whether an episode's last recommendation was right (recommender,
    all turns) and whether a turn's label was right (user), nothing excluded; `form`: -1 for a reply that cannot be
    read, else 0, so that only the credit says what is right; `none`: 0, so that only the credit acts."""
    reference: Reference = "template"
    """d_t, what only the teacher sees. `template`: right or wrong, the true item, the right action (and with `full`
    prompts the answer that was given); `truth`: the true item or the right action alone; `diagnosis`: the `template`
    and what the agent itself, shown that, writes about its reply (greedily, at most `rollout.max_reply_tokens`).
    Controls: `other_user`, the `template` of another user's turn in the same step; `empty`, nothing, so that the credit
    is 0."""
    alpha: float = 0.1
    """How strongly similar peers temper the user's reward (Eq. 8)."""
    stage: StageSensitivity = "asym"
    """D_t, how the turn scales the recommender's reward: an early hit is worth more, a late miss costs more."""
    exclude_accepted_misses: Excluded = "recommender"
    """Whose reward leaves out turns in which a wrong item was accepted (the data cannot tell that it is unwanted)."""
    balance_user_turns: bool = True
    """Weight the user agent's turns so that hits and misses count equally in a batch."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How episodes are played for training."""

    temperature: float = 1.0
    """Sampling temperature; training assumes 1."""
    max_reply_tokens: int = 40
    """A reply that is longer is cut and counts as invalid."""
    batch_size: int = 128
    """Episodes played at the same time."""
    kv_gib: float | None = None
    """GiB of memory for keys and values. By default what the episodes need, up to a third of what is free; with less,
    some are computed again."""
    attention: Literal["auto", "dense", "flash_attn", "varlen_attn", "kernels"] = "auto"
    """Attention of a rollout: `dense` on a CPU, the others over pages on a GPU. An explicit choice that cannot be met
    here is an error."""
    constrained: bool = False
    """Hold replies to their format, so that every one can be read. For evaluations only (`--train.num-steps 0`, or
    `python -m coars_fast.evaluate RUN --constrained`): what is forced must not be trained on."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Token credit and policy loss (CoARS, Eq. 10 to 12); the objective itself is `--objective`."""

    credit_weight: float = 0.1
    """lambda_SD: weight of the token credit. 0 skips the teacher."""
    credit_clip: float = 1.0
    """Bound of a token's credit."""
    credit_form: CreditForm = "token"
    """`token`: Eq. 10; `gated`: times the sigmoid of the difference of log-probs, which keeps what the teacher endorses
    and softens what it rejects. Controls: `shuffled`, the credits of other tokens of the update; `constant`, one
    negative number for each token of probability below .5, 0 for the others."""
    credit_center: bool | None = None
    """Subtract each agent's mean credit over the batch; by default for every objective but `faithful`. The mean is
    negative, and uncentred pushes down all that was said, the reply's form too."""
    baseline: Literal["auto", "none", "batch", "turn", "group"] = "auto"
    """Subtracted from the turn rewards, per agent: `batch` is their weighted mean, `turn` that of its first, second and
    further replies apart, `group` the same within the `train.group_size` episodes of one task; `auto`: none for
    `faithful`, turn otherwise."""
    clip_low: float = 0.2
    """The importance ratio is clipped at 1 - clip_low."""
    clip_high: float = 0.2
    """The importance ratio is clipped at 1 + clip_high."""
    dual_clip: float | None = None
    """Bound (above 1) on the ratio of negative advantages; off by default."""
    kl_weight: float = 0.0
    """Weight of the KL penalty to the frozen base (k3 estimator). 0 skips it."""
    importance_cap: float | None = None
    """Guards against a sampler whose log-probs differ from the trainer's: each token's term is weighted by the ratio of
    the two at the update's beginning, at most this, and clipping starts from the trainer's own; off by default."""
    teacher: Literal["current", "initial", "ema"] = "current"
    """Adapters of the teacher: the student's own, which let it read the student's keys and values; those that training
    began with; or a moving average. The last two compute every turn's context again."""
    teacher_decay: float = 0.99
    """What `ema` keeps of its average at each update."""
    teacher_placement: Literal["trainer", "engine"] = "trainer"
    """Where the `current` teacher is computed: beside the student, at each update's own weights, or by the rollout
    engine as conversations end, at the weights that spoke. With one update a step the two are equal."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimization."""

    num_steps: int = 40
    """Training steps: each plays episodes, rewards them and updates both adapters."""
    episodes_per_step: int = 64
    """Episodes a step."""
    group_size: int = 1
    """Episodes of the same user and target within a step."""
    minibatches: int = 1
    """Updates per step, each on its share of the episodes."""
    learning_rate: float = 4e-3
    """AdamW's learning rate of the recommender's adapter."""
    user_learning_rate_factor: float = 1.0
    """The user agent's learning rate is this times the recommender's."""
    warmup_steps: int = 5
    """Steps over which the learning rate rises from 0."""
    final_learning_rate: float = 0.0
    """Share of the learning rate that is left at the last step (linear decay)."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Each agent's gradient is scaled down to this norm."""
    max_tokens: int = 65536
    """Tokens in one forward pass, student and teacher together; larger batches are split."""
    over_budget: Literal["error", "drop"] = "error"
    """What to do with an episode that alone has more than `max_tokens`: stop, or leave it out and count it (metric
    `episodes_dropped`)."""
    train_recommender: bool = True
    """Update the recommender's adapter."""
    train_user: bool = True
    """Update the user agent's adapter."""


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """The warm start: supervised fine-tuning on conversations written from the training part (`--warm-start`)."""

    num_steps: int = 600
    """Supervised steps."""
    finding_steps: int = 0
    """How many of them come first and teach finding items in lists that grow with success; a small model with a
    `catalogue` tokenizer needs several hundred (only with `--sft.trainable all`)."""
    batch_size: int = 64
    """Conversations a step, or as many lists."""
    learning_rate: float = 2e-3
    """AdamW's learning rate."""
    popular_rate: float = 0.0
    """Share of conversations in which the scripted recommender names what is popular, not what the user took next: a
    habit for CoARS to unlearn, as the shipped base has it; 0 imitates the training part alone."""
    trainable: Literal["all", "adapters"] = "all"
    """`all`: the base model itself (small models); `adapters`: both adapters only."""
    cache: str | None = None
    """Folder that keeps warm-started bases for other runs of the same data, seed and settings (every run folder has its
    own); only with `--sft.trainable all`."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept, and how often."""

    every: int = 20
    """Steps between checkpoints; the last step always writes one."""
    keep: int = 2
    """Checkpoints kept."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The evaluation before and after training."""

    every: int = 10
    """Steps between short evaluations on held-out users for the learning curve (0: never)."""
    num_samples: int = 1
    """Sampled episodes per user (beside the greedy one)."""
    num_bootstrap: int = 1000
    """Resamples of users behind each 95% interval."""
    num_disc_users: int = 60
    """Users of the F1-disc test (20 items each, at 1:1, 1:3 and 1:9)."""
    cache: str | None = None
    """Folder that keeps the evaluations before training, for other runs that begin with the same model and ask the same
    of it."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a recommender agent and a user agent, two LoRA adapters on one language model, from the conversations that
    they have with each other (CoARS, arXiv 2604.10029). With no arguments it plays in a synthetic world with a small
    shipped model and finishes in minutes on a laptop."""

    preset: str = "cpu_tiny"
    """Settings to start from: a name in `coars_fast/presets` or a path of a TOML file; flags win over it."""
    out: str | None = None
    """Run folder. Default: runs/<preset>-<date>-<time>."""
    seed: int = 0
    """Draws training episodes, sampling noise and adapter initialization."""
    resume: str | None = None
    """`auto`: go on from the newest checkpoint in `--out` (or start there); or the path of a run or checkpoint
    folder."""
    objective: Objective = "clipped"
    """`faithful`: exactly Eq. 11; `clipped`: importance ratio with clipping; `cispo`: clipped weight on the log-prob;
    `gspo`: turn-level ratio."""
    warm_start: bool = False
    """Supervised fine-tuning on the training part before CoARS."""
    data: DataConfig = field(default_factory=DataConfig)
    world: WorldConfig = field(default_factory=WorldConfig)
    sasrec: SASRecConfig = field(default_factory=SASRecConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    game: GameConfig = field(default_factory=GameConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


@dataclass(frozen=True, kw_only=True)
class CandidateMode:
    """A parsed `data.candidates`."""

    source: Literal["top", "random"]
    size: int
    """Candidates in all, the truth included where it is forced in."""
    force_truth: bool


def parse_candidates(text: str) -> CandidateMode:
    """`top20`, `top20+gt` or `random19+gt` -> :class:`CandidateMode`; anything else is a :class:`ConfigError`."""
    match = re.fullmatch(r"(top|random)([1-9]\d*)(\+gt)?", text)
    if not match or (match[1] == "random" and not match[3]):
        raise ConfigError(f"data.candidates: {text!r} is none of topK, topK+gt, randomK+gt (for example top20+gt)")
    size = int(match[2]) + (1 if match[1] == "random" else 0)
    if size < 2:
        raise ConfigError(f"data.candidates: {text!r} leaves nothing to choose from; K must make at least 2 candidates")
    return CandidateMode(source=match[1], size=size, force_truth=bool(match[3]))  # type: ignore[arg-type]
