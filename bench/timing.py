"""Interleaved timing and peak memory, for benches whose variants must be compared within one run.

Each round times every variant once, in another order, so that whatever else the machine does falls on all of them
alike; medians and the 20th and 80th percentile are reported. A CUDA device is waited for around every call. Left out:
energy, and times of single kernels (a profiler's).
"""

from __future__ import annotations

import ctypes
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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


def summary(seconds: Sequence[float]) -> Timing:
    """Median, p20 and p80 of at least two times, linear between neighbours."""
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return Timing(statistics.median(seconds), cuts[1], cuts[7])


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm_up: int = 1,
    limit: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every timed call, by variant.

    Args:
        variants: name -> what is timed; each makes its own gradients and drops them.
        rounds: timed calls of each, at least 2.
        warm_up: calls of each that are not timed.
        limit: no further round begins after so many seconds, warm-up included, once two rounds were timed.
        clock: seconds from any origin.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order, begun = random.Random(0), clock()
    for number in range(warm_up + rounds):
        if number >= warm_up + 2 and clock() - begun > limit:
            break
        names = list(variants)
        order.shuffle(names)
        for name in names:
            synchronise()
            start = clock()
            result = variants[name]()
            synchronise()
            elapsed = clock() - start
            if number >= warm_up:
                seconds[name].append(elapsed)
            del result
    return seconds


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Memory that one call needs beyond what is held before it, at its peak: of the CUDA allocator, or else of the
    process (Linux only: the kernel's high-water mark of resident memory, which it can be told to forget).

    None where neither can be asked. On a CPU, memory that the process freed but still holds is given back first, as far
    as the C library can; what it cannot give back makes the figure too small."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    call()
    return max(_status("VmHWM") - before, 0)


def cache_bytes() -> int:
    """Size of the last-level cache that inputs should exceed; 32 MiB where nothing says it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).L2_cache_size
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
    except OSError:
        return 32 * 2**20
    return int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]] if text[-1:] in "KM" else int(text)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
