"""A case of a bench: inputs, variants, a check of each against float64, and only then the times.

    rows = run_case(case, PRESETS["cpu"])

Every variant is called once on the first inputs and its result compared with the case's own float64 computation; one
that is wrong, or not finite, gets no time. Of what is left each one's peak memory is taken, in a call that also warms
it up; then all are timed interleaved, over inputs that take turns so that they do not stay in the cache (`copies`).
Left out: choosing among settings of a variant; a setting that matters is a variant.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.presets import Preset
from bench.results import Row, commit, machine_slug, today
from bench.roofline import Roofline, measure
from bench.timing import cache_bytes, interleaved, peak_bytes, summary

Result = Mapping[str, Tensor]
"""Named outputs of a variant. Names that start with `logp` are compared value by value, others by their norm."""
MAX_COPIES = 16
FULL, SIXTEEN_BIT_LOGITS = "full", "16-bit logits"
# Allowed errors: of a log-prob as a part of max(1, |logp|), of anything else relative to its norm. Design, section 5,
# for 16-bit inputs; for fp32 a hundred roundings, which is what sums over H and V products may gather.
ALLOWED: dict[str, dict[str, tuple[float, float]]] = {
    "float32": {FULL: (1e-5, 1e-5), SIXTEEN_BIT_LOGITS: (1e-5, 1e-5)},
    # Rivals that round logits to 16 bits publish log-prob errors of 3e-2: eight units in the last place of bf16 at 1.
    "bfloat16": {FULL: (5e-6, 2e-3), SIXTEEN_BIT_LOGITS: (8 * 2.0**-8, 8 * 2.0**-8)},
}


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    Args:
        name: shown, unique in its case.
        run: inputs -> named outputs.
        kind: `ours` or `rival`.
        version: of what computes it.
        precision: which of the allowed errors it is held to.
        absent: why it cannot run here; empty if it can.
    """

    name: str
    run: Callable[[Any], Result]
    kind: str = "rival"
    version: str = field(default_factory=lambda: f"torch {torch.__version__}")
    precision: str = FULL
    absent: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is compared.

    Args:
        op: name of the op or loop.
        name: kind of call.
        shape: sizes by letter.
        dtype: of the inputs.
        inputs: seed -> inputs on `device`.
        variants: all that should be in the table, absent ones too.
        expected: (inputs, result) -> for each output its rows (None: all) and their float64 values.
        by_result: whether `expected` looks at the result, because sampled tokens are the variant's own; otherwise it is
            computed once for all variants.
        floor: inputs -> the products that the case cannot do without; None: by the roofline from `flops`, `num_bytes`.
        floor_name: how the floor is shown.
        flops, num_bytes: work that the case needs.
        tokens: of one call, for tokens per second; None where it is no figure of interest. It may count a result's.
        rounds: timed calls, if other than the preset's.
        allowed: (log-prob, other) errors, if other than `ALLOWED`'s for the data type.
    """

    op: str
    name: str
    shape: Mapping[str, int]
    dtype: torch.dtype
    device: str
    inputs: Callable[[int], Any]
    variants: Sequence[Variant]
    expected: Callable[[Any, Result], Mapping[str, tuple[Tensor | None, Tensor]]]
    by_result: bool = False
    floor: Callable[[Any], Callable[[], object]] | None = None
    floor_name: str = "roofline"
    flops: float = 0.0
    num_bytes: float = 0.0
    tokens: Callable[[Result], int] | None = None
    rounds: int | None = None
    allowed: tuple[float, float] | None = None

    @property
    def id(self) -> str:
        """As pytest shows it; free of what its `-k` would not take."""
        return f"{self.op}-{self.name}-{self.shape_text}".replace(" ", "-").replace("=", "").replace(",", "")

    def key(self, preset: Preset, variant: str) -> tuple[str, ...]:
        """`Row.key` of the row that a variant gets."""
        return (self.op, self.name, self.shape_text, self.dtype_text, preset.name, variant)

    @property
    def shape_text(self) -> str:
        return " ".join(f"{letter}={size}" for letter, size in self.shape.items())

    @property
    def dtype_text(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass
class Outcome:
    """What `run_case` found: rows for the table, single times by variant, and what must fail the run."""

    rows: list[Row]
    seconds: dict[str, list[float]]
    problems: list[str]


def error_of(
    found: Result, expected: Mapping[str, tuple[Tensor | None, Tensor]], allowed: tuple[float, float]
) -> float:
    """Largest error of any output as a part of what is allowed; infinite where something is missing or not finite."""
    worst = 0.0
    for name, (rows, exact) in expected.items():
        if name not in found:
            return math.inf
        value = found[name].detach()
        value = (value if rows is None else value[rows]).double()
        if value.shape != exact.shape or not bool(torch.isfinite(value).all()):
            return math.inf
        if name.startswith("logp"):
            error = float(((value - exact).abs() / exact.abs().clamp(min=1.0)).max()) / allowed[0]
        else:
            error = float((value - exact).norm() / exact.norm().clamp(min=1e-30)) / allowed[1]
        worst = max(worst, error)
    return worst


def copies(first: Any, make: Callable[[int], Any]) -> list[Any]:
    """Inputs that take turns: as many as exceed the cache twice over, up to `MAX_COPIES`."""
    size = sum(t.numel() * t.element_size() for t in _tensors(first))
    count = min(MAX_COPIES, max(1, math.ceil(2 * cache_bytes() / size))) if size else 1
    return [first, *(make(seed) for seed in range(1, count))]


def _tensors(inputs: Any) -> list[Tensor]:
    return (
        [value for value in vars(inputs).values() if isinstance(value, Tensor)] if hasattr(inputs, "__dict__") else []
    )


def run_case(case: Case, preset: Preset, roofline: Roofline | None = None) -> Outcome:
    """Check, then time, then take the memory of every variant of a case."""
    allowed = {p: case.allowed or both for p, both in ALLOWED[case.dtype_text].items()}
    first = case.inputs(0)
    states: dict[str, tuple[str, str, float | None]] = {}
    results: dict[str, int | None] = {}
    expected = case.expected if case.by_result else _once(case.expected)
    for variant in case.variants:
        allowance = allowed[variant.precision]
        states[variant.name], results[variant.name] = _checked(case, variant, first, expected, allowance)
    turns = copies(first, case.inputs)
    calls: dict[str, Callable[[], object]] = {}
    memory: dict[str, int | None] = {}
    for variant in (v for v in case.variants if states[v.name][0] == "ok"):
        call = _taking_turns(variant.run, turns)
        try:
            memory[variant.name] = peak_bytes(call)
        except torch.OutOfMemoryError as error:  # more is held by now than when the result was checked
            states[variant.name] = ("failed", _one_line(error), states[variant.name][2])
        else:
            calls[variant.name] = call
    problems = [
        f"{case.id}: {v.name}: {states[v.name][1]}"
        for v in case.variants
        if v.kind == "ours" and states[v.name][0] in ("refused", "failed")
    ]
    if case.floor is not None:
        calls[case.floor_name] = _taking_turns(lambda call: call(), [case.floor(inputs) for inputs in turns])
        memory[case.floor_name] = peak_bytes(calls[case.floor_name])
    # Each was called twice by now, for its result and its memory; a GPU's clocks want another call.
    warm_up = int(case.device == "cuda")
    rounds = case.rounds or preset.rounds
    seconds = interleaved(calls, rounds=rounds, warm_up=warm_up, limit=preset.seconds) if calls else {}
    if case.floor is None:
        roofline = roofline or measure(case.dtype, case.device)
        floor_time = roofline.seconds(case.flops, case.num_bytes)
    else:
        floor_time = summary(seconds[case.floor_name]).median
    rows = [_row(case, preset, v, states[v.name], seconds, memory, floor_time, results[v.name]) for v in case.variants]
    floor_variant = Variant(case.floor_name, dict, kind="floor")
    if case.floor is None:
        seconds = seconds | {case.floor_name: [floor_time, floor_time]}
    rows.append(_row(case, preset, floor_variant, ("ok", "", None), seconds, memory, floor_time, None))
    return Outcome(rows, {name: values for name, values in seconds.items() if name in calls}, problems)


def _taking_turns(run: Callable[[Any], object], inputs: Sequence[Any]) -> Callable[[], object]:
    """Each call takes the next of the inputs."""
    around = itertools.cycle(inputs)
    return lambda: run(next(around))


def _once(expected: Callable[[Any, Result], Any]) -> Callable[[Any, Result], Any]:
    found: list[Any] = []

    def remembered(inputs: Any, result: Result) -> Any:
        if not found:
            found.append(expected(inputs, result))
        return found[0]

    return remembered


def _checked(
    case: Case,
    variant: Variant,
    inputs: Any,
    expected: Callable[[Any, Result], Mapping[str, tuple[Tensor | None, Tensor]]],
    allowed: tuple[float, float],
) -> tuple[tuple[str, str, float | None], int | None]:
    """Status, reason and error of a variant, and the tokens of its result."""
    if variant.absent:
        return ("absent", variant.absent, None), None
    try:
        result = variant.run(inputs)
    # A rival may raise anything; it is shown in the table, and the run goes on.
    except Exception as error:
        return ("failed", _one_line(error), None), None
    try:
        error = error_of(result, expected(inputs, result), allowed)
    except torch.OutOfMemoryError as error:
        return ("failed", f"no room for the float64 check: {_one_line(error)}", None), None
    if not error <= 1.0:
        return ("refused", f"wrong result: its error is {error:.3g} times what is allowed", error), None
    return ("ok", "", error), case.tokens(result) if case.tokens else None


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:160]}"


def _row(
    case: Case,
    preset: Preset,
    variant: Variant,
    state: tuple[str, str, float | None],
    seconds: Mapping[str, Sequence[float]],
    memory: Mapping[str, int | None],
    floor_time: float,
    tokens: int | None,
) -> Row:
    status, reason, error = state
    timing = summary(seconds[variant.name]) if variant.name in seconds else None
    peak = memory.get(variant.name)
    return Row(
        op=case.op,
        case=case.name,
        shape=case.shape_text,
        dtype=case.dtype_text,
        preset=preset.name,
        variant=variant.name,
        kind=variant.kind,
        version=variant.version,
        status=status,
        reason=reason,
        median=timing and timing.median,
        p20=timing and timing.low,
        p80=timing and timing.high,
        ratio=timing and timing.median / floor_time,
        gb_per_s=case.num_bytes / timing.median / 1e9 if timing and case.num_bytes else None,
        tflops=case.flops / timing.median / 1e12 if timing and case.flops else None,
        tokens_per_s=tokens / timing.median if timing and tokens else None,
        peak_mib=None if peak is None else peak / 2**20,
        error=error,
        machine=machine_slug(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        date=today(),
        commit=commit(),
    )
