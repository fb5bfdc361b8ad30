"""A whole iteration, rollout, rewards and step, against what a newcomer would put together.

    python -m pytest bench/test_iteration.py

The rival plays with `transformers` `generate` from each conversation's beginning and trains a row per turn with full
logits. Both results are checked: what was said and the gradient, against float64. Left out: evaluation, checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import loops
from bench.harness import Case, Result, Variant
from bench.presets import Preset
from coars_fast import __version__

transformers = pytest.importorskip("transformers")


def cases(preset: Preset) -> list[Case]:
    here = loops.world(loops.NUM_EPISODES[preset.name])
    decoder = here.parts.decoder
    made = loops.learner(decoder, here.parts.config)

    def ours(w: loops.World) -> Result:
        episodes = loops.play_ours(w)
        return loops.spoken(episodes) | loops.update(made, loops.rewarded(w, episodes), eager=False)

    def newcomer(w: loops.World) -> Result:
        episodes = loops.play_generate(w)
        rows = loops.row_per_turn(loops.rewarded(w, episodes))
        return loops.spoken(episodes) | loops.update(made, rows, eager=True)

    def expected(w: loops.World, result: Result) -> dict[str, Any]:
        episodes: Any = result["episodes"]
        gradient = loops.exact_gradient(decoder, w.parts.config, loops.rewarded(w, episodes))
        return loops.exact_spoken(w, result) | gradient

    episodes = loops.play_ours(here)
    found = loops.rewarded(here, episodes)
    name = "generate each turn, a row per turn, full logits"
    variants = [
        Variant("play and Learner.update", ours, "ours", f"coars_fast {__version__}"),
        Variant(name, newcomer, version=f"transformers {transformers.__version__}"),
    ]
    case = Case(
        op="iteration", name="both agents", shape={"episodes": len(episodes)}, dtype=torch.float32, device=loops.DEVICE,
        inputs=lambda seed: here, variants=variants, expected=expected, by_result=True,
        flops=loops.rollout_flops(decoder, episodes) + loops.step_flops(decoder, found), tokens=loops.num_spoken,
        allowed=(1e-4, 1e-3),
    )  # fmt: skip
    return [case]


def test_iteration(case: Case, measured: Callable[[Case], object]) -> None:
    measured(case)
