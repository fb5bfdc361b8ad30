"""Sizes of the benches by name: `smoke` for continuous integration, `cpu` for a laptop, `h100` for a large GPU.

What a size means for an op stands in that op's file; here is what holds for all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MEASURED, NO_TIME = "measured before", "no time is left"
"""Why a run leaves a case out."""


class BenchError(Exception):
    """What a user of the benches did wrong: one line that says what, where and the way out."""


@dataclass(frozen=True)
class Preset:
    """How long and on what to measure."""

    name: str
    rounds: int
    """Timed calls of every variant."""
    seconds: float
    """No further round begins once a case was timed this long; two there always are."""
    dtype: str
    compile_everywhere: bool
    """Whether `torch.compile` is among the rivals of every case, or of one only: compiling takes longer than smoke."""


PRESETS = {
    "smoke": Preset("smoke", 3, math.inf, "float32", False),
    "cpu": Preset("cpu", 5, math.inf, "float32", True),
    "h100": Preset("h100", 30, 6.0, "bfloat16", True),
}


def choose_preset(name: str | None, has_cuda: bool) -> Preset:
    """The preset called `name`; without a name `h100` where there is a GPU, else `smoke`."""
    if name is None:
        name = "h100" if has_cuda else "smoke"
    if name not in PRESETS:
        raise BenchError(f"--preset: no preset {name!r}; choose {', '.join(PRESETS)}")
    return PRESETS[name]
