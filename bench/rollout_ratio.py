"""Episodes a second of `coars_fast.rollout.play` and of transformers' `generate` at every turn, interleaved in one run.

    python -m bench.rollout_ratio                          # the shipped base, 64 episodes of up to 5 turns
    python -m bench.rollout_ratio --shape 55m --rounds 2   # 55M parameters, random weights: minutes
    python -m bench.rollout_ratio --shape 55m --prompts full

Both sample at temperature 1, each with noise of its own; their conversations are about as long, and both counts are
shown. Ratios of processor time are shown beside those of the clock: on a shared machine they are the steadier ones.
That the log-probs are right is tested elsewhere (`tests/parity/test_rollout_logp.py`, `bench/test_rollout.py`).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import transformers

from bench import loops
from coars_fast import __version__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(loops.SHAPES), help="random weights of this shape (default: the base)")
    parser.add_argument("--prompts", choices=["brief", "full"], default="brief", help="as --game.prompts")
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5, help="most turns of an episode")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one that is not")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: its own)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    transformers.logging.set_verbosity_error()
    here = loops.world(given.episodes, given.turns, given.prompts, given.shape, 1.0)
    print(
        f"coars_fast {__version__}, transformers {transformers.__version__}, torch {torch.__version__}, "
        f"{given.threads} threads, {given.episodes} episodes of up to {given.turns} turns, {given.prompts} prompts, "
        f"{given.shape or 'tiny_base'}"
    )
    clock: dict[str, list[float]] = {"play": [], "generate": []}
    work: dict[str, list[float]] = {"play": [], "generate": []}
    for number in range(given.rounds + 1):
        for name, player in (("play", loops.play_ours), ("generate", loops.play_generate)):
            begun, worked = time.perf_counter(), time.process_time()
            episodes = player(here, seed=number)
            seconds, cpu = time.perf_counter() - begun, time.process_time() - worked
            views = [view for episode in episodes for view in episode.views]
            tokens, drawn = sum(len(view.tokens) for view in views), sum(len(view.logp) for view in views)
            print(
                f"{number or 'warm-up'}  {name:9} {seconds:8.2f} s  {cpu:8.2f} s of processor time, {tokens:,} tokens "
                f"of which {drawn:,} drawn",
                flush=True,
            )
            if number:
                clock[name].append(seconds)
                work[name].append(cpu)
    for name, seconds in clock.items():
        median = statistics.median(seconds)
        print(f"{name}: median {median:.2f} s, {given.episodes / median:.1f} episodes/s")
    for name, times in (("clock", clock), ("processor time", work)):
        ratio = statistics.median(times["generate"]) / statistics.median(times["play"])
        print(f"generate / play, medians of {name}: {ratio:.2f}")


if __name__ == "__main__":
    main()
