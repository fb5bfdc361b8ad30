"""Records and tables of a run: what goes into metrics.jsonl, episodes.jsonl and evaluation.json, and onto the
screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table as RichTable

from coars_fast.game.episode import Episode
from coars_fast.game.metrics import CONVERSATION, episode_counts, table
from coars_fast.report import installed_versions

if TYPE_CHECKING:
    from coars_fast.build import Parts
    from coars_fast.evaluate import Evaluation

SHOWN = (
    "hit@1 hit@1_sampled hit@1_first_turn mean_turns repeat_rate user_f1 user_precision user_f1_disc@1:1 "
    "user_f1_disc@1:3 user_f1_disc@1:9 acceptance exclusion_rate parse_failure_rec parse_failure_user"
).split()


def step_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Figures of the training episodes of a step (sampled, on training users)."""
    counts = table([episode_counts(episode) for episode in episodes])
    totals = {name: column.sum(keepdims=True) for name, column in counts.items()}
    found = {name: float(metric(totals)[0]) for name, metric in CONVERSATION.items()}
    found["precision"] = found.pop("user_precision")
    for agent in ("rec", "user"):
        rewards = [getattr(turn.reward, agent) for episode in episodes for turn in episode.turns]
        rewards = [reward for reward in rewards if reward is not None]
        found[f"reward_{agent}"] = sum(rewards) / max(1, len(rewards))
    clamped = [turn.judgement.clamped for episode in episodes for turn in episode.turns if turn.judgement]
    found["score_clamped"] = sum(clamped) / max(1, len(clamped))
    return found


def step_line(metrics: Mapping[str, float]) -> str:
    """One step in a line."""
    seconds = metrics["seconds_rollout"] + metrics["seconds_train"]
    return (
        f"hit@1 {metrics['hit@1']:.2f}  reward {metrics['reward_rec']:+.2f} {metrics['reward_user']:+.2f}  "
        f"precision {metrics['precision']:.2f}  acceptance {metrics['acceptance']:.2f}  {seconds:.1f} s"
    )


def transcripts(episodes: Sequence[Episode], titles: Sequence[str], kind: str, step: int) -> list[dict[str, Any]]:
    """Episodes as readable records."""
    return [
        {
            "kind": kind,
            "step": step,
            "user": episode.task.user,
            "target": episode.task.target,
            "target_title": titles[episode.task.target],
            "history": [titles[i] for i in episode.task.history],
            "candidates": [titles[i] for i in episode.task.candidates],
            "turns": [_turn_record(turn, titles) for turn in episode.turns],
        }
        for episode in episodes
    ]


def _turn_record(turn: Any, titles: Sequence[str]) -> dict[str, Any]:
    return {
        "rec_text": turn.rec_text,
        "item_title": None if turn.item is None else titles[turn.item],
        "hit": turn.hit,
        "rec_valid": turn.item is not None,
        "user_text": turn.user_text,
        "action": turn.judgement.action if turn.judgement else None,
        "score": turn.judgement.score if turn.judgement else None,
        "user_valid": turn.judgement is not None or not turn.user_spoke,
        "reward_rec": turn.reward.rec,
        "reward_user": turn.reward.user,
        "excluded": turn.reward.excluded,
    }


def final_record(parts: Parts, before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """evaluation.json: figures before and after, their paired difference, warnings, what they stand beside, and the
    counts of every user (`ids`) for paired tests between runs."""
    config = parts.config
    figures, hits = after.metrics(config), parts.tasks.sasrec_top1_hits
    return {
        "before": before.metrics(config),
        "after": figures,
        "difference": after.difference(before, config),
        "warnings": warnings(figures),
        "info": {
            "data": parts.dataset.name,
            "candidates": config.data.candidates,
            "candidates_hold_truth": parts.tasks.hit_ceiling,
            "sasrec_top1_hit@1": sum(hits) / len(hits),
            "always_yes_f1_disc": {"1:1": 0.667, "1:3": 0.400, "1:9": 0.182},
            "num_eval_users": len(parts.tasks.eval_tasks),
            "versions": installed_versions(),
        },
        "users": {
            "ids": [task.user for task in parts.tasks.eval_tasks],
            "before": before.counts(),
            "after": after.counts(),
            "sasrec_top1": {"greedy": {"episodes": [1.0] * len(hits), "hits": [float(hit) for hit in hits]}},
        },
    }


def warnings(figures: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Signs of a collapse or of a broken format, in words."""
    found = []
    for name in ("acceptance", "acceptance_disc@1:1"):
        value = figures.get(name, {"value": 0.5})["value"]
        if not 0.05 <= value <= 0.95:
            habit = "accepts nearly everything" if value > 0.5 else "accepts next to nothing"
            found.append(f"{name} is {value:.1%}: the user agent {habit}")
    for name in ("parse_failure_rec", "parse_failure_user"):
        if figures[name]["value"] > 0.1:
            found.append(f"{name} is {figures[name]['value']:.1%}: replies are often not in the required format")
    return found


def comparison_table(record: Mapping[str, Any]) -> RichTable:
    """Before, after and difference with 95% intervals; made to fit 80 columns, the width of a log file."""
    title = f"{record['info']['num_eval_users']} held-out users, 95% bootstrap intervals over users"
    shown = RichTable(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("", no_wrap=True)
    for column in ("before", "after", "difference"):
        shown.add_column(column, justify="right", overflow="fold")
    for name in SHOWN:
        if name in record["before"] and name in record["after"]:
            cells = [_cell(record[part][name], sign) for part, sign in (("before", ""), ("after", ""))]
            shown.add_row(name, *cells, _cell(record["difference"][name], "+"))
    return shown


def _cell(interval: Mapping[str, float], sign: str) -> str:
    value, low, high = (_number(interval[part], sign) for part in ("value", "low", "high"))
    return f"{value} ({low}, {high})"


def _number(value: float, sign: str) -> str:
    """Four characters beside the sign: .483, 2.41."""
    return f"{value:{sign}.2f}" if abs(value) >= 0.9995 else f"{value:{sign}.3f}".replace("0.", ".", 1)
