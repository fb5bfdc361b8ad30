"""Decoding, a training step and both in a row, at the shape of a large model (`h100`: Qwen2.5-7B), random weights.

    python -m pytest bench/test_large_model.py

Decoding goes on from prompts that are cached; its floor is the decode roofline, weights and K/V read once a token at
the bandwidth of a copy in the same run. Log-probs of two sequences and the gradient of one episode are checked against
float64. A step is two episodes of five turns (prompt 1200, reply 120, partner 80, reference 150). Left out: prefix
groups, and servers as rivals.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bench import large, loops
from bench.harness import Case, Result, Variant
from bench.large import DEVICE, Size
from bench.presets import Preset
from coars_fast import __version__
from coars_fast.data.records import Trajectory
from coars_fast.learn.step import Learner

Kind = Callable[[large.Prompts], large.Player]
OURS = f"coars_fast {__version__}"
LARGEST_CACHES = 24e9
"""Bytes of K/V that ours and a rival's may take together beside 80 GB's other contents."""


def allowed(size: Size, dtype: torch.dtype) -> tuple[float, float]:
    """Errors of log-probs and of gradients. In fp32 as in the other loops. In 16 bits one rounding per layer, which add
    up like the sides of right angles, and thrice that on the way back, where turns of both signs cancel. On a CPU, 28
    layers of 256 have a tenth and four tenths of it, with full logits as with ours."""
    if dtype == torch.float32:
        return 1e-4, 1e-3
    rounding = 2.0**-9 * math.sqrt(size.decoder.num_layers)
    return rounding, 3 * rounding


def decode_case(size: Size, dtype: torch.dtype, rows: int, length: int) -> Case:
    def run(kind: Kind) -> Callable[[large.Prompts], Result]:
        return lambda prompts: prompts.player(kind).decode(size.new_tokens)

    version, absent = transformers()
    if 2 * large.cache_bytes(size.decoder, rows, length, dtype.itemsize) > LARGEST_CACHES:
        absent = "a second K/V memory of this size has no room beside ours"
    variants = [
        Variant("the rollout's decoding", run(large.CachedPrompts), "ours", OURS),
        Variant("transformers, its cache", run(large.CachedByTransformers), version=version, absent=absent),
    ]
    weights = loops.model_flops(large.skeleton(size.decoder), 1) + 2.0 * _head(size)
    return Case(
        op="decode", name=f"{size.name}, random weights", shape={"B": rows, "T": length, "n": size.new_tokens},
        dtype=dtype, device=DEVICE,
        inputs=lambda seed: large.random_prompts(large.model(size, dtype), rows, length, seed),
        variants=variants, expected=large.exact_replies, by_result=True, flops=rows * size.new_tokens * weights,
        num_bytes=large.decode_bytes(size.decoder, rows, length, size.new_tokens, dtype.itemsize),
        tokens=lambda result: result["tokens"].numel(), allowed=allowed(size, dtype),
    )  # fmt: skip


def _head(size: Size) -> int:
    return size.decoder.vocab_size * size.decoder.hidden_size


def transformers() -> tuple[str, str]:
    """Name and version, and why it cannot run here."""
    try:
        return f"transformers {importlib.metadata.version('transformers')}", ""
    except importlib.metadata.PackageNotFoundError:
        return "transformers", "not installed: no module transformers"


@cache
def learner(size: Size, dtype: torch.dtype) -> Learner:
    """One for all cases of a process."""
    return loops.learner(large.model(size, dtype), large.settings())


def update(size: Size, dtype: torch.dtype, found: list[Trajectory], *, eager: bool) -> Result:
    """One step; its gradient, which is the mean over episodes, times their number: that of the first, see `large`."""
    gradient = loops.update(learner(size, dtype), found, eager=eager)["grad"]
    return {"grad": gradient * len({t.episode for t in found})}


@dataclass
class Spoken:
    """Trajectories of a step."""

    found: list[Trajectory]


def step_case(size: Size, dtype: torch.dtype) -> Case:
    def inputs(seed: int) -> Spoken:
        decoder = large.model(size, dtype)
        return Spoken(large.as_spoken(decoder, large.random_trajectories(size.decoder.vocab_size, *shape, seed)))

    def run(rows: Callable[[list[Trajectory]], list[Trajectory]], eager: bool) -> Callable[[Spoken], Result]:
        return lambda spoken: update(size, dtype, rows(spoken.found), eager=eager)

    def expected(spoken: Spoken, _: Result) -> dict[str, tuple[Tensor | None, Tensor]]:
        return loops.exact_gradient(large.model(size, dtype), large.settings(), large.first_episode(spoken.found))

    shape = (size.step, size.step_episodes)
    counted = large.random_trajectories(size.decoder.vocab_size, *shape, 0)
    variants = [
        Variant("Learner.update", run(list, False), "ours", OURS),
        Variant("packed conversations, full logits", run(list, True)),
        Variant("a row per turn, full logits", run(loops.row_per_turn, True)),
    ]
    num_tokens = sum(len(t.tokens) for t in counted)
    return Case(
        op="step", name=f"{size.name}, random weights",
        shape={"episodes": size.step_episodes, "turns": size.step.turns, "tokens": num_tokens}, dtype=dtype,
        device=DEVICE, inputs=inputs, variants=variants, expected=expected,
        flops=loops.step_flops(large.skeleton(size.decoder), counted), tokens=lambda _: num_tokens,
        allowed=allowed(size, dtype),
    )  # fmt: skip


def iteration_case(size: Size, dtype: torch.dtype) -> Case:
    shape, rows = size.iteration, 2 * size.iteration_episodes

    def run(kind: Kind, eager: bool) -> Callable[[large.Prompts], Result]:
        def once(prompts: large.Prompts) -> Result:
            result = kind(prompts).decode(shape.reply)
            return {**result, **update(size, dtype, large.played(prompts, shape, result, 0), eager=eager)}

        return once

    def expected(prompts: large.Prompts, result: Result) -> dict[str, tuple[Tensor | None, Tensor]]:
        found = large.first_episode(large.played(prompts, shape, result, 0))
        gradient = loops.exact_gradient(large.model(size, dtype), large.settings(), found)
        return large.exact_replies(prompts, result) | gradient

    version, absent = transformers()
    counted = large.random_trajectories(size.decoder.vocab_size, shape, size.iteration_episodes, 0)
    body = large.skeleton(size.decoder)
    flops = loops.step_flops(body, counted) + loops.model_flops(body, sum(len(t.tokens) for t in counted))
    return Case(
        op="iteration", name=f"{size.name}, random weights",
        shape={"episodes": size.iteration_episodes, "T": shape.prompt, "n": shape.reply}, dtype=dtype, device=DEVICE,
        inputs=lambda seed: large.random_prompts(large.model(size, dtype), rows, shape.prompt, seed),
        variants=[
            Variant("prefill, decoding and Learner.update", run(large.CachedPrompts, False), "ours", OURS),
            Variant(
                "transformers, then full logits", run(large.CachedByTransformers, True), version=version, absent=absent
            ),
        ],
        expected=expected, by_result=True, flops=flops, tokens=lambda result: result["tokens"].numel(),
        allowed=allowed(size, dtype),
    )  # fmt: skip


def cases(preset: Preset) -> list[Case]:
    """What needs least time first: a run may be cut off."""
    size, dtype = large.SIZES[preset.name], getattr(torch, preset.dtype)
    first, *others = [decode_case(size, dtype, rows, length) for rows, length in size.decode]
    return [first, step_case(size, dtype), *others, iteration_case(size, dtype)]


def test_large_model(case: Case, measured: Callable[[Case], object]) -> None:
    measured(case)
