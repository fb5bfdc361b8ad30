"""The benches' clock work: quantiles, order, the check before the clock, presets."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.harness import Case, Variant, copies, error_of, run_case
from bench.presets import PRESETS, BenchError, Preset, choose_preset
from bench.rivals import Rival
from bench.roofline import Roofline
from bench.timing import interleaved, summary

PRESET = Preset("smoke", 2, math.inf, "float32", False)


class Clock:
    """Moves only when a variant does."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, []

    def variant(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.calls.append(name)
            self.now += seconds

        return run


def test_quantiles_are_linear_between_neighbours() -> None:
    timing = summary([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (timing.median, timing.low, timing.high) == pytest.approx((3.5, 2.0, 5.0))


def test_every_round_times_each_variant_once_and_warm_up_is_not_timed() -> None:
    clock = Clock()
    variants = {name: clock.variant(name, seconds) for name, seconds in (("a", 1.0), ("b", 10.0), ("c", 100.0))}
    seconds = interleaved(variants, rounds=6, warm_up=2, clock=lambda: clock.now)
    assert seconds == {"a": [1.0] * 6, "b": [10.0] * 6, "c": [100.0] * 6}
    rounds = [clock.calls[i : i + 3] for i in range(0, len(clock.calls), 3)]
    assert len(rounds) == 8 and all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1


def test_slow_cases_get_fewer_rounds_but_two_at_least() -> None:
    clock = Clock()
    variants = {"a": clock.variant("a", 3.0)}
    seconds = interleaved(variants, rounds=9, warm_up=1, limit=10.0, clock=lambda: clock.now)
    assert seconds == {"a": [3.0] * 3}
    assert len(interleaved(variants, rounds=9, warm_up=1, limit=1.0, clock=lambda: clock.now)["a"]) == 2


@dataclass
class Numbers:
    values: Tensor


def double_case(*variants: Variant) -> Case:
    """2 x, with what the tests do to it."""
    return Case(
        op="double",
        name="plain",
        shape={"R": 8},
        dtype=torch.float32,
        device="cpu",
        inputs=lambda seed: Numbers(torch.arange(8.0) + seed),
        variants=variants,
        expected=lambda inputs, _: {"out": (None, 2.0 * inputs.values.double())},
        flops=8.0,
        num_bytes=64.0,
    )


def right(inputs: Numbers) -> dict[str, Tensor]:
    return {"out": 2 * inputs.values}


def broken(_: Numbers) -> dict[str, Tensor]:
    raise RuntimeError("no such kernel\nand more")


def test_a_wrong_variant_gets_no_time_and_is_named() -> None:
    wrong = Variant("rounded", lambda inputs: {"out": 2.001 * inputs.values}, "ours", "1")
    poisoned = Variant("poisoned", lambda inputs: {"out": torch.full((8,), torch.nan)})
    outcome = run_case(double_case(Variant("right", right, "ours", "1"), wrong, poisoned), PRESET, Roofline(1e9, 1e9))
    rows = {row.variant: row for row in outcome.rows}
    assert rows["right"].status == "ok" and rows["right"].ratio is not None and rows["right"].median is not None
    assert rows["rounded"].status == rows["poisoned"].status == "refused"
    assert rows["rounded"].median is None and set(outcome.seconds) == {"right"}
    assert len(outcome.problems) == 1, "a rival's wrong result is shown, and is not our failure"
    assert "double" in outcome.problems[0] and "rounded" in outcome.problems[0] and "error" in outcome.problems[0]


def test_a_rival_that_raises_does_not_fail_the_case_and_ours_does() -> None:
    outcome = run_case(double_case(Variant("theirs", broken), Variant("right", right)), PRESET, Roofline(1e9, 1e9))
    rows = {row.variant: row for row in outcome.rows}
    assert (rows["theirs"].status, rows["theirs"].reason) == ("failed", "RuntimeError: no such kernel")
    assert outcome.problems == []
    assert run_case(double_case(Variant("o", broken, "ours", "1")), PRESET, Roofline(1e9, 1e9)).problems


def test_a_rival_that_runs_out_of_memory_later_loses_its_time_alone() -> None:
    calls = []

    def once(inputs: Numbers) -> dict[str, Tensor]:
        calls.append(1)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("no memory is left")
        return right(inputs)

    outcome = run_case(double_case(Variant("theirs", once), Variant("right", right)), PRESET, Roofline(1e9, 1e9))
    rows = {row.variant: row for row in outcome.rows}
    assert (rows["theirs"].status, rows["theirs"].reason) == ("failed", "OutOfMemoryError: no memory is left")
    assert rows["right"].status == "ok" and set(outcome.seconds) == {"right"} and outcome.problems == []


def test_an_absent_rival_is_a_row_with_its_reason() -> None:
    def load() -> Callable[..., Tensor]:
        import a_kernel_library_that_nobody_has  # type: ignore[import-not-found]

        return a_kernel_library_that_nobody_has.f

    rival = Rival("theirs", "a-kernel-library-that-nobody-has", load)
    absent = Variant(rival.name, lambda inputs: {}, version=rival.version, absent=rival.missing())
    outcome = run_case(double_case(Variant("right", right), absent), PRESET, Roofline(1e9, 1e9))
    row = next(row for row in outcome.rows if row.variant == "theirs")
    assert row.status == "absent" and "not installed" in row.reason and "a_kernel_library_that_nobody_has" in row.reason
    assert outcome.problems == []


def test_a_rival_whose_import_fails_is_absent_too() -> None:
    def load() -> Callable[..., Tensor]:
        raise RuntimeError("0 active drivers")

    assert Rival("theirs", "torch", load).missing() == "import failed: RuntimeError: 0 active drivers"


def test_errors_are_parts_of_what_is_allowed() -> None:
    exact = {"logp_x": (torch.tensor([1]), torch.tensor([-100.0], dtype=torch.float64))}
    assert error_of({"logp_x": torch.tensor([9.0, -101.0])}, exact, (1e-2, 1.0)) == pytest.approx(1.0)
    assert error_of({}, exact, (1e-2, 1.0)) == float("inf")


def test_small_inputs_take_turns_and_large_ones_need_not() -> None:
    def make(seed: int) -> Numbers:
        return Numbers(torch.full((8,), float(seed)))

    assert len({float(one.values[0]) for one in copies(make(0), make)}) == 16
    assert len(copies(Numbers(torch.empty(2**30, device="meta")), make)) == 1


def test_an_unknown_preset_names_the_choices() -> None:
    with pytest.raises(BenchError, match=r"no preset 'laptop'; choose smoke, cpu, h100"):
        choose_preset("laptop", False)
    assert choose_preset(None, False) is PRESETS["smoke"] and choose_preset(None, True) is PRESETS["h100"]


def test_pytest_says_it_in_one_line() -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "pytest", "bench/test_head.py", "--preset", "laptop", "-p", "no:cacheprovider"]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert found.returncode == 4
    assert found.stderr.strip() == "ERROR: --preset: no preset 'laptop'; choose smoke, cpu, h100"
