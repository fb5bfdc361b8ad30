"""What this machine can do, measured in the same run as the benches: a bare `torch.mm`, and copying memory.

    python -m bench.roofline

A floor of an op is either the products that it cannot do without, run bare beside it, or its arithmetic and its traffic
divided by these two figures. Left out: bandwidth of the caches, and other products than square ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from bench.timing import cache_bytes, interleaved, summary


@dataclass(frozen=True)
class Roofline:
    """Measured limits."""

    flops: float
    """Operations per second of a square matrix product."""
    bandwidth: float
    """Bytes per second of a copy, read and written bytes together."""

    def seconds(self, flops: float, num_bytes: float) -> float:
        """The time that neither limit lets an op go below."""
        return max(flops / self.flops, num_bytes / self.bandwidth)


@cache
def measure(dtype: torch.dtype, device: str, rounds: int = 7) -> Roofline:
    """Both limits, interleaved; once per data type and process."""
    size = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    # On a GPU long enough for the launch and the wait to be nothing.
    length = 2**31 if device == "cuda" else max(64 * 2**20, 4 * cache_bytes())
    source = torch.ones(length, dtype=torch.uint8, device=device).view(torch.float32)
    destination = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {
        "mm": lambda: torch.mm(left, right),
        "copy": lambda: destination.copy_(source),
    }
    seconds = interleaved(calls, rounds=rounds, warm_up=2)
    return Roofline(2 * size**3 / summary(seconds["mm"]).median, 2 * length / summary(seconds["copy"]).median)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,)
    for dtype in dtypes:
        found = measure(dtype, device)
        name = str(dtype).removeprefix("torch.")
        print(f"{name}: torch.mm {found.flops / 1e12:.3f} TFLOP/s, copy {found.bandwidth / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
