"""What the loops' benches share: the synthetic world, its conversations, and the ways in which others play and train.

The model is the shipped `tiny_base`, in float32, at every preset; presets change the number of episodes. Sampling is
greedy, so that every player says the same and can be checked in the same way. A shape with random weights (`SHAPES`)
holds no conversation: its replies are cut, and only the recommender speaks. Left out: large models (`bench/large.py`),
a server as a rival (it needs a GPU and its own process).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import coars_fast.learn.step as step_module
from bench.exact import exact, exact_logp
from bench.harness import Result
from coars_fast.build import Parts, build
from coars_fast.config import Config, GameConfig, LossConfig, ModelConfig, SASRecConfig, TrainConfig
from coars_fast.data.records import Task, Trajectory
from coars_fast.game.episode import Episode, Reply
from coars_fast.game.trajectory import trajectories
from coars_fast.learn.packing import PackedBatch
from coars_fast.learn.step import Learner
from coars_fast.learn.two_stream import re_prefill
from coars_fast.model.attention import PackedAttention
from coars_fast.model.config import DecoderConfig
from coars_fast.model.decoder import Decoder
from coars_fast.model.load import save_decoder
from coars_fast.model.lora import add_adapters
from coars_fast.progress import Screen
from coars_fast.rollout.play import play
from coars_kernels.credit_policy_loss.reference import credit_policy_loss_reference
from coars_kernels.fused_credit_loss import FusedCreditLoss
from coars_kernels.linear_logprob.reference import linear_logprob_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_EPISODES = {"smoke": 4, "cpu": 16, "h100": 512}
SHAPES = {
    "55m": DecoderConfig(
        family="qwen3", vocab_size=32_000, hidden_size=512, intermediate_size=1536, num_layers=12, num_heads=8,
        num_kv_heads=4, head_dim=64, tie_word_embeddings=True, max_position_embeddings=4096,
    )
}  # fmt: skip


class _Quiet(Screen):
    def say(self, text: str) -> None:
        """A bench prints its table alone."""


@dataclass(eq=False)
class World:
    """Everything an iteration works with."""

    parts: Parts
    tasks: list[Task]
    temperature: float

    @cached_property
    def rival(self) -> Any:
        """The base in transformers. Fresh adapters are zero, so it says the same as both agents: merging them into its
        weights, which trainers do before a rollout, changes nothing and is not timed."""
        import transformers

        bare = Decoder(self.parts.decoder.config)
        bare.load_state_dict({n: p for n, p in self.parts.decoder.state_dict().items() if "lora_" not in n})
        with tempfile.TemporaryDirectory() as folder:
            save_decoder(bare, Path(folder))
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.to(DEVICE).eval()

    def episodes(self) -> list[Episode]:
        """Fresh conversations about the tasks."""
        return [self.parts.episode(task) for task in self.tasks]


@cache
def world(
    num_episodes: int,
    max_turns: int = 3,
    prompts: Literal["brief", "full"] = "brief",
    shape: str | None = None,
    temperature: float = 0.0,
) -> World:
    """The synthetic world, the tiny base or a shape of `SHAPES` with random weights, and fresh adapters."""
    config = Config(
        sasrec=SASRecConfig(num_epochs=1),
        model=ModelConfig(dtype="float32"),
        game=GameConfig(max_turns=max_turns, prompts=prompts),
        train=TrainConfig(episodes_per_step=num_episodes, warmup_steps=0),
        # A baseline by turn would see other turns where a rival splits conversations into rows.
        loss=LossConfig(baseline="batch"),
    )
    with tempfile.TemporaryDirectory() as folder:
        parts = build(config, Path(folder), _Quiet())
    if shape is not None:
        decoder = Decoder(SHAPES[shape], generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_(False)
        add_adapters(decoder, rank=config.model.lora_rank, alpha=config.model.lora_alpha)
        parts = replace(parts, decoder=decoder)
    return World(parts, parts.tasks.train_tasks(0), temperature)


# -------------------------------------------------------------------------------------------------------------- playing


def play_ours(here: World, seed: int = 0) -> list[Episode]:
    """`coars_fast.rollout.play`: cached keys and values of both views."""
    config, episodes = here.parts.config, here.episodes()
    play(
        here.parts.decoder,
        episodes,
        seed=seed,
        temperature=here.temperature,
        max_reply_tokens=config.rollout.max_reply_tokens,
        batch_size=len(episodes),
    )
    return episodes


@torch.no_grad()
def play_generate(here: World, seed: int = 0) -> list[Episode]:
    """`transformers` `generate` on the whole conversation at every turn; its padding is on the left. At every turn the
    conversation is rendered as text and tokenised again, as trainers whose conversations are messages do; what is given
    to the model are the tokens that were drawn, so that all players say the same."""
    torch.manual_seed(seed)
    model, episodes, codec = here.rival, here.episodes(), here.parts.codec
    template, limit = here.parts.template, here.parts.config.rollout.max_reply_tokens
    agent = 0
    while any(episode.waiting is not None for episode in episodes):
        due = [episode for episode in episodes if episode.waiting == agent]
        if due:
            views = [episode.views[agent].tokens for episode in due]
            for view in views:
                codec.encode(codec.decode(view))
            for episode, reply in zip(
                due, _generate(model, views, template.control, limit, here.temperature), strict=True
            ):
                episode.receive(reply)
        agent = 1 - agent
    return episodes


def _generate(
    model: Any, views: Sequence[Sequence[int]], control: frozenset[int], limit: int, temperature: float
) -> list[Reply]:
    """One reply to each view."""
    longest, pad = max(map(len, views)), min(control)
    ids = torch.tensor([[pad] * (longest - len(view)) + list(view) for view in views], device=DEVICE)
    mask = torch.tensor([[0] * (longest - len(view)) + [1] * len(view) for view in views], device=DEVICE)
    how: dict[str, Any] = {"do_sample": False}
    if temperature:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    found = model.generate(
        input_ids=ids,
        attention_mask=mask,
        **how,
        max_new_tokens=limit,
        eos_token_id=sorted(control),
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = found.sequences[:, longest:]
    logits = torch.stack(found.logits, 1).float()
    logp = torch.log_softmax(logits, -1).gather(2, tokens[:, :, None])[:, :, 0].tolist()
    replies = []
    for row, values in zip(tokens.tolist(), logp, strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in control), len(row))
        replies.append(Reply(tuple(row[:end]), tuple(values[:end])))
    return replies


def spoken(episodes: Sequence[Episode]) -> dict[str, Any]:
    """A player's result: the log-probs of what was said, and the conversations."""
    logp = [value for episode in episodes for view in episode.views for value in view.logp]
    return {"logp": torch.tensor(logp), "episodes": episodes}


def num_spoken(result: Result) -> int:
    """Sampled tokens."""
    return result["logp"].numel()


def exact_spoken(here: World, result: Result) -> dict[str, tuple[Tensor | None, Tensor]]:
    """Float64 log-probs of what was said, each conversation in one forward pass."""
    values = []
    found: Any = result["episodes"]
    for episode in found:
        for agent, view in enumerate(episode.views):
            rows = torch.tensor([p for span in view.spans for p in range(span.start, span.end)], device=DEVICE)
            if len(rows):
                values.append(exact_logp(here.parts.decoder, torch.tensor(view.tokens, device=DEVICE), rows, agent))
    return {"logp": (None, torch.cat(values).cpu())}


# ------------------------------------------------------------------------------------------------------------- training


def eager_head(student: Tensor, teacher: Tensor | None, weight: Tensor, target: Tensor, *values: Any, **options: Any):
    """`fused_credit_loss` with logits of both, as an ordinary trainer has them."""
    logp = linear_logprob_reference(student, weight, target)
    assert isinstance(logp, Tensor)
    other = None
    if teacher is not None:
        with torch.no_grad():
            other = linear_logprob_reference(teacher, weight, target)
    assert other is None or isinstance(other, Tensor)
    loss, metrics = credit_policy_loss_reference(logp, other, *values, **options)
    return FusedCreditLoss(loss, metrics, logp.detach(), other)


def learner(decoder: Decoder, config: Config) -> Learner:
    """A learner whose step changes no weight, so that every call does the same work."""
    made = Learner(decoder, config)
    for group in made.optimizer.param_groups:
        group["peak"], group["weight_decay"] = 0.0, 0.0
    return made


def whole_contexts(
    decoder: Decoder, batch: PackedBatch, *, teacher: bool = True, adapters: bool = True, backend: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """`two_stream` by two ordinary forward passes: the teacher computes each turn's context again."""
    attend = PackedAttention(batch.cu_seqlens, backend=backend)
    agent_ids = batch.agent_ids if adapters else None
    student = decoder(batch.token_ids, batch.position_ids, attend, agent_ids)[batch.rows]
    return student, re_prefill(decoder, batch, backend=backend) if teacher else None


def update(made: Learner, found: Sequence[Trajectory], *, eager: bool, whole: bool | None = None) -> dict[str, Tensor]:
    """One step; the result is the (clipped) gradient of both adapters.

    `eager`: with full logits. `whole`: with whole contexts for the teacher; by default as `eager`, since ordinary
    trainers have both.
    """
    ours = step_module.fused_credit_loss, step_module.two_stream
    if eager:
        step_module.fused_credit_loss = eager_head  # pyright: ignore[reportAttributeAccessIssue]
    if eager if whole is None else whole:
        step_module.two_stream = whole_contexts
    try:
        made.update(found, 0)
    finally:
        step_module.fused_credit_loss, step_module.two_stream = ours
    gradients = [p.grad.flatten() for group in made.parameters for p in group.values() if p.grad is not None]
    return {"grad": torch.cat(gradients)}


def row_per_turn(found: Sequence[Trajectory]) -> list[Trajectory]:
    """Every reply a sequence of its own, with the whole conversation before it: how single-turn trainers see it."""
    rows = []
    for t in found:
        first = 0
        for turn in t.turns:
            last = first + turn.end - turn.start
            logp = t.behaviour_logp[first:last]
            rows.append(replace(t, tokens=t.tokens[: turn.end], behaviour_logp=logp, turns=(turn,)))
            first = last
    return rows


def exact_gradient(
    decoder: Decoder, config: Config, found: Sequence[Trajectory]
) -> dict[str, tuple[Tensor | None, Tensor]]:
    """The step in float64 with full logits; gradients are stored in the adapters' fp32."""
    config = replace(config, model=replace(config.model, attention="sdpa"))  # which alone takes float64
    return {"grad": (None, update(learner(exact(decoder), config), found, eager=True)["grad"].double())}


# ----------------------------------------------------------------------------------------------------------------- work


def model_flops(decoder: Decoder, num_tokens: float) -> float:
    """Forward through the layers: two operations per weight and token; attention, small here, is left out."""
    kept = ("embed_tokens", "lm_head", "lora_")
    return 2.0 * num_tokens * sum(p.numel() for n, p in decoder.named_parameters() if not any(k in n for k in kept))


def rollout_flops(decoder: Decoder, episodes: Sequence[Episode]) -> float:
    """Every token of every view once, and the head for what was sampled."""
    views = [view for episode in episodes for view in episode.views]
    head = 2.0 * decoder.head_weight.numel() * sum(len(view.logp) for view in views)
    return model_flops(decoder, sum(len(view.tokens) for view in views)) + head


def step_flops(decoder: Decoder, found: Sequence[Trajectory]) -> float:
    """Student forward and backward to its activations, teacher forward on references and replies, three products of
    the head."""
    student = sum(len(t.tokens) for t in found if t.turns)
    teacher = sum(t.num_teacher_tokens for t in found)
    rows = sum(turn.end - turn.start for t in found for turn in t.turns)
    return model_flops(decoder, 2 * student + teacher) + 6.0 * decoder.head_weight.numel() * rows


def rewarded(here: World, episodes: Sequence[Episode]) -> list[Trajectory]:
    """Rewards, weights and references of a rollout."""
    return trajectories(episodes, here.parts.config.game)
