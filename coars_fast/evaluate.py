"""Evaluate both agents on held-out users: conversations (greedy and sampled) and the F1-disc test of the user agent.

    python -m coars_fast.evaluate RUN            # the adapters of a finished or running run, in which nothing changes

Figures and protocol are DESIGN section 8's: Hit@1 of the last recommendation, F1-loop per turn, F1-disc on 20 items at
1:1, 1:3 and 1:9, all with 95% bootstrap intervals over users. No reference is ever written here, and nothing is
trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from coars_fast import cli
from coars_fast.build import Parts
from coars_fast.config import Config, DataConfig
from coars_fast.config_checks import check
from coars_fast.data.playable import DISC_RATIOS, check_tasks
from coars_fast.data.records import DiscriminationTask
from coars_fast.data.splits import make_split, other_eval_users
from coars_fast.data.tasks import TaskSource
from coars_fast.errors import ConfigError
from coars_fast.game.episode import USER, Episode, Reply, judgement_prompt
from coars_fast.game.metrics import (
    CONFUSION,
    Interval,
    Metric,
    Resampler,
    Table,
    episode_counts,
    f1,
    label_name,
    metrics_of,
    table,
)
from coars_fast.game.prompts import Judgement, parse_judgement
from coars_fast.memory import fresh_episodes
from coars_fast.progress import Screen
from coars_fast.resume import load_run
from coars_fast.rollout.grammar import judgement_endings, reply_grammar
from coars_fast.rollout.play import ask, play
from coars_fast.state.files import atomic_write_text, json_text

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """Counts per user of every part; figures are made from them, alone or paired with another evaluation's."""

    tables: dict[str, Table]
    """By part: `greedy`, `sampled`, `disc@1:1`, ..."""
    episodes: list[Episode]
    """The greedy conversations (none when read from a file)."""

    def counts(self) -> dict[str, dict[str, list[float]]]:
        """The tables as plain lists, for evaluation.json: paired tests between runs need them."""
        return {part: {name: column.tolist() for name, column in t.items()} for part, t in self.tables.items()}

    @classmethod
    def read(cls, record: Mapping[str, Any], which: str) -> Evaluation | None:
        """The evaluation `before` or `after` of what evaluation.json holds; None where there is none yet."""
        stored = record.get("users", {}).get(which)
        if stored is None:
            return None
        tables = {part: {name: np.array(c) for name, c in t.items()} for part, t in stored.items()}
        return cls(tables, [])

    def metrics(self, config: Config) -> dict[str, Interval]:
        """Every metric by its public name with its interval."""
        return {name: sampler.interval(counts, metric) for name, counts, metric, sampler in self._each(config)}

    def difference(self, before: Evaluation, config: Config) -> dict[str, Interval]:
        """This minus `before`, paired by user."""
        old = {name: counts for name, counts, _, _ in before._each(config)}
        return {
            name: sampler.difference(old[name], counts, metric) for name, counts, metric, sampler in self._each(config)
        }

    def _each(self, config: Config) -> list[tuple[str, Table, Metric, Resampler]]:
        found = []
        for part, counts in self.tables.items():
            sampler = Resampler(len(next(iter(counts.values()))), config.eval.num_bootstrap, config.data.eval_seed)
            found += [(name, counts, metric, sampler) for name, metric in metrics_of(part).items()]
        return found


def evaluate(parts: Parts, *, short: bool = False, progress: Progress | None = None) -> Evaluation:
    """Play and judge with the model as it is.

    Args:
        parts: model, data and templates.
        short: greedy conversations only, as for a learning curve.
        progress: called with (part, done, of).
    """
    config = parts.config

    def report(part: str) -> Callable[[int, int], None]:
        return lambda done, of: progress(part, done, of) if progress else None

    greedy = _conversations(parts, config, 0.0, 0, report("greedy"))
    tables = {"greedy": table([episode_counts(episode) for episode in greedy])}
    if not short:
        rows: list[dict[str, float]] = [dict.fromkeys(tables["greedy"], 0.0) for _ in greedy]
        for sample in range(config.eval.num_samples):
            for row, episode in zip(
                rows, _conversations(parts, config, 1.0, 1 + sample, report("sampled")), strict=True
            ):
                for name, count in episode_counts(episode).items():
                    row[name] += count
        if config.eval.num_samples:
            tables["sampled"] = table(rows)
        for ratio in DISC_RATIOS:
            tasks = parts.tasks.disc_tasks(ratio)
            if tasks:
                tables[f"disc@1:{ratio}"] = table(discriminate(parts, config, tasks, report(f"disc 1:{ratio}")))
    return Evaluation(tables, greedy)


def _conversations(
    parts: Parts, config: Config, temperature: float, sample: int, progress: Callable[[int, int], None]
) -> list[Episode]:
    seed = config.data.eval_seed * 1009 + sample
    tasks = parts.tasks.eval_tasks
    episodes = fresh_episodes(parts, tasks, seed=seed, temperature=temperature, resample_invalid=True)
    play(
        parts.decoder,
        episodes,
        seed=seed,
        temperature=temperature,
        max_reply_tokens=config.rollout.max_reply_tokens,
        batch_size=config.rollout.batch_size,
        resample_invalid=True,
        constrained=config.rollout.constrained,
        kv_gib=config.rollout.kv_gib,
        attention=config.rollout.attention,
        progress=progress,
    )
    return episodes


def discriminate(
    parts: Parts, config: Config, tasks: Sequence[DiscriminationTask], progress: Callable[[int, int], None]
) -> list[dict[str, float]]:
    """F1-disc: the user agent judges each item alone, greedily; an unreadable reply is drawn once more, then wrong."""
    asked = [(t, i) for t, task in enumerate(tasks) for i in range(len(task.items))]
    prompts = [
        judgement_prompt(
            tasks[t].history, tasks[t].items[i], parts.dataset.titles, tasks[t].peer_counts[i], tasks[t].num_peers,
            parts.codec, parts.template, config.game,
        )
        for t, i in asked
    ]  # fmt: skip
    rows: list[dict[str, float]] = [dict.fromkeys((*CONFUSION, "user_replies"), 0.0) for _ in tasks]
    for (t, i), judgement in zip(asked, _judge(parts, config, prompts, progress), strict=True):
        label = tasks[t].labels[i]
        positive = not label if judgement is None else judgement.positive
        rows[t][label_name(label, positive)] += 1
        rows[t]["user_replies"] += 1
    for row in rows:
        row["episodes"] = 1.0
        row["f1"] = float(f1(table([row]))[0])
    return rows


def _judge(
    parts: Parts, config: Config, prompts: list[list[int]], progress: Callable[[int, int], None]
) -> list[Judgement | None]:
    """Parsed replies (None: unreadable twice) of the user agent to prompts that end with its header."""
    codec, template, limit = parts.codec, parts.template, config.rollout.max_reply_tokens

    def parse(reply: Reply) -> Judgement | None:
        ended = reply.ids[-1] == template.end_of_turn
        return parse_judgement(codec.decode(reply.ids[:-1])) if ended else None

    replies = ask(
        parts.decoder,
        prompts,
        USER,
        control=template.control,
        is_valid=lambda reply: parse(reply) is not None,
        seed=config.data.eval_seed,
        temperature=0.0,
        max_reply_tokens=limit,
        batch_size=config.rollout.batch_size,
        constraint=(lambda: reply_grammar(codec, template, judgement_endings(), limit))
        if config.rollout.constrained
        else None,
        kv_gib=config.rollout.kv_gib,
        attention=config.rollout.attention,
        progress=progress,
    )
    return [parse(reply) for reply in replies]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluate the adapters of a run on held-out users."""

    run: tyro.conf.Positional[str]
    """Run folder."""
    eval_seed: int | None = None
    """Other candidates and sampling noise than the run's, and another order of its held-out users."""
    num_eval_users: int | None = None
    """How many users, if not as many as the run's; there are no more than the run held out."""
    candidates: str | None = None
    """Other candidates than the run's (see `data.candidates`); figures of different modes are not comparable."""
    constrained: bool = False
    """Hold replies to their format, so that every one can be read; figures are not comparable with others."""
    out: str | None = None
    """Where to write the figures. Default: `RUN/evaluation-<settings>.json`."""


def evaluated_by(parts: Parts, data: DataConfig, screen: Screen) -> Parts:
    """A run with an evaluation of other settings, on users that it did not train on if it held some out.

    Raises:
        DataError: there are too few items for other candidates.
    """
    before, dataset = parts.tasks, parts.dataset
    config = replace(parts.config, data=data)
    if data.hold_out_users:
        split = other_eval_users(before.split, parts.config.data, data)
    else:
        split = make_split(dataset, data)
    for warning in check_tasks(dataset, split, config):
        screen.say(f"note: {warning}")
    return replace(parts, config=config, tasks=TaskSource(dataset, config, before.maker.sasrec, split))


def evaluate_run(options: EvaluateConfig) -> Path:
    """Evaluate the newest adapters of a run; prints a table, writes a JSON file and returns its path."""
    folder = Path(options.run)
    config = cli.read_run_config(folder)
    if options.out is not None and not Path(options.out).parent.is_dir():
        raise ConfigError(f"--out {options.out}: no folder {Path(options.out).parent}; make it first")
    changes: dict[str, Any] = {
        name: value
        for name in ("eval_seed", "num_eval_users", "candidates")
        if (value := getattr(options, name)) is not None
    }
    data = replace(config.data, **changes)
    check(replace(config, data=data))
    if options.constrained:
        config = replace(config, rollout=replace(config.rollout, constrained=True))
        changes["constrained"] = True
    screen = Screen()
    parts = load_run(config, folder, screen)
    if data != config.data:
        parts = evaluated_by(parts, data, screen)
    with screen.bar("evaluation", 100) as advance:
        found = evaluate(parts, progress=lambda part, done, of: advance(100 * done // of, part))
    figures = found.metrics(parts.config)
    for name, interval in figures.items():
        screen.say(f"{name:28} {interval['value']:.3f}  [{interval['low']:.3f}, {interval['high']:.3f}]")
    suffix = "-".join(f"{name}-{value}" for name, value in changes.items()) or "again"
    path = Path(options.out) if options.out else folder / f"evaluation-{suffix}.json"
    users = [task.user for task in parts.tasks.eval_tasks]
    record = {"metrics": figures, "settings": changes, "users": found.counts(), "ids": users}
    atomic_write_text(path, json_text(record))
    screen.say(f"written to {path}")
    return path


@cli.main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    evaluate_run(cli.parse(EvaluateConfig, argv, "python -m coars_fast.evaluate"))


if __name__ == "__main__":
    main()
