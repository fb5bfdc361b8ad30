"""On a GPU: what a captured graph replays is what the same steps give one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import coars_fast
from coars_fast.game.episode import Reply
from coars_fast.model.decoder import Decoder
from coars_fast.model.load import load_decoder
from coars_fast.model.lora import add_adapters
from coars_fast.rollout.paged_memory import PagedMemory
from coars_fast.rollout.play import ask

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="replays CUDA graphs: needs a GPU")
BASE = Path(coars_fast.__file__).parent / "tiny_base"
NUM = 40


def prompts() -> list[list[int]]:
    """Some share more than two pages, so that rows are read in groups; others share nothing and differ in length."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(5, 600, (count,), generator=generator).tolist()

    common = tokens(600)
    return [common + tokens(7 * (i % 9) + 3) for i in range(NUM)] + [tokens(20 + 11 * i) for i in range(NUM)]


def change(decoder: Decoder, seed: int) -> None:
    """Other adapters, in place: a graph reads the new values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "lora_b" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def asked(decoder: Decoder, temperature: float, agent: int) -> list[Reply]:
    """A third of the greedy replies are drawn again, at temperature 1 among others at 0."""
    settings: dict[str, Any] = {"max_reply_tokens": 24, "batch_size": NUM, "attention": "auto"}
    return ask(
        decoder, prompts(), agent, control=frozenset({1, 2}),
        is_valid=lambda reply: temperature > 0 or sum(reply.ids) % 3 > 0, seed=3, temperature=temperature, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replay_gives_what_its_steps_give(dtype: torch.dtype) -> None:
    decoder = load_decoder(BASE, device="cuda", dtype=dtype)
    add_adapters(decoder, rank=8, alpha=16.0)
    for seed in (1, 2):
        change(decoder, seed)
        for temperature in (1.0, 0.0):
            for agent in (0, 1):
                asked(decoder, temperature, agent)  # what it leaves of the prefixes is there for both
                replayed = asked(decoder, temperature, agent)
                (engine,) = vars(decoder)["_rollout_engines"].values()
                memory = engine.memory
                assert isinstance(memory, PagedMemory) and memory.replays.captures and memory.replays._graphs
                memory.replays.captures = False
                eager = asked(decoder, temperature, agent)
                memory.replays.captures = True
                assert temperature > 0 or any(others for _, _, others, _ in memory.replays._graphs)
                assert [reply.ids for reply in replayed] == [reply.ids for reply in eager]
                for a, b in zip(replayed, eager, strict=True):
                    assert a.logp == pytest.approx(b.logp, abs=1e-6)
