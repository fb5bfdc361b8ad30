"""One table from the runs of several seeds: what training changed, with two-level bootstrap intervals.

    for s in 11 12 13 14 15; do python -m coars_fast.train --seed $s --world.seed 1$s --data.eval-seed 2$s \\
        --out runs/seed-$s; done
    python -m bench.seeds runs/seed-*

Each resample draws runs with replacement, then users within each drawn run, so the interval holds both kinds of chance.
It reads `evaluation.json` only. With five runs the first level is coarse: the values of every run are shown beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from coars_fast.errors import RunFolderError
from coars_fast.game.metrics import CONVERSATION, DISCRIMINATION, Metric
from coars_fast.state.files import read_json

SHOWN = (
    ("greedy", "hit@1"),
    ("greedy", "hit@1_first_turn"),
    ("sampled", "hit@1"),
    ("disc@1:1", "user_f1_disc"),
    ("disc@1:3", "user_f1_disc"),
    ("greedy", "user_f1"),
    ("greedy", "user_precision"),
    ("greedy", "acceptance"),
    ("disc@1:1", "acceptance_disc"),
    ("greedy", "repeat_rate"),
    ("greedy", "parse_failure_rec"),
    ("greedy", "parse_failure_user"),
    ("sampled", "parse_failure_rec"),
    ("sampled", "parse_failure_user"),
)
NUM_RESAMPLES = 2000


def columns(run: dict, when: str, part: str) -> dict[str, np.ndarray]:
    """Counts per user of one part of an evaluation."""
    return {name: np.array(values) for name, values in run["users"][when][part].items()}


def value(metric: Metric, counts: dict[str, np.ndarray], weights: np.ndarray) -> float:
    """The metric under user weights [U]."""
    return float(metric({name: np.array([weights @ column]) for name, column in counts.items()})[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders with an evaluation.json")
    paths = parser.parse_args().runs
    runs = []
    for path in paths:
        if not (path / "evaluation.json").is_file():
            raise RunFolderError(f"{path}: no evaluation.json; the run is not finished")
        runs.append(read_json(path / "evaluation.json"))
    rng = np.random.default_rng(0)
    print(f"| {len(runs)} runs | before | after | difference | 95% interval | after, each run |")
    print("|---|---|---|---|---|---|")
    for part, name in SHOWN:
        metric = {**CONVERSATION, **DISCRIMINATION}[name]
        pairs = [(columns(run, "before", part), columns(run, "after", part)) for run in runs]
        sizes = [len(next(iter(before.values()))) for before, _ in pairs]

        def both(which: int, weights: np.ndarray, metric=metric, pairs=pairs) -> tuple[float, float]:
            before, after = pairs[which]
            return value(metric, before, weights), value(metric, after, weights)

        exact = np.array([both(i, np.ones(size)) for i, size in enumerate(sizes)])
        resampled = []
        for _ in range(NUM_RESAMPLES):
            drawn = rng.integers(len(runs), size=len(runs))
            weights = [rng.multinomial(sizes[i], np.full(sizes[i], 1 / sizes[i])).astype(float) for i in drawn]
            resampled.append(np.mean([np.diff(both(i, w)) for i, w in zip(drawn, weights, strict=True)]))
        low, high = np.percentile(resampled, [2.5, 97.5])
        before, after = exact.mean(0)
        each = " ".join(f"{x:.3f}" for x in exact[:, 1])
        label = name + ("" if part == "greedy" else part.removeprefix("disc") if "@" in part else f"_{part}")
        print(f"| {label} | {before:.3f} | {after:.3f} | {after - before:+.3f} | {low:+.3f}, {high:+.3f} | {each} |")


if __name__ == "__main__":
    main()
