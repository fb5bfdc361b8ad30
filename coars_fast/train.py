"""Train a recommender agent and a user agent from the conversations that they have with each other (CoARS).

    python -m coars_fast.train                      # the embedded default: minutes on a laptop
    python -m coars_fast.train --help               # every setting

Read this file first: a run builds its parts, evaluates, then repeats the method's step (play episodes, reward the
turns, write hindsight references, pack, update both adapters), evaluates again and writes a report. Everything random
is a function of the seed and the step, so a resumed run needs no random state. What is left to other files: the
conversation (`game/`), playing it (`rollout/`), the update (`learn/`), the figures (`evaluate.py`), checkpoints and
going on from them (`resume.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coars_fast import cli
from coars_fast.config import Config

if TYPE_CHECKING:
    from coars_fast.build import Parts
    from coars_fast.evaluate import Evaluation
    from coars_fast.progress import Screen
    from coars_fast.state.run_folder import RunFolder


def train(config: Config) -> Path:
    """Run a configuration to its end; returns the run folder."""
    from coars_fast.progress import Screen
    from coars_fast.report import write_report
    from coars_fast.resume import find_start, is_complete, run_path
    from coars_fast.state.run_folder import RunFolder

    screen, out = Screen(), run_path(config)
    with RunFolder.open(out, cli.config_to_dict(config), resume=config.resume is not None) as run:
        screen.say(f"run folder {out}")
        start = find_start(config, run)
        if is_complete(run, start, config):
            screen.say(f"all {config.train.num_steps} steps are done and evaluated; raise --train.num-steps to go on")
        else:
            run_steps(config, run, start, screen)
    screen.say(f"report: {write_report(out)}")
    return out


def run_steps(config: Config, run: RunFolder, start: Path | None, screen: Screen) -> None:
    """Everything from a checkpoint (None: from the beginning) to the last evaluation."""
    from coars_fast.build import build
    from coars_fast.diagnosis import diagnose
    from coars_fast.game.trajectory import trajectories
    from coars_fast.learn.step import Learner
    from coars_fast.memory import fresh_episodes
    from coars_fast.resume import restore, save
    from coars_fast.rollout.play import play
    from coars_fast.rollout.teacher import TeacherScores
    from coars_fast.summary import step_line, step_metrics, transcripts

    parts = build(config, run.path, screen, adapters_follow=start is not None)
    learner = Learner(parts.decoder, config)
    before = first_evaluation(parts, run, screen)
    first_step = restore(start, learner)
    run.truncate_after(first_step)
    with screen.bar("CoARS", config.train.num_steps) as advance:
        for step in range(first_step, config.train.num_steps):
            begun = time.perf_counter()
            seed, temperature = config.seed * 1_000_003 + step, config.rollout.temperature
            episodes = fresh_episodes(parts, parts.tasks.train_tasks(step), seed=seed, temperature=temperature)
            scores = TeacherScores(config.game) if config.loss.teacher_placement == "engine" else None
            rollout = play(
                parts.decoder,
                episodes,
                seed=seed,
                temperature=temperature,
                max_reply_tokens=config.rollout.max_reply_tokens,
                batch_size=config.rollout.batch_size,
                kv_gib=config.rollout.kv_gib,
                attention=config.rollout.attention,
                branches=scores,
                watch=lambda figures, done=step: advance(done, f"playing {figures.line()}"),
            )
            diagnose(parts, episodes)
            played = time.perf_counter()
            turns = trajectories(episodes, config.game)  # rewards, weights and references of every turn
            if scores is not None:
                turns = scores.add_to(turns)
            metrics = learner.update(turns, step) | step_metrics(episodes)
            metrics |= {"seconds_rollout": played - begun, "seconds_train": time.perf_counter() - played}
            metrics |= rollout.metrics()
            done = step + 1
            run.append_metrics({"kind": "train", "step": done, **metrics})
            last = done == config.train.num_steps
            if step == 0 or last or done % config.checkpoint.every == 0:
                run.append_episodes(transcripts(episodes[:4], parts.dataset.titles, "train", done))
            if config.eval.every and not last and done % config.eval.every == 0:
                evaluate_briefly(parts, run, done)
            if last or done % config.checkpoint.every == 0:
                save(run, learner, parts, done)
            advance(done, step_line(metrics))
    finish(parts, run, before, screen)


def first_evaluation(parts: Parts, run: RunFolder, screen: Screen) -> Evaluation:
    """The figures before training: from the run folder where a resumed run has them, from `eval.cache`, or played."""
    from coars_fast.cache import shared_evaluation
    from coars_fast.evaluate import Evaluation
    from coars_fast.summary import transcripts

    stored = Evaluation.read(run.evaluation(), "before")
    if stored is not None:
        return stored

    def play() -> dict[str, Any]:
        found = measure(parts, screen, "evaluation before")
        episodes = transcripts(found.episodes[:12], parts.dataset.titles, "eval_before", 0)
        return {"users": {"before": found.counts()}, "episodes": episodes}

    record = shared_evaluation(parts.config, parts.dataset, parts.tasks.split, parts.decoder, screen, play)
    before = Evaluation.read(record, "before")
    assert before is not None
    figures = before.metrics(parts.config)
    run.write_evaluation({"before": figures, "users": record["users"]})
    run.append_metrics({"kind": "evaluation", "step": 0, "metrics": figures})
    run.append_episodes(record["episodes"])
    return before


def measure(parts: Parts, screen: Screen, name: str) -> Evaluation:
    """A full evaluation with its progress bar."""
    from coars_fast.evaluate import evaluate

    with screen.bar(name, 100) as advance:
        return evaluate(parts, progress=lambda part, done, of: advance(100 * done // of, part))


def evaluate_briefly(parts: Parts, run: RunFolder, step: int) -> None:
    """A point of the learning curve."""
    from coars_fast.evaluate import evaluate

    figures = evaluate(parts, short=True).metrics(parts.config)
    run.append_metrics({"kind": "evaluation", "step": step, "metrics": figures})


def finish(parts: Parts, run: RunFolder, before: Evaluation, screen: Screen) -> None:
    """The figures after training, beside those before. Where nothing was trained they are the same."""
    from coars_fast.summary import comparison_table, final_record, transcripts

    step = parts.config.train.num_steps
    after = measure(parts, screen, "evaluation after") if step else before
    record = final_record(parts, before, after)
    run.append_metrics({"kind": "evaluation", "step": step, "metrics": record["after"]})
    run.append_episodes(transcripts(after.episodes[:12], parts.dataset.titles, "eval_after", step))
    run.write_evaluation(record)
    screen.console.print(comparison_table(record))
    for warning in record["warnings"]:
        screen.say(f"warning: {warning}")


@cli.main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    train(cli.parse_config(argv))


if __name__ == "__main__":
    main()
