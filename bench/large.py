"""A model of a given shape with random weights, made on the device, and what a rollout and a step give it to do.

Nothing is downloaded: at `h100` the shape is Qwen2.5-7B's, in bf16, within 80 GB. Conversations are random tokens of
fixed lengths (a random model ends no reply by itself), adapters are fresh. `CachedPrompts` alone knows the rollout
engine. Left out: tokenizers, and conversations that mean something (`bench/loops.py`).

Shape suffixes: B sequences, T tokens of a prompt, n new tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.exact import exact_logp
from bench.harness import Result
from coars_fast.config import Config, LossConfig, ModelConfig, TrainConfig
from coars_fast.data.records import TrainedTurn, Trajectory
from coars_fast.learn.packing import pack
from coars_fast.model.attention import PackedAttention
from coars_fast.model.config import DecoderConfig
from coars_fast.model.decoder import Decoder
from coars_fast.model.lora import add_adapters
from coars_fast.rollout.engine import PAGE_SIZE, Engine
from coars_fast.rollout.sampling import PartialReply, Sampling
from coars_kernels import linear_logprob

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OTHER_EPISODES = 1e-6
"""Weight of every turn but the first episode's: they are computed like all, and the gradient is that of one episode,
which can be computed in float64 beside a large model."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Lengths in tokens of an agent's view."""

    prompt: int
    reply: int
    partner: int
    reference: int
    turns: int


@dataclass(frozen=True, kw_only=True)
class Size:
    """A shape and what is done with it."""

    name: str
    decoder: DecoderConfig
    lora_rank: int
    decode: tuple[tuple[int, int], ...]
    """(rows, tokens in the cache) of the cases of decoding."""
    new_tokens: int
    """Decoded in one timed call."""
    step: Conversation
    step_episodes: int
    iteration: Conversation
    iteration_episodes: int


SIZES = {
    "smoke": Size(
        name="tiny shape",
        decoder=DecoderConfig(
            family="qwen2", vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4,
            num_kv_heads=2, head_dim=16, attention_bias=True,
        ),
        lora_rank=4, decode=((4, 48),), new_tokens=4,
        step=Conversation(prompt=48, reply=6, partner=4, reference=8, turns=2), step_episodes=2,
        iteration=Conversation(prompt=48, reply=6, partner=0, reference=8, turns=1), iteration_episodes=2,
    ),
    "cpu": Size(
        name="55M shape",
        decoder=DecoderConfig(
            family="qwen3", vocab_size=32000, hidden_size=512, intermediate_size=1536, num_layers=12, num_heads=8,
            num_kv_heads=4, head_dim=64, tie_word_embeddings=True,
        ),
        lora_rank=8, decode=((4, 200), (16, 200)), new_tokens=8,
        step=Conversation(prompt=120, reply=12, partner=8, reference=15, turns=5), step_episodes=2,
        iteration=Conversation(prompt=120, reply=12, partner=0, reference=15, turns=1), iteration_episodes=4,
    ),
    "h100": Size(
        name="Qwen2.5-7B shape",
        decoder=DecoderConfig(
            family="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28,
            num_kv_heads=4, head_dim=128, rope_theta=1e6, attention_bias=True,
        ),
        lora_rank=32, decode=((32, 2000), (256, 2000)), new_tokens=16,
        step=Conversation(prompt=1200, reply=120, partner=80, reference=150, turns=5), step_episodes=2,
        iteration=Conversation(prompt=1200, reply=32, partner=0, reference=150, turns=1), iteration_episodes=4,
    ),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- model


def skeleton(config: DecoderConfig) -> Decoder:
    """A decoder without memory, for counting."""
    with torch.device("meta"):
        return Decoder(config)


@cache
def model(size: Size, dtype: torch.dtype) -> Decoder:
    """Random weights of Hugging Face's scale, drawn on the device; fresh adapters of both agents. One per process."""
    decoder = skeleton(size.decoder).to(dtype).to_empty(device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    add_adapters(decoder, rank=size.lora_rank, alpha=2.0 * size.lora_rank)
    decoder.gradient_checkpointing = True
    return decoder


def settings() -> Config:
    """Of a learner whose gradient is a sum over turns, so that a part of it can be checked alone."""
    return Config(
        model=ModelConfig(),
        loss=LossConfig(baseline="none", credit_center=False),
        train=TrainConfig(warmup_steps=0, max_tokens=2**20, max_grad_norm=1e30),
    )


# ------------------------------------------------------------------------------------------------------------ decoding


class Player(Protocol):
    """Keeps prompts cached and continues them."""

    def decode(self, num_tokens: int) -> Result:
        """`num_tokens` sampled after each prompt, always from its end: "tokens" [B, n] and "logp" [B * n]."""
        ...


@dataclass
class Prompts:
    """Sequences of one length, by turns of both agents, and whoever keeps them cached."""

    decoder: Decoder
    tokens: list[list[int]]
    agents: list[int]
    players: dict[Any, Player] = field(default_factory=dict)

    def player(self, kind: Callable[[Prompts], Player]) -> Player:
        """The player of a kind, made when it is first asked for; its memory goes when the prompts do."""
        if kind not in self.players:
            self.players[kind] = kind(self)
        return self.players[kind]


def random_prompts(decoder: Decoder, rows: int, length: int, seed: int) -> Prompts:
    """`rows` prompts of `length` random tokens."""
    generator = random.Random(seed)
    vocab = decoder.config.vocab_size
    tokens = [[generator.randrange(vocab) for _ in range(length)] for _ in range(rows)]
    return Prompts(decoder, tokens, [row % 2 for row in range(rows)])


class CachedPrompts:
    """Prompts whose keys and values are in the rollout engine's memory, continued again and again from their ends."""

    def __init__(self, prompts: Prompts):
        self.prompts, rows, self.length = prompts, len(prompts.tokens), len(prompts.tokens[0])
        page_size = PAGE_SIZE[torch.device(DEVICE).type]
        pages = rows * -(-(self.length + 64) // page_size)
        self.engine = Engine(prompts.decoder, num_pages=pages, page_size=page_size, guess=False)
        self.sequences = [self.engine.pool.new() for _ in range(rows)]
        # All but the last token: decoding begins with that one.
        self.engine.extend(self.sequences, [tokens[:-1] for tokens in prompts.tokens], prompts.agents)

    def decode(self, num_tokens: int) -> Result:
        """See `Player`."""
        replies = []
        for row, (sequence, tokens) in enumerate(zip(self.sequences, self.prompts.tokens, strict=True)):
            self.engine.pool.truncate(sequence, self.length - 1)
            replies.append(PartialReply(sequence, tokens, self.prompts.agents[row], noise_id=row, limit=num_tokens))
        while not replies[0].over:  # all are of one length
            self.engine.decode(replies, Sampling(seed=0, control=frozenset()))
        logp = [value for reply in replies for value in reply.logp]
        return {"tokens": torch.tensor([reply.ids for reply in replies]), "logp": torch.tensor(logp)}


@cache
def in_transformers(decoder: Decoder) -> Any:
    """The base in the transformers package, on the same memory. Fresh adapters are zero: it says the same."""
    import transformers

    fields = {name: value for name, value in decoder.config.to_hf().items() if name != "architectures"}
    config = transformers.AutoConfig.for_model(**fields)
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=decoder.head_weight.dtype)
    state = {name: tensor for name, tensor in decoder.state_dict().items() if ".lora_" not in name}
    made.load_state_dict(state, strict=False, assign=True)
    made.tie_weights()
    made.model.rotary_emb = type(made.model.rotary_emb)(config=config).to(DEVICE)  # its buffer is in no checkpoint
    left = [name for name, tensor in made.named_parameters() if tensor.is_meta]
    assert not left, left
    return made.eval()


class CachedByTransformers:
    """The same by the transformers package and its growing cache, with torch's own generator."""

    def __init__(self, prompts: Prompts):
        import transformers

        self.model = in_transformers(prompts.decoder)
        self.cache = transformers.DynamicCache(config=self.model.config)
        self.ids = torch.tensor(prompts.tokens, device=DEVICE)
        with torch.no_grad():
            self.model(input_ids=self.ids[:, :-1], past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def decode(self, num_tokens: int) -> Result:
        """See `Player`."""
        added = self.cache.get_seq_length() - (self.ids.shape[1] - 1)
        if added:
            self.cache.crop(-added)
        tokens, logps, last = [], [], self.ids[:, -1:]
        for _ in range(num_tokens):
            logits = self.model(input_ids=last, past_key_values=self.cache, use_cache=True).logits[:, -1].float()
            last = torch.multinomial(torch.softmax(logits, -1), 1)
            logps.append(torch.log_softmax(logits, -1).gather(1, last)[:, 0])
            tokens.append(last[:, 0])
        return {"tokens": torch.stack(tokens, 1).cpu(), "logp": torch.stack(logps, 1).flatten().cpu()}


def exact_replies(prompts: Prompts, result: Result) -> dict[str, tuple[Tensor | None, Tensor]]:
    """Float64 log-probs of what was sampled after the first and the last prompt."""
    tokens, rows, values = result["tokens"], [], []
    count = tokens.shape[1]
    for row in sorted({0, len(prompts.tokens) - 1}):
        prompt = prompts.tokens[row]
        whole = torch.tensor(prompt + tokens[row].tolist(), device=DEVICE)
        places = torch.arange(len(prompt), len(whole), device=DEVICE)
        values.append(exact_logp(prompts.decoder, whole, places, prompts.agents[row]).cpu())
        rows.append(torch.arange(row * count, (row + 1) * count))
    return {"logp": (torch.cat(rows), torch.cat(values))}


def decode_bytes(config: DecoderConfig, rows: int, length: int, new_tokens: int, itemsize: int) -> float:
    """Read from memory: every weight but the embedding's once a token, and the keys and values of all rows."""
    body = skeleton(config)
    unread = 0 if body.lm_head is None else body.model.embed_tokens.weight.numel()
    weights = sum(parameter.numel() for parameter in body.parameters()) - unread
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return itemsize * (new_tokens * weights + per_token * rows * sum(range(length, length + new_tokens)))


def cache_bytes(config: DecoderConfig, rows: int, length: int, itemsize: int) -> int:
    """Keys and values of `rows` sequences."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize * rows * length


# ------------------------------------------------------------------------------------------------------------- training


def random_trajectories(vocab: int, shape: Conversation, episodes: int, seed: int) -> list[Trajectory]:
    """Both agents' views of conversations of random tokens; behaviour log-probs are those of a uniform model."""
    generator = random.Random(seed)
    return [_trajectory(generator, vocab, shape, episode, agent) for episode in range(episodes) for agent in range(2)]


def _trajectory(generator: random.Random, vocab: int, shape: Conversation, episode: int, agent: int) -> Trajectory:
    def text(count: int) -> list[int]:
        return [generator.randrange(vocab) for _ in range(count)]

    tokens, turns = text(shape.prompt), []
    for number in range(shape.turns):
        if number:
            tokens += text(shape.partner)
        start = len(tokens)
        tokens += text(shape.reply)
        turn = TrainedTurn(
            fork=start - 1, start=start, end=len(tokens), reward=generator.choice((-1.0, 0.5, 1.0)),
            weight=OTHER_EPISODES if episode else 1.0, reference=(*text(shape.reference), tokens[start - 1]),
        )  # fmt: skip
        turns.append(turn)
    uniform = (-float(torch.tensor(float(vocab)).log()),) * (shape.turns * shape.reply)
    return Trajectory(episode=episode, agent=agent, tokens=tuple(tokens), behaviour_logp=uniform, turns=tuple(turns))


@torch.no_grad()
def as_spoken(decoder: Decoder, found: Sequence[Trajectory]) -> list[Trajectory]:
    """The trajectories with the log-probs that the model gives them now, as if it had sampled them."""
    batch = pack(found).to(DEVICE)
    hidden = decoder(batch.token_ids, batch.position_ids, PackedAttention(batch.cu_seqlens), batch.agent_ids)
    values: Iterator[float] = iter(linear_logprob(hidden[batch.rows], decoder.head_weight, batch.target).tolist())
    return [replace(t, behaviour_logp=tuple(next(values) for _ in t.behaviour_logp)) for t in found]


def first_episode(found: Sequence[Trajectory]) -> list[Trajectory]:
    """What alone counts in the gradient."""
    return [t for t in found if t.episode == 0]


def played(prompts: Prompts, shape: Conversation, result: Result, seed: int) -> list[Trajectory]:
    """The one-turn trajectories of what a player said after each prompt, both agents of an episode side by side."""
    likes = random_trajectories(prompts.decoder.config.vocab_size, shape, len(prompts.tokens) // 2, seed)
    replies, logp = result["tokens"].tolist(), result["logp"].view(len(likes), -1).tolist()
    return [
        replace(like, tokens=(*prompt, *reply), behaviour_logp=tuple(values))
        for like, prompt, reply, values in zip(likes, prompts.tokens, replies, logp, strict=True)
    ]
