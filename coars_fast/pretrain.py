"""Make `tiny_base`, the small model that is shipped with the package and stands in for a pretrained LLM.

    python -m coars_fast.pretrain --out coars_fast/tiny_base

A stock Qwen3-shaped decoder (3 layers of 96) with its own byte-level BPE tokenizer, trained from random weights on lessons
from many random synthetic worlds (`game/lessons.py`): reading titles, finding them in lists, the reply formats, following a
reference, and conversations of a scripted pair with systematic faults. Same seed, same number of threads: same weights.
What it leaves out: anything that a general model would know.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from coars_fast.config import GameConfig
from coars_fast.game.lessons import Lesson, LessonMaker, curriculum
from coars_fast.game.template import TextCodec, make_template
from coars_fast.model.attention import PackedAttention
from coars_fast.model.decoder import Decoder, DecoderConfig
from coars_fast.model.tokenizer import train_tokenizer


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretrain `tiny_base` on lessons from random synthetic worlds."""

    out: str
    """Folder to write (Hugging Face layout)."""
    num_steps: int = 4500
    """Optimizer steps."""
    tokens_per_step: int = 6000
    """About this many tokens a step."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    hidden_size: int = 96
    """Width."""
    num_layers: int = 3
    """Layers."""
    vocab_size: int = 704
    """Entries of the tokenizer, 256 of them bytes."""
    seed: int = 2604
    """Draws worlds, lessons and initial weights."""


def lexicon_texts() -> list[str]:
    """What the tokenizer is trained on: every word of the world and of the prompts."""
    from coars_fast.data.world import GENRES, STYLES
    from coars_fast.game.personas import SCORES
    from coars_fast.game.prompts import BRIEF

    words = [w for group in (STYLES, GENRES) for name, ws in group.items() for w in (name, *ws)]
    prompts = [str(v) for v in vars(BRIEF).values()]
    texts = [f" {a}" for a in words] * 20 + prompts * 20
    texts += [f"Score: {s:.2f}" for ss in SCORES.values() for s in ss] * 200
    texts += [f" {n}." for n in range(1, 21)] * 200
    texts += ["system\nuser\nassistant\n", "Kinds: Candidates: History: Items:", "likes popular", " yes, no.", "; \nAction: click star skip dislike", "Reason: Item:"] * 200
    return texts


def draw_lessons(maker: LessonMaker, progress: float, tokens: int, rng: np.random.Generator) -> list[Lesson]:
    """Lessons of about `tokens` tokens in all."""
    kinds = curriculum(maker, progress)
    weights = np.array([w for w, _ in kinds])
    lessons: list[Lesson] = []
    while sum(len(lesson.tokens) for lesson in lessons) < tokens:
        for i in rng.choice(len(kinds), size=8, p=weights / weights.sum()):
            lessons += kinds[i][1](rng)
    return lessons


def lesson_loss(decoder: Decoder, lessons: list[Lesson]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of the answers' tokens, and the share predicted right."""
    lengths = [len(lesson.tokens) for lesson in lessons]
    tokens = torch.tensor([t for lesson in lessons for t in lesson.tokens])
    answer = torch.tensor([a for lesson in lessons for a in lesson.is_answer])
    positions = torch.cat([torch.arange(n) for n in lengths])
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    hidden = decoder(tokens, positions, PackedAttention(bounds))
    rows = answer.nonzero()[:, 0]
    logits = hidden[rows - 1] @ decoder.head_weight.T
    return F.cross_entropy(logits, tokens[rows]), (logits.argmax(-1) == tokens[rows]).float().mean()


def pretrain(config: PretrainConfig) -> None:
    tokenizer = train_tokenizer(lexicon_texts(), config.vocab_size)
    codec = TextCodec(tokenizer)
    maker = LessonMaker(codec, make_template(codec), GameConfig())
    generator = torch.Generator().manual_seed(config.seed)
    shape = DecoderConfig(
        family="qwen3",
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=256,
        num_layers=config.num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    decoder = Decoder(shape, generator=generator)
    print(f"{sum(p.numel() for p in decoder.parameters()):,} parameters, vocabulary {len(tokenizer)}")
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    started = time.time()
    for step in range(config.num_steps):
        progress = step / config.num_steps
        rate = min(1.0, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * max(0.0, progress - 0.3) / 0.7)))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate
        lessons = draw_lessons(maker, progress, config.tokens_per_step, np.random.default_rng([config.seed, step]))
        loss, right = lesson_loss(decoder, lessons)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == config.num_steps - 1:
            skills = skill_report(decoder, maker, progress)
            print(f"step {step:5d} {time.time() - started:6.0f} s  loss {loss:.3f}  right {right:.3f}  {skills}", flush=True)
    out = Path(config.out)
    save(decoder, tokenizer, out)


@torch.no_grad()
def skill_report(decoder: Decoder, maker: LessonMaker, progress: float) -> str:
    """Share of tokens predicted right per kind of lesson, on fresh ones."""
    rng = np.random.default_rng(99)
    kinds = {
        "kinds": lambda: [maker.kinds(rng)],
        "find10": lambda: [maker.retrieval(rng, 10)],
        "taste": lambda: [maker.taste(rng)],
        "match": lambda: [maker.matches(rng)],
        "talk": lambda: maker.conversation(rng),
        "note": lambda: [maker.reference(rng)],
    }
    return " ".join(
        f"{name} {float(lesson_loss(decoder, [l for _ in range(16) for l in draw()])[1]):.2f}" for name, draw in kinds.items()
    )


def save(decoder: Decoder, tokenizer, out: Path) -> None:
    from coars_fast.model.load import save_decoder

    save_decoder(decoder, out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    import tyro

    pretrain(tyro.cli(PretrainConfig))
