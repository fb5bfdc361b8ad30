"""One training step: two streams against a re-prefilled teacher and a row per turn; and against ordinary trainers.

    python -m pytest bench/test_step.py
    python -m bench.test_step docs/step_turns.svg      # cost against turns, for docs/step.md

`five turns`: conversations of random tokens in the proportions prompt 1200, response 120, partner 80, reference 150,
scaled to fit. All variants have the same head and loss, so that the difference is what their bodies compute. `both
agents`: a rollout of the synthetic world; there the rivals have full logits too, as ordinary trainers do.

Every gradient is checked against a float64 step with full logits and whole contexts before anything is timed. The
learning rate is 0, so that every call does the same. The floor is arithmetic alone, at the speed of a bare `torch.mm`.
Left out: other trainers as a whole; what makes them slower here is what the rivals do.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from bench import large, loops
from bench.harness import Case, Result, Variant
from bench.presets import Preset
from bench.timing import interleaved
from coars_fast import __version__
from coars_fast.data.records import Trajectory
from coars_fast.model.config import DecoderConfig

OURS = f"coars_fast {__version__}"
SMALL = DecoderConfig(
    family="qwen3", vocab_size=4096, hidden_size=384, intermediate_size=1152, num_layers=6, num_heads=6,
    num_kv_heads=3, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip
SCALES = {"smoke": 0.05, "cpu": 0.25, "h100": 1.0}
"""Of the proportions; at `h100` the model is that of `bench/large.py`, with two episodes."""
MOST_TURNS = 8


def conversation(scale: float, turns: int) -> large.Conversation:
    lengths = {"prompt": 1200, "reply": 120, "partner": 80, "reference": 150}
    return large.Conversation(turns=turns, **{name: max(2, round(scale * n)) for name, n in lengths.items()})


def size_of(preset: Preset) -> large.Size:
    """Model and conversations of the case `five turns`."""
    size = replace(large.SIZES[preset.name], step=conversation(SCALES[preset.name], 5))
    if preset.name == "h100":
        return size
    name = "19M shape" if preset.name == "cpu" else "tiny"
    decoder = SMALL if preset.name == "cpu" else size.decoder
    return replace(size, name=name, decoder=decoder, step_episodes=1)


@dataclass
class Spoken:
    """Trajectories of a step."""

    found: list[Trajectory]


Run = Callable[[Sequence[Trajectory]], Result]


def ways(size: large.Size, dtype: torch.dtype) -> dict[str, Run]:
    """The three ways to compute the same gradient."""
    decoder = large.model(size, dtype)
    made = loops.learner(decoder, large.settings())
    return {
        "two streams (Learner.update)": lambda found: loops.update(made, found, eager=False),
        "packed student, teacher re-prefilled": lambda found: loops.update(made, found, eager=False, whole=True),
        "a row per turn, whole contexts": lambda found: loops.update(
            made, loops.row_per_turn(found), eager=False, whole=True
        ),
    }


def five_turns(preset: Preset) -> Case:
    size, dtype = size_of(preset), getattr(torch, preset.dtype)
    shape = (size.step, size.step_episodes)

    def inputs(seed: int) -> Spoken:
        found = large.random_trajectories(size.decoder.vocab_size, *shape, seed)
        return Spoken(large.as_spoken(large.model(size, dtype), found))

    def run(way: str) -> Callable[[Spoken], Result]:
        # The gradient is the mean over episodes, of which the first alone has a weight that counts.
        return lambda x: {"grad": ways_here[way](x.found)["grad"] * len({t.episode for t in x.found})}

    def expected(x: Spoken, _: Result) -> dict[str, tuple[torch.Tensor | None, torch.Tensor]]:
        return loops.exact_gradient(large.model(size, dtype), large.settings(), large.first_episode(x.found))

    ways_here = ways(size, dtype)
    counted = large.random_trajectories(size.decoder.vocab_size, *shape, 0)
    num_tokens = sum(len(t.tokens) for t in counted)
    first, *others = ways_here
    return Case(
        op="step", name=f"five turns, {size.name}",
        shape={"episodes": size.step_episodes, "turns": 5, "student": num_tokens,
               "teacher": sum(t.num_teacher_tokens for t in counted)},
        dtype=dtype, device=loops.DEVICE, inputs=inputs,
        variants=[Variant(first, run(first), "ours", OURS), *(Variant(way, run(way)) for way in others)],
        expected=expected, flops=loops.step_flops(large.skeleton(size.decoder), counted), tokens=lambda _: num_tokens,
        allowed=(1e-4, 1e-3) if dtype == torch.float32 else (5e-2, 5e-2),
    )  # fmt: skip


def synthetic_world(preset: Preset) -> Case:
    here = loops.world(loops.NUM_EPISODES[preset.name])
    found = loops.rewarded(here, loops.play_ours(here))
    rows, student = loops.row_per_turn(found), sum(len(t.tokens) for t in found)
    decoder = here.parts.decoder
    made = loops.learner(decoder, here.parts.config)
    variants = [
        Variant("Learner.update", lambda w: loops.update(made, found, eager=False), "ours", OURS),
        Variant("packed student, teacher re-prefilled, full logits", lambda w: loops.update(made, found, eager=True)),
        Variant("a row per turn, whole contexts, full logits", lambda w: loops.update(made, rows, eager=True)),
    ]
    # fp32 through a model and back: log-probs of 1e-4 accuracy, and gradients in which turns of both signs cancel.
    return Case(
        op="step", name="both agents", shape={"episodes": len(here.tasks)}, dtype=torch.float32,
        device=loops.DEVICE, inputs=lambda seed: here, variants=variants,
        expected=lambda w, _: loops.exact_gradient(decoder, w.parts.config, found),
        flops=loops.step_flops(decoder, found),
        tokens=lambda _: student, allowed=(1e-4, 1e-3),
    )  # fmt: skip


def cases(preset: Preset) -> list[Case]:
    return [synthetic_world(preset), five_turns(preset)]


def test_step(case: Case, measured: Callable[[Case], object]) -> None:
    measured(case)


# ------------------------------------------------------------------------------------------------------ cost by turns


def cost_by_turns(scale: float = 0.1, rounds: int = 3) -> dict[str, list[float]]:
    """Seconds of a processor, of each way for 2 to 8 turns of one episode, all interleaved; a wall clock would show
    what else a shared machine does."""
    size = replace(large.SIZES["cpu"], name="19M shape", decoder=SMALL)
    decoder = large.model(size, torch.float32)
    calls: dict[str, Callable[[], object]] = {}
    for turns in range(2, MOST_TURNS + 1):
        found = large.as_spoken(decoder, large.random_trajectories(SMALL.vocab_size, conversation(scale, turns), 1, 0))
        for way, run in ways(size, torch.float32).items():
            calls[f"{way}|{turns}"] = lambda run=run, found=found: run(found)
    seconds = interleaved(calls, rounds=rounds, clock=time.process_time)
    names = dict.fromkeys(name.partition("|")[0] for name in calls)
    return {way: [statistics.median(seconds[f"{way}|{turns}"]) for turns in range(2, MOST_TURNS + 1)] for way in names}


def main() -> None:
    """Measure, print and draw."""
    from matplotlib import pyplot as plt

    torch.set_num_threads(1)
    found = cost_by_turns()
    unit = found[next(iter(found))][0]
    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    for way, seconds in found.items():
        relative = [value / unit for value in seconds]
        print(way, " ".join(f"{value:.2f}" for value in relative))
        axis.plot(range(2, MOST_TURNS + 1), relative, marker="o", label=way)
    axis.set(xlabel="turns", ylabel="time of a step (2 turns, two streams = 1)", ylim=(0, None))
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(sys.argv[1], metadata={"Date": None})


if __name__ == "__main__":
    main()
