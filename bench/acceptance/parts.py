"""The parts of the acceptance, what matters most first.

A part is a function `Work -> Finding` that writes a result as soon as it has it, and goes on from those that are there.
To add one: write the function in a module here, add an entry, and a line to `verdict.py` if something is wanted of it.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One entry.

    Args:
        name: of the part, its log and its results.
        what: it does, in a few words.
        share: of the time, relative to the other parts'; what one leaves goes to the following.
        run: module in `bench.acceptance` and function in it.
        needs: modules without which it is skipped.
        needs_gpu: whether it has nothing to do on a CPU.
    """

    name: str
    what: str
    share: float
    run: str
    needs: tuple[str, ...] = ()
    needs_gpu: bool = False

    def missing(self) -> str:
        """Why it is skipped here; empty if it is not. A GPU is not asked for."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else ""


PARTS = (
    Part("tests_short", "kernel tests: one size of each, bf16 and fp32", 12, "kernel_tests:short", ("pytest",)),
    Part("bench_head", "the head against three bare mm and its rivals", 24, "benches:head", ("pytest",)),
    Part("tuning", "paths, chunks and tiles of the head: the table to ship", 14, "tuning:run"),
    Part(
        "bench_large", "decoding and a step at the shape of a 7B model, random weights", 20, "benches:large",
        ("pytest", "numpy", "rich", "safetensors", "tokenizers"),
    ),
    Part("tests", "all kernel tests that know of a GPU", 12, "kernel_tests:everything", ("pytest",)),
    Part(
        "profile", "kernel times of decoding and of a step, waits of the host", 6, "profiling:run",
        ("numpy", "rich", "safetensors", "tokenizers"),
    ),
    Part("bench_rest", "all other benches", 10, "benches:rest", ("pytest",)),
    Part("sanitizer", "compute-sanitizer on small sizes: memcheck, racecheck", 6, "sanitizer:run"),
    Part("aot", "the ahead-of-time library: build, and its example on this GPU", 4, "aot:run", ("triton",), True),
)  # fmt: skip


def part_named(name: str) -> Part:
    """The part of that name; it must be there."""
    return next(part for part in PARTS if part.name == name)
