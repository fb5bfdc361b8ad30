"""Figures of finished conversations, with bootstrap intervals over users (DESIGN section 8).

Every metric is a function of sums over users, so that resampling users is a product of counts with a table. An
evaluation's table has one row per user and one column per count below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from coars_fast.game.episode import Episode

Table = dict[str, np.ndarray]
"""Counts by name, [U] each."""
Interval = dict[str, float]
"""`value`, `low`, `high`."""
Metric = Callable[[Mapping[str, np.ndarray]], np.ndarray]

CONFUSION: tuple[str, ...] = ("true_positives", "false_positives", "false_negatives", "true_negatives")
COUNTS: tuple[str, ...] = (
    *("episodes", "hits", "first_hits", "turns", "repeats", "later_turns", "excluded"),
    *("rec_replies", "rec_invalid", "user_replies", "user_invalid"),
    *CONFUSION,
)


def episode_counts(episode: Episode) -> dict[str, float]:
    """Counts of one episode. An invalid reply counts as a miss (recommender) or as the wrong label (user)."""
    counts = dict.fromkeys(COUNTS, 0.0)
    counts["episodes"] = 1
    counts["turns"] = counts["rec_replies"] = len(episode.turns)
    counts["hits"], counts["first_hits"] = episode.turns[-1].hit, episode.turns[0].hit
    counts["later_turns"] = len(episode.turns) - 1
    seen = set()
    for turn in episode.turns:
        counts["rec_invalid"] += turn.item is None
        counts["repeats"] += turn.item is not None and turn.item in seen
        seen.add(turn.item)
        counts["excluded"] += turn.reward is not None and turn.reward.excluded
        if turn.user_spoke:
            counts["user_replies"] += 1
            counts["user_invalid"] += turn.judgement is None
            positive = not turn.hit if turn.judgement is None else turn.judgement.positive
            counts[label_name(turn.hit, positive)] += 1
    return counts


def label_name(truth: bool, positive: bool) -> str:
    """Cell of the confusion table."""
    return f"{'true' if truth == positive else 'false'}_{'positives' if positive else 'negatives'}"


def table(rows: Sequence[Mapping[str, float]]) -> Table:
    """One row of counts per user -> a table."""
    return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.zeros_like(np.asarray(bottom, dtype=np.float64)), where=np.asarray(bottom) > 0)


def f1(s: Mapping[str, np.ndarray]) -> np.ndarray:
    return _ratio(2 * s["true_positives"], 2 * s["true_positives"] + s["false_positives"] + s["false_negatives"])


def _positives(s: Mapping[str, np.ndarray]) -> np.ndarray:
    return s["true_positives"] + s["false_positives"]


CONVERSATION: dict[str, Metric] = {
    "hit@1": lambda s: _ratio(s["hits"], s["episodes"]),
    "hit@1_first_turn": lambda s: _ratio(s["first_hits"], s["episodes"]),
    "mean_turns": lambda s: _ratio(s["turns"], s["episodes"]),
    "repeat_rate": lambda s: _ratio(s["repeats"], s["later_turns"]),
    "user_f1": f1,
    "user_precision": lambda s: _ratio(s["true_positives"], _positives(s)),
    "user_recall": lambda s: _ratio(s["true_positives"], s["true_positives"] + s["false_negatives"]),
    "acceptance": lambda s: _ratio(_positives(s), s["user_replies"]),
    "false_positive_rate": lambda s: _ratio(s["false_positives"], s["false_positives"] + s["true_negatives"]),
    "exclusion_rate": lambda s: _ratio(s["excluded"], s["turns"]),
    "parse_failure_rec": lambda s: _ratio(s["rec_invalid"], s["rec_replies"]),
    "parse_failure_user": lambda s: _ratio(s["user_invalid"], s["user_replies"]),
}
DISCRIMINATION: dict[str, Metric] = {
    "user_f1_disc": f1,
    "user_precision_disc": lambda s: _ratio(s["true_positives"], _positives(s)),
    "acceptance_disc": lambda s: _ratio(_positives(s), s["user_replies"]),
    "user_f1_disc_macro": lambda s: _ratio(s["f1"], s["episodes"]),
}


def metrics_of(part: str) -> dict[str, Metric]:
    """The metrics of a part of an evaluation (`greedy`, `sampled`, `disc@1:3`, ...) by their public names."""
    if part.startswith("disc"):
        metrics, suffix = DISCRIMINATION, part.removeprefix("disc")
    else:
        metrics, suffix = CONVERSATION, "" if part == "greedy" else "_sampled"
    return {name + suffix: metric for name, metric in metrics.items()}


class Resampler:
    """Resamples users: the same draws for everything that is compared.

    Args:
        num_users: rows of the tables.
        num_bootstrap: resamples.
        seed: of the draws.
    """

    def __init__(self, num_users: int, num_bootstrap: int, seed: int):
        rng = np.random.default_rng([seed, num_users])
        self.draws = rng.multinomial(num_users, np.full(num_users, 1 / num_users), size=num_bootstrap).astype(float)

    def values(self, counts: Table, metric: Metric) -> tuple[float, np.ndarray]:
        """The metric on all users, and on each resample [B]."""
        total = {name: column.sum(keepdims=True) for name, column in counts.items()}
        resampled = {name: self.draws @ column for name, column in counts.items()}
        return float(metric(total)[0]), metric(resampled)

    def interval(self, counts: Table, metric: Metric) -> Interval:
        """Value and 95% percentile interval."""
        value, resampled = self.values(counts, metric)
        low, high = np.percentile(resampled, [2.5, 97.5])
        return {"value": value, "low": float(low), "high": float(high)}

    def difference(self, before: Table, after: Table, metric: Metric) -> Interval:
        """`after` minus `before`, paired by user."""
        first, first_resampled = self.values(before, metric)
        second, second_resampled = self.values(after, metric)
        low, high = np.percentile(second_resampled - first_resampled, [2.5, 97.5])
        return {"value": second - first, "low": float(low), "high": float(high)}
