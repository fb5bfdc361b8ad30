"""One training step on a rollout's trajectories: `Learner.update` against an ordinary head and a row per turn.

    python -m pytest bench/test_step.py

Student forward and backward, teacher, loss and AdamW on both adapters; the gradient is checked against a float64 step
with full logits. The learning rate is 0, so that every call does the same. The floor is arithmetic alone, at the speed
of a bare `torch.mm`. Left out: other trainers as a whole; what makes them slower here (a row per turn, full logits) is
what the rivals do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench import loops
from bench.harness import Case, Variant
from bench.presets import Preset
from coars_fast import __version__


def cases(preset: Preset) -> list[Case]:
    here = loops.world(loops.NUM_EPISODES[preset.name])
    found = loops.rewarded(here, loops.play_ours(here))
    rows, student = loops.row_per_turn(found), sum(len(t.tokens) for t in found)
    decoder = here.parts.decoder
    made = loops.learner(decoder, here.parts.config)
    variants = [
        Variant(
            "Learner.update", lambda w: loops.update(made, found, eager=False), "ours", f"coars_fast {__version__}"
        ),
        Variant("packed conversations, full logits", lambda w: loops.update(made, found, eager=True)),
        Variant("a row per turn, full logits", lambda w: loops.update(made, rows, eager=True)),
    ]
    # fp32 through a model and back: log-probs of 1e-4 accuracy, and gradients in which turns of both signs cancel.
    case = Case(
        op="step", name="both agents", shape={"episodes": len(here.tasks)}, dtype=torch.float32,
        device=loops.DEVICE, inputs=lambda seed: here, variants=variants,
        expected=lambda w, _: loops.exact_gradient(decoder, w.parts.config, found),
        flops=loops.step_flops(decoder, found),
        tokens=lambda _: student, allowed=(1e-4, 1e-3),
    )  # fmt: skip
    return [case]


def test_step(case: Case, measured: Callable[[Case], object]) -> None:
    measured(case)
