"""Where the GPU's time goes in one iteration at the shape of a large model: kernel times of decoding and of a step.

Writes `profile.md`, two tables from torch.profiler, and what a roofline cannot say: how much of the time the GPU was
busy, and how often the host waited for it. On a CPU the operators' own times at the tiny shape. Left out: a trace file,
which is large; prefill, whose kernels are the step's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile

from bench import large, loops
from bench.acceptance.work import CUT_OFF, DONE, Finding, Work
from bench.large import DEVICE
from bench.presets import PRESETS
from bench.timing import synchronise

NUM_SHOWN = 25
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Calls of the runtime in which the host stands still; asynchronous copies to pageable memory count as the first."""


def run(work: Work) -> Finding:
    """Decoding, then a step."""
    size, dtype = large.SIZES[work.preset], getattr(torch, PRESETS[work.preset].dtype)
    rows, length = size.decode[0]

    def decoding() -> dict[str, Any]:
        prompts = large.random_prompts(large.model(size, dtype), rows, length, 0)
        player = large.CachedPrompts(prompts)
        about = f"{size.name}, {rows} rows of {length} tokens, {size.new_tokens} tokens decoded for each"
        return profiled(lambda: player.decode(size.new_tokens), about, size.new_tokens)

    def step() -> dict[str, Any]:
        decoder = large.model(size, dtype)
        learner = loops.learner(decoder, large.settings())
        found = large.random_trajectories(size.decoder.vocab_size, size.step, 1, 0)
        found = large.as_spoken(decoder, found)
        about = f"{size.name}, one episode of {size.step.turns} turns: student, teacher, head, backward, AdamW"
        return profiled(lambda: loops.update(learner, found, eager=False), about, 1)

    for name, compute in (("decoding", decoding), ("step", step)):
        if work.left() < 5.0 and name not in work.record.results:
            return Finding(CUT_OFF, f"{name} not begun")
        work.once(name, compute)
    text = "\n\n".join(as_text(name, found) for name, found in work.record.results.items())
    work.write(".md", f"# Profile of an iteration on {work.record.identity['machine']}\n\n{text}\n")
    parts = [f"{name}: busy {found['busy']:.0%}" for name, found in work.record.results.items()]
    return Finding(DONE, ", ".join(parts))


def profiled(call: Callable[[], object], about: str, units: int) -> dict[str, Any]:
    """Times of a call's kernels (of its operators on a CPU), after two calls without the profiler.

    Args:
        call: what is profiled.
        about: it does, in words.
        units: tokens or steps in it, by which waits are counted.
    """
    call()
    synchronise()
    begun = time.perf_counter()
    call()
    synchronise()
    wall = 1e3 * (time.perf_counter() - begun)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
    with profile(activities=activities) as profiler:
        call()
        synchronise()
    wanted = DeviceType.CUDA if DEVICE == "cuda" else DeviceType.CPU
    rows, waits = [], 0
    for event in profiler.key_averages():
        if event.key in WAITS:
            waits += event.count
        if event.device_type == wanted:
            own = event.self_device_time_total if DEVICE == "cuda" else event.self_cpu_time_total
            if own > 0.0 and not event.key.startswith("ProfilerStep"):
                rows.append({"name": event.key, "calls": event.count, "ms": own / 1e3})
    rows.sort(key=lambda row: -row["ms"])
    total = sum(row["ms"] for row in rows)
    # Our own wait at the end is none of the call's.
    waited = max(0, waits - 1) / units if DEVICE == "cuda" else None
    return {
        "about": about, "wall_ms": wall, "kernel_ms": total, "busy": min(1.0, total / wall), "units": units,
        "waits": waited, "kernels": sum(row["calls"] for row in rows), "rows": rows[:NUM_SHOWN],
    }  # fmt: skip


def as_text(name: str, found: dict[str, Any]) -> str:
    """Markdown of one profile. On a CPU shares alone: its milliseconds are of no use to anybody."""
    on_gpu = DEVICE == "cuda"
    what = "kernels" if on_gpu else "operators"
    lines = [f"## {name}", "", f"{found['about']}."]
    if on_gpu:
        lines.append(
            f"{found['wall_ms']:.1f} ms without the profiler, {found['kernel_ms']:.1f} ms of {found['kernels']} "
            f"kernels (the GPU busy {found['busy']:.0%}), {found['waits']:.1f} waits of the host for each of "
            f"{found['units']}."
        )
    lines += [
        "",
        f"| {what} | calls | share |" + (" ms |" if on_gpu else ""),
        "|---|---|---|" + ("---|" if on_gpu else ""),
    ]
    for row in found["rows"]:
        cells = [row["name"].replace("|", "/")[:90], str(row["calls"]), f"{row['ms'] / found['kernel_ms']:.1%}"]
        lines.append("| " + " | ".join(cells + ([f"{row['ms']:.2f}"] if on_gpu else [])) + " |")
    return "\n".join(lines)
