"""Interleaved timing and peak memory, for benches whose variants must be compared within one run.

Each round times every variant once, in another order, so that whatever else the machine does falls on all of them
alike; medians and the 20th and 80th percentile are reported. A CUDA device is waited for around every call.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant."""

    median: float
    low: float
    """20th percentile."""
    high: float
    """80th percentile."""


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(variants: dict[str, Callable[[], object]], *, rounds: int, warm_up: int = 1) -> dict[str, Timing]:
    """Time every variant once a round.

    Args:
        variants: name -> what is timed; each makes its own gradients and drops them.
        rounds: timed calls of each, at least 2.
        warm_up: calls of each that are not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = random.Random(0)
    for number in range(warm_up + rounds):
        names = list(variants)
        order.shuffle(names)
        for name in names:
            synchronise()
            start = time.perf_counter()
            result = variants[name]()
            synchronise()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
            del result

    def summary(values: list[float]) -> Timing:
        cuts = statistics.quantiles(values, n=10, method="inclusive")
        return Timing(statistics.median(values), cuts[1], cuts[7])

    return {name: summary(values) for name, values in seconds.items()}


def peak_bytes(call: Callable[[], object]) -> int:
    """Memory that one call needs beyond what is held before it, at its peak: of the CUDA allocator, or else of the
    process (Linux only: the kernel's high-water mark of resident memory, which it can be told to forget)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
