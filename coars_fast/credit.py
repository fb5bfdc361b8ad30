"""What the teacher says about a run's replies: token credit by kind of token, and whether the reference helps at all.

    python -m coars_fast.credit RUN            # the adapters of a finished or running run; writes RUN/credit.json, .png

Plays training episodes with the run's adapters, scores every reply under its reference, and lets the teacher, the same
model that has read the reference, reply itself. Credit can teach something only where the teacher knows better: where
its own replies are right more often than the student's, and its credit is higher for right replies than for wrong ones.
The teacher here is the `current` one, whatever `loss.teacher` the run has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich import box
from rich.table import Table

from coars_fast import cli
from coars_fast.build import Parts
from coars_fast.config import Config
from coars_fast.data.records import Trajectory
from coars_fast.errors import ConfigError
from coars_fast.game.episode import AGENTS, RECOMMENDER, USER, Episode, Reply, Turn
from coars_fast.game.trajectory import trajectories
from coars_fast.memory import fresh_episodes
from coars_fast.plots import credit_histograms
from coars_fast.progress import Screen
from coars_fast.resume import load_run
from coars_fast.rollout.play import ask, play
from coars_fast.rollout.teacher import TeacherScores
from coars_fast.state.files import atomic_write_text, json_text

KINDS = ("reason", "decision")
"""Tokens before a reply's last `Item:` or `Action:` line, and from there on."""
OUTCOMES = ("right", "wrong", "unreadable")
TokenCredit = dict[tuple[str, str, str], np.ndarray]
"""(agent, outcome, kind) -> clipped credit of each such token."""


@dataclass(frozen=True, kw_only=True)
class CreditConfig:
    """Show what the teacher says about the replies of a run: credit by kind of token, and how often it is right."""

    run: tyro.conf.Positional[str]
    """Run folder."""
    episodes: int = 256
    """Training episodes to play."""
    reference: str | None = None
    """Another reference than the run's: template, truth or empty (see `game.reference`)."""


@dataclass(frozen=True)
class Study:
    """What was found."""

    credit: TokenCredit
    clip: float
    """Bound of the credit."""
    student: dict[str, float]
    """By agent: share of right replies among those that were sampled."""
    teacher: dict[str, float]
    """By agent: the same of replies that the teacher samples in their place."""

    def record(self) -> dict[str, Any]:
        """For credit.json."""
        cells = [
            {"agent": agent, "outcome": outcome, "kind": kind, "tokens": len(values), "mean": float(values.mean()),
             "mean_absolute": float(np.abs(values).mean()), "clipped": float((np.abs(values) >= self.clip).mean())}
            for (agent, outcome, kind), values in self.credit.items() if len(values)
        ]  # fmt: skip
        return {"credit": cells, "right": {"student": self.student, "teacher": self.teacher}}


def study(parts: Parts, num_episodes: int) -> Study:
    """Play training episodes with a model as it is, and ask its teacher about every reply.

    Args:
        parts: model, data and templates; the reference is that of `game.reference`.
        num_episodes: at least as many, in whole steps.
    """
    config, rollout = parts.config, parts.config.rollout
    episodes: list[Episode] = []
    while len(episodes) < num_episodes:
        tasks = parts.tasks.train_tasks(len(episodes) // config.train.episodes_per_step)
        episodes += fresh_episodes(parts, tasks, seed=config.seed, temperature=1.0)
    scores = TeacherScores(config.game)
    play(
        parts.decoder, episodes, seed=config.seed, temperature=1.0, max_reply_tokens=rollout.max_reply_tokens,
        batch_size=rollout.batch_size, kv_gib=rollout.kv_gib, attention=rollout.attention, branches=scores,
    )  # fmt: skip
    found = scores.add_to(trajectories(episodes, config.game))
    credit = _credit(found, episodes, config.loss.credit_clip)
    student, teacher = {}, {}
    for agent in (RECOMMENDER, USER):
        turns = [(episodes[t.episode], turn) for t in found if t.agent == agent for turn in _turns(episodes, t)]
        prompts = [[*t.tokens[: turn.fork], *turn.reference] for t in found if t.agent == agent for turn in t.turns]
        replies = ask(
            parts.decoder, prompts, agent, control=parts.template.control, is_valid=lambda reply: True,
            seed=config.seed, temperature=1.0, max_reply_tokens=rollout.max_reply_tokens,
            batch_size=rollout.batch_size, kv_gib=rollout.kv_gib, attention=rollout.attention,
        )  # fmt: skip
        name = AGENTS[agent]
        student[name] = _share(_outcome(turn, agent) == "right" for _, turn in turns)
        teacher[name] = _share(
            _is_right(episode, turn, agent, reply) for (episode, turn), reply in zip(turns, replies, strict=True)
        )
    return Study(credit, config.loss.credit_clip, student, teacher)


def _share(values: Iterable[bool]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def _turns(episodes: Sequence[Episode], trajectory: Trajectory) -> list[Turn]:
    """The turns behind a trajectory's."""
    turns = episodes[trajectory.episode].turns
    return [turn for turn in turns if trajectory.agent == RECOMMENDER or turn.user_spoke]


def _outcome(turn: Turn, agent: int) -> str:
    """Whether an agent's reply was right, wrong or unreadable."""
    if agent == RECOMMENDER:
        return "unreadable" if turn.item is None else "right" if turn.hit else "wrong"
    if turn.judgement is None:
        return "unreadable"
    return "right" if turn.judgement.positive == turn.hit else "wrong"


def _is_right(episode: Episode, turn: Turn, agent: int, reply: Reply) -> bool:
    """Whether another reply in this place is."""
    if agent == RECOMMENDER:
        choice = episode.named_candidate(reply)
        return choice is not None and episode.task.candidates[choice] == episode.task.target
    judgement = episode.judgement(reply)
    return judgement is not None and judgement.positive == turn.hit


def _credit(found: Sequence[Trajectory], episodes: Sequence[Episode], clip: float) -> TokenCredit:
    """Clipped credit of all tokens, by agent, outcome and kind."""
    values: dict[tuple[str, str, str], list[float]] = {
        (agent, outcome, kind): [] for agent in AGENTS for outcome in OUTCOMES for kind in KINDS
    }
    for t in found:
        assert t.teacher_logp is not None
        credit = np.clip(np.array(t.teacher_logp) - np.array(t.behaviour_logp), -clip, clip)
        first = 0
        for turn, trained in zip(_turns(episodes, t), t.turns, strict=True):
            length = trained.end - trained.start
            part, decides = credit[first : first + length], trained.reason
            before = length if decides is None else decides
            outcome = _outcome(turn, t.agent)
            values[AGENTS[t.agent], outcome, "reason"] += part[:before].tolist()
            values[AGENTS[t.agent], outcome, "decision"] += part[before:].tolist()
            first += length
    return {key: np.array(numbers) for key, numbers in values.items()}


def tables(found: Study) -> list[Table]:
    """What is shown on the screen."""
    shown = Table(title="token credit, clipped, before it is centred", box=box.SIMPLE_HEAD)
    for column in ("agent", "reply", "tokens of the", "count", "mean", "mean |credit|", "clipped"):
        shown.add_column(column, justify="left" if column in ("agent", "reply", "tokens of the") else "right")
    for cell in found.record()["credit"]:
        numbers = (
            f"{cell['tokens']:,}",
            f"{cell['mean']:+.3f}",
            f"{cell['mean_absolute']:.3f}",
            f"{cell['clipped']:.0%}",
        )
        shown.add_row(cell["agent"], cell["outcome"], cell["kind"], *numbers)
    right = Table(title="right replies", box=box.SIMPLE_HEAD)
    for column in ("agent", "student", "teacher, having read the reference"):
        right.add_column(column, justify="left" if column == "agent" else "right")
    for agent in AGENTS:
        right.add_row(agent, f"{found.student[agent]:.1%}", f"{found.teacher[agent]:.1%}")
    return [shown, right]


def study_run(options: CreditConfig) -> Path:
    """Study a run; prints two tables, writes `credit.json` and `credit.png` into its folder and returns the first."""
    if options.episodes < 1:
        raise ConfigError(f"--episodes {options.episodes}: give at least 1")
    folder = Path(options.run)
    config = cli.read_run_config(folder)
    config = replace(config, game=replace(config.game, reference=_reference(config, options.reference)))
    screen = Screen()
    found = study(load_run(config, folder, screen), options.episodes)
    for shown in tables(found):
        screen.console.print(shown)
    credit_histograms(found.credit, folder / "credit.png")
    path = folder / "credit.json"
    atomic_write_text(path, json_text(found.record() | {"reference": config.game.reference}))
    screen.say(f"written to {path} and {folder / 'credit.png'}")
    return path


def _reference(config: Config, asked: str | None) -> Any:
    """The reference to study: one that depends on its own episode alone."""
    reference = asked or config.game.reference
    if reference not in ("template", "truth", "empty"):
        raise ConfigError(f"reference: {reference} cannot be studied here; give --reference template, truth or empty")
    return reference


@cli.main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    study_run(cli.parse(CreditConfig, argv, "python -m coars_fast.credit"))


if __name__ == "__main__":
    main()
