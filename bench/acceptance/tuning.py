"""Which path, chunk and tile sizes the head should ship: every candidate checked, then timed; a table to paste.

    library path     chunk sizes, at several shapes of heads
    fused path       `FusedConfig` candidates on one chunk, each compared with the library path's log-probs
    both, whole      the best of each over all rows: proposes `FUSED_IS_FASTER` of `sweep.py`, `CONFIGS` of
                     `triton_fused.py`

Writes `tuning.json` and `tuning.md`. On a CPU the library path is timed at a tiny shape and the Triton candidates are
listed as not runnable. Left out: row kernel and repair, whose sizes hardly matter beside products.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench.acceptance.work import CUT_OFF, DONE, FAILED, Finding, Work
from bench.presets import NO_TIME
from bench.timing import interleaved, summary
from coars_kernels.linear_logprob.reference import linear_logprob_reference
from coars_kernels.linear_logprob.sweep import Sweep, choose_chunk_rows, choose_path, sweep_head

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 7
MARGIN = 1.02
"""What is proposed must be faster than what is shipped by more than this."""
CHECKED_ROWS = 64
LOGP_ERROR = {"bfloat16": 5e-6, "float32": 1e-5}
"""Of max(1, |logp|), against float64, as the benches allow."""
TWO_PATHS = 2 * 5e-6
"""The same between two paths."""

# Fields of `FusedConfig` in order (the last defaults to 1); what is shipped is added.
CANDIDATES = {
    2: (
        (128, 256, 64, 8, 8, 4), (128, 256, 64, 32, 8, 4), (128, 256, 64, 16, 8, 3), (128, 256, 32, 16, 8, 4),
        (256, 128, 64, 16, 8, 4), (256, 128, 64, 16, 8, 3), (128, 128, 64, 16, 4, 4), (128, 128, 64, 16, 8, 4),
        (128, 128, 64, 16, 8, 5), (128, 128, 64, 16, 4, 3, 2), (64, 256, 64, 16, 4, 4), (64, 256, 64, 16, 8, 4),
        (128, 128, 128, 16, 8, 3), (128, 128, 32, 16, 4, 4, 2),
    ),
    4: (
        (64, 64, 32, 16, 8, 3), (128, 64, 16, 16, 8, 3), (64, 128, 16, 16, 8, 3), (128, 128, 16, 16, 8, 3),
        (64, 64, 16, 16, 4, 3),
    ),
}  # fmt: skip
"""By bytes per number."""
CHUNKS = (512, 1024, 1152, 1280, 1536, 1920, 2304, 3072, 4096)


@dataclass(frozen=True)
class Shape:
    """A head: whose, and its sizes."""

    name: str
    rows: int
    hidden: int
    vocab: int
    dtype: str

    @property
    def key(self) -> str:
        return f"{self.name} {self.dtype}"


SHAPES = {
    "smoke": (Shape("tiny", 1024, 64, 4096, "float32"),),
    "cpu": (Shape("small", 2048, 512, 32000, "float32"),),
    "h100": (
        Shape("Qwen2.5-7B", 8192, 3584, 152064, "bfloat16"),
        Shape("Qwen3-0.6B", 8192, 1024, 151936, "bfloat16"),
        Shape("Llama-3-8B", 8192, 4096, 128256, "bfloat16"),
        Shape("Qwen2.5-7B", 2048, 3584, 152064, "float32"),
    ),
}


@dataclass
class Inputs:
    """Of one shape."""

    weight: Tensor
    student: Tensor
    teacher: Tensor
    target: Tensor


@cache
def inputs_of(shape: Shape) -> Inputs:
    """Logits of a few nats."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    dtype = getattr(torch, shape.dtype)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=DEVICE)

    weight = normal(shape.vocab, shape.hidden).mul_(2.0 / shape.hidden**0.5).to(dtype)
    student = normal(shape.rows, shape.hidden)
    teacher = student + 0.1 * normal(shape.rows, shape.hidden)
    target = torch.randint(shape.vocab, (shape.rows,), generator=generator, device=DEVICE)
    return Inputs(weight, student.to(dtype), teacher.to(dtype), target)


def whole(inputs: Inputs, chunk: int, *, fused: bool) -> Sweep:
    """Student and teacher over all rows, with the student's gradient."""
    return sweep_head(
        inputs.student, inputs.teacher, inputs.weight, None, inputs.target, 1.0, chunk, want_jacobian=True,
        want_entropy=False, fused=fused,
    )  # fmt: skip


def largest_error(found: Tensor, expected: Tensor) -> float:
    """As a part of max(1, |logp|); infinite where something is not finite."""
    error = float(((found.double() - expected.double()).abs() / expected.double().abs().clamp(min=1.0)).max())
    return error if error == error else float("inf")


def milliseconds(calls: dict[str, Callable[[], object]], limit: float) -> dict[str, float]:
    """Interleaved medians."""
    if not calls:
        return {}
    found = interleaved(calls, rounds=ROUNDS, warm_up=1, limit=limit)
    return {name: 1e3 * summary(seconds).median for name, seconds in found.items()}


# --------------------------------------------------------------------------------------------------------------- steps


def library_chunks(shape: Shape, limit: float) -> dict[str, Any]:
    """Times of the library path by chunk rows, once its log-probs are right."""
    inputs = inputs_of(shape)
    default = choose_chunk_rows(inputs.weight)
    rows = slice(0, CHECKED_ROWS)
    exact = linear_logprob_reference(inputs.student[rows].double(), inputs.weight.double(), inputs.target[rows])
    assert isinstance(exact, Tensor)
    error = largest_error(whole(inputs, default, fused=False).logp_R[rows], exact)
    if not error <= LOGP_ERROR[shape.dtype]:
        return {"default": default, "error": error, "ms": {}}
    sizes = {default} | {size for size in CHUNKS if size <= shape.rows and size * shape.vocab < 2**30}
    calls: dict[str, Callable[[], object]] = {
        str(size): lambda size=size: whole(inputs, size, fused=False) for size in sorted(sizes)
    }
    return {"default": default, "error": error, "ms": milliseconds(calls, limit)}


def shipped(shape: Shape) -> tuple[int, ...]:
    """The table's entry for this device."""
    from coars_kernels.linear_logprob.triton_fused import config_of

    return tuple(config_of(inputs_of(shape).weight))


def candidates(shape: Shape) -> list[tuple[int, ...]]:
    """Configurations, the shipped one first."""
    itemsize = getattr(torch, shape.dtype).itemsize
    complete = [(*sizes, 1)[:7] for sizes in CANDIDATES[itemsize]]
    return list(dict.fromkeys([shipped(shape), *complete]))


def fused_chunk(inputs: Inputs, config: Sequence[int], chunk: int, mass: Tensor) -> Tensor:
    """One chunk of both through a configuration; the student's log-probs."""
    from coars_kernels.linear_logprob.triton_fused import FusedConfig, fused_masses

    student, teacher, target = (x[:chunk] for x in (inputs.student, inputs.teacher, inputs.target))
    found, _ = fused_masses(student, teacher, inputs.weight, target, mass_CV=mass, config=FusedConfig(*config))
    return found.logp_C


def fused_tiles(work: Work, shape: Shape, configs: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """Times of one chunk by configuration; what cannot run or is wrong has a reason instead."""
    inputs = inputs_of(shape)
    chunk = min(choose_chunk_rows(inputs.weight), shape.rows)
    part = Inputs(inputs.weight, *(x[:chunk] for x in (inputs.student, inputs.teacher, inputs.target)))
    expected = whole(part, chunk, fused=False).logp_R
    mass = inputs.weight.new_full((chunk, -(-shape.vocab // 16) * 16), float("nan"))
    reasons: dict[str, str] = {}
    calls: dict[str, Callable[[], object]] = {}
    for config in configs:
        name = name_of(config)
        if work.left() < 5.0:
            reasons[name] = NO_TIME
            continue
        try:
            error = largest_error(fused_chunk(inputs, config, chunk, mass.fill_(float("nan"))), expected)
            complete = bool(torch.isfinite(mass).all())
        # Out of shared memory or registers, or a compiler that fails: that candidate is out.
        except Exception as failure:
            reasons[name] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:120] if str(failure) else ''}"
            continue
        if not (error <= TWO_PATHS and complete):
            reasons[name] = f"wrong: error {error:.2g}" + ("" if complete else ", masses not all written")
            continue
        calls[name] = lambda config=config: fused_chunk(inputs, config, chunk, mass)
    return {"chunk": chunk, "ms": milliseconds(calls, max(2.0, work.left() / 2)), "not_timed": reasons}


def both_paths(shape: Shape, chunk: int, config: tuple[int, ...], limit: float) -> dict[str, float]:
    """Times of both designs over all rows, the fused one in `config`."""
    from coars_kernels.linear_logprob import triton_fused

    inputs = inputs_of(shape)
    key = table_key(shape)
    before = triton_fused.CONFIGS[key]
    triton_fused.CONFIGS[key] = triton_fused.FusedConfig(*config)
    try:
        calls: dict[str, Callable[[], object]] = {
            "library": lambda: whole(inputs, chunk, fused=False),
            "fused": lambda: whole(inputs, chunk, fused=True),
        }
        return milliseconds(calls, limit)
    finally:
        triton_fused.CONFIGS[key] = before


def table_key(shape: Shape) -> tuple[int, int]:
    """Of `CONFIGS`: the entry that `config_of` takes here."""
    from coars_kernels.linear_logprob.triton_fused import CONFIGS, config_of

    config = config_of(inputs_of(shape).weight)
    itemsize = getattr(torch, shape.dtype).itemsize
    return next(key for key, value in CONFIGS.items() if value is config and key[1] == itemsize)


def name_of(config: Sequence[int]) -> str:
    """Sizes as text."""
    return " ".join(map(str, config))


def config_from(name: str) -> tuple[int, ...]:
    """And back."""
    return tuple(map(int, name.split()))


# ----------------------------------------------------------------------------------------------------------- compiling


def compile_one(config: tuple[int, ...], dtype: str) -> None:
    """Fill Triton's cache: the same kernel as at full size, since sizes that are multiples of 16 make one."""
    shape = Shape("compile", 256, 512, 4096, dtype)
    inputs = inputs_of(shape)
    fused_chunk(inputs, config, 256, inputs.weight.new_empty(256, 4096))
    torch.cuda.synchronize()


def compile_beside(configs: Sequence[tuple[int, ...]], dtype: str) -> None:
    """Compile in several processes; what fails here fails again, with its reason, where it is timed."""
    workers = min(6, (os.cpu_count() or 2) // 2, len(configs))
    if workers < 2:
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(compile_one, config, dtype) for config in configs]:
            failure = future.exception()
            if failure is not None:
                print(f"compiling beside: {type(failure).__name__}", flush=True)


# ----------------------------------------------------------------------------------------------------------------- all


def run(work: Work) -> Finding:
    """All shapes of the preset, the first in full before the next."""
    fused_runs = work.cuda and importlib.util.find_spec("triton") is not None
    why_not = "" if fused_runs else f"not runnable: {'no Triton' if work.cuda else 'no CUDA device'}"
    shapes, finished = SHAPES[work.preset], True
    for shape in shapes:
        if work.left() < 8.0 and f"library, {shape.key}" not in work.record.results:
            finished = False
            break
        found = work.once(f"library, {shape.key}", lambda shape=shape: library_chunks(shape, work.left() / 4))
        if not found["ms"]:
            return Finding(FAILED, f"library path, {shape.key}: log-prob error {found['error']:.2g}")
        if why_not:
            configs = [name_of((*sizes, 1)[:7]) for sizes in CANDIDATES[getattr(torch, shape.dtype).itemsize]]
            work.record.keep(f"tiles, {shape.key}", {"ms": {}, "not_timed": dict.fromkeys(configs, why_not)})
            continue
        finished &= _fused(work, shape)
    work.write(".md", as_text(work.record.results, shapes))
    times = sum(len(found["ms"]) for name, found in work.record.results.items() if name.startswith(("lib", "tiles")))
    return Finding(DONE if finished else CUT_OFF, f"{times} candidates timed{f'; Triton {why_not}' if why_not else ''}")


def _fused(work: Work, shape: Shape) -> bool:
    """Tiles, then both paths; whether all of it was done. Candidates for which time ran out are tried again."""
    results, first = work.record.results, SHAPES[work.preset][0]
    tiles = results.get(f"tiles, {shape.key}")
    if tiles is None or NO_TIME in tiles["not_timed"].values():
        configs = candidates(shape)
        known = results.get(f"tiles, {first.key}", {"ms": {}})["ms"]
        if shape != first and shape.dtype == first.dtype and known:  # the best of the first shape's
            configs = list(dict.fromkeys([shipped(shape), *map(config_from, sorted(known, key=known.__getitem__)[:4])]))
        compile_beside(configs, shape.dtype)
        tiles = work.record.keep(f"tiles, {shape.key}", fused_tiles(work, shape, configs))
    if NO_TIME in tiles["not_timed"].values():
        return False
    if not tiles["ms"] or f"both, {shape.key}" in results:
        return True
    if work.left() < 3.0:
        return False
    config = config_from(min(tiles["ms"], key=tiles["ms"].__getitem__))
    found = {
        "ms": both_paths(shape, results[f"library, {shape.key}"]["default"], config, work.left() / 2),
        "config": name_of(config), "shipped": name_of(shipped(shape)), "table": table_key(shape),
        "auto": choose_path(inputs_of(shape).weight, "auto"), "capability": torch.cuda.get_device_capability(),
    }  # fmt: skip
    work.record.keep(f"both, {shape.key}", found)
    return True


def proposal(results: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Lines of `FUSED_IS_FASTER` and of `CONFIGS`, from what was measured; a device's dtype is in the first only if
    the fused path was faster at all of its shapes."""
    faster: dict[tuple[int, int], bool] = {}
    configs: dict[tuple[int, int], str] = {}
    for name, found in results.items():
        if not name.startswith("both, "):
            continue
        table = tuple(found["table"])
        major, minor = found["capability"]
        device = (10 * major + minor, table[1])
        wins = found["ms"]["library"] > MARGIN * found["ms"]["fused"]
        faster[device] = faster.get(device, True) and wins
        tiles = results[f"tiles, {name.removeprefix('both, ')}"]["ms"]
        gain = tiles.get(found["shipped"], float("inf")) / tiles[found["config"]]
        # The first shape decides: the others were tried with its best alone.
        configs.setdefault(table, found["config"] if gain > MARGIN else found["shipped"])
    wanted = sorted(device for device, wins in faster.items() if wins)
    first = [f"FUSED_IS_FASTER = frozenset({{{', '.join(map(str, wanted))}}})" if wanted else
             "FUSED_IS_FASTER = frozenset()"] if faster else []  # fmt: skip
    return first, [f"{key}: FusedConfig({name.replace(' ', ', ')})," for key, name in sorted(configs.items())]


def as_text(results: dict[str, Any], shapes: Sequence[Shape]) -> str:
    """Markdown: the proposal, then what it comes from."""
    faster, configs = proposal(results)
    lines = ["# Tuning of the head", ""]
    if configs:
        lines += ["Proposed, for `sweep.py` and `CONFIGS` of `triton_fused.py`:", "", "```python"]
        lines += [*faster, *configs, "```"]
    else:
        lines += ["Nothing to propose: the fused path was not timed here."]
    for shape in shapes:
        library = results.get(f"library, {shape.key}")
        if library is None:
            continue
        lines += ["", f"## {shape.key}: R={shape.rows} H={shape.hidden} V={shape.vocab}", ""]
        lines += [f"Library path by chunk rows (shipped: {library['default']}), times the fastest:", ""]
        lines += _ratios(library["ms"])
        tiles = results.get(f"tiles, {shape.key}", {"ms": {}, "not_timed": {}})
        lines += [
            "",
            "Fused product of one chunk by tiles (rows, vocabulary, hidden, group, warps, stages, programs):",
            "",
        ]
        lines += _ratios(tiles["ms"]) + [f"- {name}: {reason}" for name, reason in tiles["not_timed"].items()]
        both = results.get(f"both, {shape.key}")
        if both:
            times = ", ".join(f"{name} {value:.2f} ms" for name, value in both["ms"].items())
            lines += ["", f"All rows, student and teacher: {times}; `auto` takes {both['auto']}."]
    return "\n".join(lines) + "\n"


def _ratios(times: dict[str, float]) -> list[str]:
    """Fastest first. On a CPU milliseconds would say nothing."""
    fastest = min(times.values(), default=1.0)
    shown = sorted(times.items(), key=lambda item: item[1])
    unit = (lambda value: f" ({value:.3f} ms)") if DEVICE == "cuda" else (lambda value: "")
    return [f"- {name}: {value / fastest:.2f}{unit(value)}" for name, value in shown]
