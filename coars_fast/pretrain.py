"""Make `tiny_base`, the small model that is shipped with the package and stands in for a pretrained LLM.

    python -m coars_fast.pretrain --out coars_fast/tiny_base

A stock Qwen3-shaped decoder (3 layers of 96) with its own byte-level BPE tokenizer, trained from random weights on
lessons from many random synthetic worlds (`game/lessons.py`): reading titles, finding them in lists, the reply formats,
following a reference, and conversations of a scripted pair with systematic faults. The shipped weights are those of the
command above with `OMP_NUM_THREADS=1` (45 minutes on a core that other jobs shared). What it leaves out: anything that
a general model would know.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from coars_fast.cli import main_guard, parse
from coars_fast.config import GameConfig
from coars_fast.data.records import Lesson
from coars_fast.data.world import GENRES, KINDS, NOUNS, STYLES
from coars_fast.game.lessons import Curriculum, Draw, LessonMaker
from coars_fast.game.personas import SCORES
from coars_fast.game.prompts import BRIEF
from coars_fast.game.template import TextCodec, make_template
from coars_fast.learn.supervised import cosine, fine_tune, lesson_logp
from coars_fast.model.decoder import Decoder, DecoderConfig
from coars_fast.model.load import load_decoder, save_decoder
from coars_fast.model.tokenizer import train_tokenizer


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretrain `tiny_base` on lessons from random synthetic worlds."""

    out: str
    """Folder to write (Hugging Face layout)."""
    start: str | None = None
    """Go on from a folder that an earlier call left, with the round `first_round`."""
    first_round: int = 1
    """Round to begin with."""
    num_steps: tuple[int, int] = (3600, 3400)
    """Optimizer steps of the two rounds."""
    tokens_per_step: int = 2500
    """About this many tokens a step."""
    learning_rate: tuple[float, float] = (2e-3, 1.5e-3)
    """Peak learning rates of AdamW in the two rounds."""
    hidden_size: int = 96
    """Width."""
    num_layers: int = 3
    """Layers."""
    vocab_size: int = 1280
    """Entries of the tokenizer, 256 of them bytes."""
    seed: int = 2604
    """Draws worlds, lessons and initial weights."""


def lexicon_texts() -> list[str]:
    """What the tokenizer is trained on: every word of the world and of the prompts."""
    words = [*STYLES, *GENRES, *KINDS, *NOUNS]
    prompts = [str(v) for v in vars(BRIEF).values()]
    texts = [f" {a}" for a in words] * 20 + prompts * 20
    texts += [f"Score: {s:.2f}" for ss in SCORES.values() for s in ss] * 200
    texts += [f" {n}." for n in range(1, 21)] * 200
    texts += [
        "system\nuser\nassistant\n",
        "Kinds: Candidates: History: Items:",
        "likes popular",
        " yes, no.",
        "; \nAction: click star skip dislike",
        "Reason: Item:",
    ] * 200
    return texts


def draw_lessons(kinds: list[tuple[float, Draw]], tokens: int, rng: np.random.Generator) -> list[Lesson]:
    """Lessons of weighted kinds, about `tokens` tokens in all."""
    weights = np.array([weight for weight, _ in kinds])
    lessons: list[Lesson] = []
    while sum(len(lesson.tokens) for lesson in lessons) < tokens:
        for i in rng.choice(len(kinds), size=4, p=weights / weights.sum()):
            lessons += kinds[i][1](rng)
    return lessons


@torch.no_grad()
def share_right(decoder: Decoder, lesson: Callable[[np.random.Generator], Lesson], seed: int) -> float:
    """Share of a lesson's learned tokens (but the closing one) that get more than half of the probability."""
    rng = np.random.default_rng(seed)
    lessons = [lesson(rng) for _ in range(16)]
    logp = lesson_logp(decoder, [Lesson(tokens=x.tokens, is_answer=[*x.is_answer[:-1], False]) for x in lessons])
    return float((logp > math.log(0.5)).float().mean())


@torch.no_grad()
def skill_report(decoder: Decoder, curriculum: Curriculum) -> str:
    """Probability (geometric mean) of the right tokens per kind of lesson, on fresh lessons."""
    maker, rng = curriculum.maker, np.random.default_rng(99)
    size = maker.num_candidates
    kinds: dict[str, Callable[[], list[Lesson]]] = {
        "kinds": lambda: [maker.kinds(rng)],
        "taste": lambda: [maker.taste(rng)],
        "match": lambda: [maker.matches(rng)],
        "talk": lambda: maker.conversation(rng),
        "note": lambda: [maker.reference(rng)],
    }
    found = share_right(decoder, lambda rng: maker.retrieval(rng, size), 98)
    recommended = share_right(decoder, lambda rng: maker.recommending(rng, size, repeat=False), 97)
    return f"lists of {curriculum.longest}; of {size} finds {found:.2f} recommends {recommended:.2f}; " + " ".join(
        f"{name} {lesson_logp(decoder, [lesson for _ in range(16) for lesson in draw()]).mean().exp():.2f}"
        for name, draw in kinds.items()
    )


def new_decoder(config: PretrainConfig, vocab_size: int) -> Decoder:
    """Random weights. Norms of queries and keys start at 1.5: heads of 24 could not attend sharply to one of a hundred
    tokens otherwise."""
    shape = DecoderConfig(
        family="qwen3",
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=256,
        num_layers=config.num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        rms_norm_eps=1e-6,
        rope_theta=1000.0,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    decoder = Decoder(shape, generator=torch.Generator().manual_seed(config.seed))
    for name, parameter in decoder.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.data.fill_(1.5)
    return decoder


def pretrain(config: PretrainConfig) -> None:
    """All rounds; the folder is written every 250 steps, so that a run that is cut short leaves what it learned."""
    tokenizer = train_tokenizer(lexicon_texts(), config.vocab_size)
    codec = TextCodec(tokenizer)
    curriculum = Curriculum(LessonMaker(codec, make_template(codec), GameConfig()))
    maker, started = curriculum.maker, time.monotonic()
    if config.start:
        decoder = load_decoder(config.start).requires_grad_(True)
    else:
        decoder = new_decoder(config, len(tokenizer))
    print(f"{sum(p.numel() for p in decoder.parameters()):,} parameters, vocabulary {len(tokenizer)}")

    def play_round(number: int) -> None:
        num_steps, learning_rate = config.num_steps[number - 1], config.learning_rate[number - 1]

        def batches() -> Iterator[tuple[list[Lesson], None]]:
            for step in range(num_steps):
                kinds = curriculum.lessons(number, step / num_steps)
                rng = np.random.default_rng([config.seed, step] if number == 1 else [config.seed, number, step])
                yield draw_lessons(kinds, config.tokens_per_step, rng), None

        def progress(step: int, loss: float) -> None:
            if step % 50 == 49:
                curriculum.grow(share_right(decoder, lambda rng: maker.recommending(rng, curriculum.longest), step))
            if step % 250 == 249 or step == num_steps - 1:
                tokenizer.save_pretrained(config.out)
                save_decoder(decoder, config.out)
            if step % 100 == 0 or step == num_steps - 1:
                clock = f"round {number} step {step:5d} {time.monotonic() - started:5.0f} s"
                print(f"{clock}  loss {loss:.3f}  {skill_report(decoder, curriculum)}", flush=True)

        schedule = cosine(hold=0.6 if number == 1 else 0.3)
        fine_tune(
            decoder, batches(), num_steps=num_steps, learning_rate=learning_rate, schedule=schedule, progress=progress
        )

    for number in range(config.first_round, 3):
        if number > 1:
            curriculum.longest = maker.num_candidates
        play_round(number)


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    pretrain(parse(PretrainConfig, argv, "python -m coars_fast.pretrain"))


if __name__ == "__main__":
    main()
