"""Playing conversations of two agents: `coars_fast.rollout.play` against `transformers` `generate` at every turn.

    python -m pytest bench/test_rollout.py

Greedy, on the tiny base in the synthetic world; the log-probs of what each player said are checked against float64. The
floor is arithmetic alone, every token of every conversation once; small models are far from it, since each of their
operations is short. A larger shape with random weights takes minutes on a CPU and has a command of its own
(`bench/rollout_ratio.py`); decoding at the shape of a 7B model is in `test_large_model.py`. Left out: servers.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench import loops
from bench.harness import Case, Variant
from bench.presets import Preset
from coars_fast import __version__

transformers = pytest.importorskip("transformers")

NUM_EPISODES = {"cpu": 64}


def cases(preset: Preset) -> list[Case]:
    here = loops.world(NUM_EPISODES.get(preset.name, loops.NUM_EPISODES[preset.name]), max_turns=5)
    episodes = loops.play_ours(here)
    variants = [
        Variant("play", lambda w: loops.spoken(loops.play_ours(w)), "ours", f"coars_fast {__version__}"),
        Variant(
            "transformers generate, each turn anew",
            lambda w: loops.spoken(loops.play_generate(w)),
            version=f"transformers {transformers.__version__}",
        ),
    ]
    # fp32 through a model: each of its layers rounds a few dozen times.
    case = Case(
        op="rollout", name="greedy, two agents", shape={"episodes": len(episodes)}, dtype=torch.float32,
        device=loops.DEVICE, inputs=lambda seed: here, variants=variants, expected=loops.exact_spoken, by_result=True,
        flops=loops.rollout_flops(here.parts.decoder, episodes), tokens=loops.num_spoken, allowed=(1e-4, 1e-4),
    )  # fmt: skip
    return [case]


def test_rollout(case: Case, measured: Callable[[Case], object]) -> None:
    measured(case)
