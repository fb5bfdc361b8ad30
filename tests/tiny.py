"""Tiny things for tests of playing and learning: a tokenizer, random and taught models, tasks, scripted episodes,
settings.

A random model nearly always gives unreadable replies. Where a test needs conversations, `scripted_episodes` lets the
personas of the synthetic world speak and records the log-probs that a decoder gives their words; where it needs a model
that speaks for itself, `teach` fine-tunes one on the world's lessons for a few seconds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coars_fast.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    GameConfig,
    ModelConfig,
    RolloutConfig,
    SASRecConfig,
    SFTConfig,
    TrainConfig,
    WorldConfig,
)
from coars_fast.data.records import Lesson, Task, Trajectory
from coars_fast.data.world import draw_titles
from coars_fast.game import personas
from coars_fast.game.episode import RECOMMENDER, Episode, Reply
from coars_fast.game.prompts import format_judgement
from coars_fast.game.template import TextCodec, TokenTemplate, make_template
from coars_fast.game.trajectory import trajectories
from coars_fast.learn.supervised import lesson_logp
from coars_fast.model.attention import PackedAttention
from coars_fast.model.decoder import Decoder, DecoderConfig
from coars_fast.model.load import save_decoder
from coars_fast.model.lora import add_adapters
from coars_fast.model.tokenizer import train_tokenizer
from coars_fast.pretrain import PretrainConfig, lexicon_texts

GAME = GameConfig(max_turns=3)
NUM_CANDIDATES, HISTORY_LENGTH = 5, 3
TITLES = tuple(draw_titles(40, np.random.default_rng(3)))


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """ChatML byte-level BPE as `tiny_base` has: every word of the world is one token."""
    return train_tokenizer(lexicon_texts(), PretrainConfig(out="").vocab_size)


@lru_cache(maxsize=1)
def tokens() -> tuple[TextCodec, TokenTemplate]:
    """Codec and template of `tokenizer`."""
    codec = TextCodec(tokenizer())
    return codec, make_template(codec)


def tiny_shape(**changes: Any) -> DecoderConfig:
    """Two Qwen3-shaped layers with grouped heads."""
    fields: dict[str, Any] = {
        "family": "qwen3", "vocab_size": len(tokenizer()), "hidden_size": 32, "intermediate_size": 64, "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "tie_word_embeddings": True, "max_position_embeddings": 1024,
    }  # fmt: skip
    return DecoderConfig(**(fields | changes))


def random_decoder(seed: int = 0, *, adapters: bool = True, scale: float = 0.12, **changes: Any) -> Decoder:
    """Random weights, large enough that context shows in the log-probs; adapters whose B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(tiny_shape(**changes), generator=generator)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, scale, generator=generator)
    if adapters:
        add_adapters(decoder, rank=4, alpha=8.0, seed=seed)
        randomise_adapters(decoder, seed)
    return decoder


@torch.no_grad()
def randomise_adapters(decoder: Decoder, seed: int = 0, scale: float = 0.1) -> None:
    """Give both adapters an effect of their own: fresh ones start with B = 0."""
    generator = torch.Generator().manual_seed(seed + 1000)
    for name, parameter in decoder.named_parameters():
        if ".lora_b." in name:
            parameter.normal_(0.0, scale, generator=generator)


# ------------------------------------------------------------------------------------------------------------ episodes


def make_task(seed: int) -> Task:
    """A task over `TITLES`: 3 items of history, 5 candidates with the truth among them."""
    rng = np.random.default_rng([seed, 5])
    picks = [int(i) for i in rng.permutation(len(TITLES))[: HISTORY_LENGTH + NUM_CANDIDATES]]
    candidates = tuple(picks[HISTORY_LENGTH:])
    return Task(
        user=seed,
        history=tuple(picks[:HISTORY_LENGTH]),
        target=int(rng.choice(candidates)),
        candidates=candidates,
        peer_counts=tuple(int(n) for n in rng.integers(0, 6, NUM_CANDIDATES)),
        num_peers=5,
        peer_similarity=0.4,
    )


def new_episode(seed: int, game: GameConfig = GAME) -> Episode:
    return Episode(make_task(seed), TITLES, *tokens(), game)


def say(text: str) -> Reply:
    """A reply that ends as it should, with log-probs still to be found."""
    codec, template = tokens()
    ids = (*codec.encode(text), template.end_of_turn)
    return Reply(ids, (0.0,) * len(ids))


def scripted_episodes(decoder: Decoder, count: int, *, seed: int = 0, game: GameConfig = GAME) -> list[Episode]:
    """Finished conversations of the world's personas; log-probs are what the decoder gives their words."""
    rng = np.random.default_rng([seed, 9])
    episodes = [new_episode(seed * 1000 + n, game) for n in range(count)]
    for episode in episodes:
        history = [TITLES[i] for i in episode.task.history]
        tried: set[str] = set()
        while episode.waiting is not None:
            if episode.waiting == RECOMMENDER:
                text = personas.recommend(history, episode.candidate_titles, tried, rng)
            else:
                item = episode.turns[-1].item
                assert item is not None
                tried.add(TITLES[item])
                text = personas.judge(history, TITLES[item], rng)
            episode.receive(say(text))
        record_logp(decoder, episode)
    return episodes


@torch.no_grad()
def record_logp(decoder: Decoder, episode: Episode) -> None:
    """Replace an episode's log-probs by the decoder's own."""
    for agent, view in enumerate(episode.views):
        logp = sequence_logp(decoder, view.tokens, agent)
        view.logp[:] = [float(logp[p - 1]) for span in view.spans for p in range(span.start, span.end)]


def sequence_logp(decoder: Decoder, ids: Sequence[int], agent: int | None) -> Tensor:
    """[L-1] log-prob of each token after the first: one sequence, one forward pass, a full softmax."""
    token_ids = torch.tensor(list(ids))
    attend = PackedAttention(torch.tensor([0, len(ids)], dtype=torch.int32))
    agent_ids = None if agent is None else torch.full((len(ids),), agent, dtype=torch.int8)
    hidden = decoder(token_ids, torch.arange(len(ids)), attend, agent_ids)
    logits = hidden[:-1].float() @ decoder.head_weight.T.float()
    return logits.log_softmax(-1).gather(1, token_ids[1:, None])[:, 0]


def scripted_trajectories(
    decoder: Decoder, count: int = 4, *, seed: int = 0, game: GameConfig = GAME
) -> list[Trajectory]:
    """Trajectories of scripted episodes, rewards and references as in training."""
    return trajectories(scripted_episodes(decoder, count, seed=seed, game=game), game)


def shifted(found: Sequence[Trajectory], noise: float, seed: int = 0) -> list[Trajectory]:
    """The same trajectories as if sampled by other weights: importance ratios other than 1, by token and by turn."""
    rng = np.random.default_rng(seed)
    moved = []
    for t in found:
        lengths = [turn.end - turn.start for turn in t.turns]
        offsets = np.repeat(rng.normal(0, 2 * noise, len(lengths)), lengths) + rng.normal(0, noise, sum(lengths))
        moved.append(replace(t, behaviour_logp=tuple((np.array(t.behaviour_logp) + offsets).tolist())))
    return moved


# -------------------------------------------------------------------------------------------------------------- models


def teach(decoder: Decoder, num_steps: int = 120, seed: int = 0, learning_rate: float = 1e-2) -> None:
    """Fine-tune on short replies in the right format, drawn at random, until most of its own are readable."""
    game = replace(GAME, max_turns=2)

    def lessons(number: int) -> Iterator[Lesson]:
        rng = np.random.default_rng([seed, number])
        episode = new_episode(int(rng.integers(10**6)), game)
        while episode.waiting is not None:
            if episode.waiting == RECOMMENDER:
                episode.receive(say(f"Reason: try this.\nItem: {rng.integers(1, NUM_CANDIDATES + 1)}."))
            else:
                action = str(rng.choice(personas.ACTIONS))
                score = float(rng.choice(personas.SCORES[action]))
                episode.receive(say(format_judgement("no.", action, score)))
        for view in episode.views:
            is_answer = [False] * len(view.tokens)
            for span in view.spans:
                is_answer[span.start : span.end] = [True] * (span.end - span.start)
            yield Lesson(tokens=view.tokens, is_answer=is_answer)

    optimizer = torch.optim.AdamW(decoder.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / 10, 4 * (1 - step / num_steps))
        loss = -lesson_logp(decoder, [lesson for n in range(6) for lesson in lessons(6 * step + n)]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()


@lru_cache(maxsize=1)
def _taught() -> Decoder:
    decoder = random_decoder(adapters=False, scale=0.05)
    teach(decoder)
    return decoder


def taught_decoder(*, adapters: bool = True, seed: int = 0) -> Decoder:
    """A copy of the model that was taught once in this process, with adapters that change it a little."""
    decoder = copy.deepcopy(_taught())
    if adapters:
        add_adapters(decoder, rank=4, alpha=8.0, seed=seed)
        randomise_adapters(decoder, seed, scale=0.02)
    return decoder


def write_model(folder: Path, decoder: Decoder) -> Path:
    """A model folder as `--model.path` takes it."""
    tokenizer().save_pretrained(folder)
    save_decoder(decoder, folder)
    return folder


# ------------------------------------------------------------------------------------------------------------ settings


def tiny_config(**changes: Any) -> Config:
    """A configuration whose whole run takes seconds."""
    return replace(
        Config(
            data=DataConfig(candidates="random4+gt", history_length=HISTORY_LENGTH, num_eval_users=4),
            world=WorldConfig(num_items=60, num_users=24, interactions_per_user=16),
            sasrec=SASRecConfig(num_epochs=1, hidden_size=16, num_layers=1, num_heads=1),
            model=ModelConfig(lora_rank=4, lora_alpha=8.0),
            game=GameConfig(max_turns=2),
            rollout=RolloutConfig(max_reply_tokens=28, batch_size=16),
            train=TrainConfig(num_steps=2, episodes_per_step=4, warmup_steps=0, learning_rate=1e-3),
            sft=SFTConfig(num_steps=2, batch_size=2),
            checkpoint=CheckpointConfig(every=1, keep=5),
            eval=EvalConfig(every=0, num_bootstrap=20, num_disc_users=1),
        ),
        **changes,
    )


TINY_FLAGS: dict[str, str] = {
    "data.candidates": "random4+gt",
    "data.history-length": str(HISTORY_LENGTH),
    "data.num-eval-users": "4",
    "world.num-items": "60",
    "world.num-users": "24",
    "world.interactions-per-user": "16",
    "sasrec.num-epochs": "1",
    "sasrec.hidden-size": "16",
    "model.lora-rank": "4",
    "game.max-turns": "2",
    "rollout.max-reply-tokens": "28",
    "train.num-steps": "2",
    "train.episodes-per-step": "4",
    "train.learning-rate": "2e-3",
    "train.warmup-steps": "0",
    "sft.num-steps": "2",
    "sft.batch-size": "2",
    "checkpoint.every": "1",
    "checkpoint.keep": "9",
    "eval.every": "0",
    "eval.num-bootstrap": "20",
    "eval.num-disc-users": "1",
}


def arguments(**changes: Any) -> list[str]:
    """Command-line arguments of a tiny run; keywords with `__` for the dot (`train__num_steps=3`); None drops a flag,
    True and False are switches."""
    flags: dict[str, Any] = dict(TINY_FLAGS)
    for name, value in changes.items():
        flags[name.replace("__", ".").replace("_", "-")] = value
    found: list[str] = []
    for name, value in flags.items():
        if isinstance(value, bool):
            section, _, last = name.rpartition(".")
            found.append(f"--{name}" if value else f"--{section + '.' if section else ''}no-{last}")
        elif value is not None:
            found += [f"--{name}", str(value)]
    return found
