"""Play episodes, or ask one agent many things, with a decoder's rollout engine.

A token depends on the seed, its episode's number and its position, never on the batch: noise is counter-based
(`coars_kernels.sample_with_logprob`). Log-probs are recorded when a token is sampled.

Engines are kept with their decoders, so that memory and captured graphs last from one call to the next.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from coars_fast.game.episode import Episode, Reply
from coars_fast.model.decoder import Decoder
from coars_fast.rollout.drafts import CERTAIN
from coars_fast.rollout.engine import PAGE_SIZE, Engine
from coars_fast.rollout.grammar import episode_endings, reply_grammar
from coars_fast.rollout.protocols import Conversation
from coars_fast.rollout.sampling import Constraint, Sampling
from coars_fast.rollout.scheduler import Scheduler, check_conversations
from coars_fast.rollout.scoring import Branch
from coars_fast.rollout.statistics import Statistics

Progress = Callable[[int, int], None]


SHARE = 1 / 3
"""Of the free memory that keys and values may take where `rollout.kv_gib` does not say: a training step comes after."""


class _Engines(dict[str, Engine]):
    """A decoder's engines by their attention, kept on the decoder: they go when it goes, and its copies have none."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Engines:
        return _Engines()

    def __reduce__(self) -> Any:
        return _Engines, ()


def play(
    decoder: Decoder,
    episodes: Sequence[Episode],
    *,
    seed: int,
    temperature: float,
    max_reply_tokens: int,
    batch_size: int,
    resample_invalid: bool = False,
    constrained: bool = False,
    kv_gib: float | None = None,
    attention: str = "auto",
    branches: Callable[[int, Episode], Sequence[Branch]] | None = None,
    progress: Progress | None = None,
    watch: Callable[[Statistics], None] | None = None,
) -> Statistics:
    """Play episodes to their end; they hold the outcome.

    Args:
        decoder: model with both adapters.
        episodes: fresh ones; episode i of this list draws its noise from (seed, i, position).
        seed: of the sampling noise.
        temperature: 1 in training; 0 is greedy.
        max_reply_tokens: longer replies are cut and invalid.
        batch_size: episodes at the same time.
        resample_invalid: draw an invalid reply once more (at temperature 1), as an evaluation does.
        constrained: hold replies to their format; log-probs are then those of what was allowed.
        kv_gib: memory for keys and values; None takes what the episodes need, up to a third of what is free.
        attention: as for `Engine`.
        branches: of episode i, once it is over, what is to be scored before this returns (see `teacher.py`).
        progress: called with (episodes done, episodes).
        watch: called with the figures so far.

    Raises:
        ConfigError: an episode that may not fit the model's positions or the memory, with its size and the limit; or an
            adapter, an attention or a token that is not there. Before anything is played.
    """

    def constraint(conversation: Conversation) -> Constraint:
        assert isinstance(conversation, Episode)
        endings = episode_endings(conversation)
        return reply_grammar(conversation.codec, conversation.template, endings, max_reply_tokens)

    return _run(
        decoder,
        episodes,
        sampling=Sampling(seed=seed, control=episodes[0].template.control if episodes else frozenset()),
        temperature=temperature,
        max_reply_tokens=max_reply_tokens,
        batch_size=batch_size,
        noise_id=lambda number, agent, attempt: (number * 2 + agent) * 2 + attempt,
        resample_invalid=resample_invalid,
        constraint=constraint if constrained else None,
        kv_gib=kv_gib,
        attention=attention,
        branches=branches,
        progress=progress,
        watch=watch,
        forms=episodes[0].reply_forms() if episodes else (),
    )


@dataclass
class _View:
    tokens: list[int]


@dataclass
class Question:
    """A conversation of a single reply."""

    agent: int
    prompt: list[int]
    valid: Callable[[Reply], bool]
    reply: Reply | None = None
    views: tuple[_View, _View] = field(init=False)

    def __post_init__(self) -> None:
        views = [_View([]), _View([])]
        views[self.agent] = _View(self.prompt)
        self.views = (views[0], views[1])

    @property
    def waiting(self) -> int | None:
        """See `Conversation`."""
        return self.agent if self.reply is None else None

    def is_valid(self, reply: Reply) -> bool:
        """See `Conversation`."""
        return self.valid(reply)

    def receive(self, reply: Reply) -> None:
        """See `Conversation`."""
        self.reply = reply

    def longest_views(self, max_reply_tokens: int) -> tuple[int, int]:
        """See `Conversation`."""
        lengths = [0, 0]
        lengths[self.agent] = len(self.prompt) + max_reply_tokens
        return lengths[0], lengths[1]


def ask(
    decoder: Decoder,
    prompts: Sequence[list[int]],
    agent: int,
    *,
    control: frozenset[int],
    is_valid: Callable[[Reply], bool],
    seed: int,
    temperature: float,
    max_reply_tokens: int,
    batch_size: int,
    constraint: Callable[[], Constraint] | None = None,
    kv_gib: float | None = None,
    attention: str = "auto",
    progress: Progress | None = None,
) -> list[Reply]:
    """One reply to each prompt; one that is not valid is drawn once more, at temperature 1.

    Args:
        decoder: model with both adapters.
        prompts: tokens, the agent's open header last; prompt i draws its noise from (seed, i, position).
        agent: who answers.
        control: tokens that end a reply.
        is_valid: whether a reply can be used.
        constraint: makes what holds a reply to its format.
        seed, temperature, max_reply_tokens, batch_size, kv_gib, attention, progress: as for `play`.
    """
    questions = [Question(agent, prompt, is_valid) for prompt in prompts]
    _run(
        decoder,
        questions,
        sampling=Sampling(seed=seed, control=control),
        temperature=temperature,
        max_reply_tokens=max_reply_tokens,
        batch_size=batch_size,
        noise_id=lambda number, agent, attempt: number * 2 + attempt,
        resample_invalid=True,
        constraint=None if constraint is None else lambda conversation: constraint(),
        kv_gib=kv_gib,
        attention=attention,
        progress=progress,
        watch=None,
    )
    return [question.reply for question in questions if question.reply is not None]


def _run(
    decoder: Decoder,
    conversations: Sequence[Conversation],
    *,
    sampling: Sampling,
    max_reply_tokens: int,
    batch_size: int,
    kv_gib: float | None,
    attention: str,
    progress: Progress | None,
    watch: Callable[[Statistics], None] | None,
    forms: Iterable[tuple[int, list[int]]] = (),
    **options: Any,
) -> Statistics:
    """`forms`: by agent, tokens that its replies hold, whatever they say."""
    if not conversations:
        return Statistics(0, 0, 0)
    engine = _engine(decoder, conversations, max_reply_tokens, batch_size, kv_gib, attention)
    positions = decoder.config.max_position_embeddings
    check_conversations(conversations, engine.pool, positions, max_reply_tokens)

    def tell(figures: Statistics) -> None:
        if progress:
            progress(figures.done, figures.conversations)
        if watch:
            watch(figures)

    if engine.drafter is not None:
        engine.drafter.clear()
        for agent, tokens in forms:
            engine.drafter.learn(agent, tokens, 1, times=CERTAIN)
    return Scheduler(
        engine, conversations, sampling=sampling, max_reply_tokens=max_reply_tokens, batch_size=batch_size, watch=tell,
        **options,
    ).run()  # fmt: skip


def _engine(
    decoder: Decoder,
    conversations: Sequence[Conversation],
    max_reply_tokens: int,
    batch_size: int,
    kv_gib: float | None,
    attention: str,
) -> Engine:
    """The decoder's engine of this kind of attention, with a memory for these conversations."""
    shape, head = decoder.config, decoder.head_weight
    page_size = PAGE_SIZE.get(head.device.type, 16)
    page_bytes = shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim * page_size * head.dtype.itemsize
    # Both views of as many as play at the same time, with a page each for what is copied of a shared prompt.
    needs = [sum(2 + n // page_size for n in c.longest_views(max_reply_tokens)) for c in conversations]
    needed = sum(sorted(needs, reverse=True)[:batch_size])
    known: _Engines = vars(decoder).setdefault("_rollout_engines", _Engines())
    engine = known.get(attention)
    if engine is not None and (engine.device, engine.pool.kv.dtype) != (head.device, head.dtype):
        engine = None
    held = 0 if engine is None else engine.pool.num_pages
    # What an engine holds counts as free, or the share would be another at every call.
    free = SHARE * (_free_bytes(head.device) + held * page_bytes) if kv_gib is None else kv_gib * 2**30
    # A little more than is needed now, so that the next call's slightly longer conversations fit as well.
    num_pages = max(1, min(needed + needed // 4, int(free // page_bytes)))
    if engine is not None and (kv_gib is None or held * page_bytes <= free):
        little_more = num_pages <= held + held // 4 and max(needs) <= held
        if needed <= held or num_pages <= held or little_more:
            engine.refresh()
            return engine
    replaced, engine = known.pop(attention, None) is not None, None
    if replaced:  # before memory is taken; what a reference cycle holds would be there beside the new
        gc.collect()
        if head.is_cuda:
            torch.cuda.empty_cache()
    made = Engine(decoder, num_pages=num_pages, page_size=page_size, attention=attention)
    known[attention] = made
    return made


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # not every system says; `kv_gib` does
        return 8 * 2**30
