"""How well a model ranks the held-out item: among all items that the user had not taken, or among sampled ones.

Full ranking says how good a generator of candidates is. Ranking against sampled negatives is far easier and flatters
weak models (Krichene and Rendle, KDD 2020); it is there to compare with figures that were published that way.

Shapes: U users, V items, N negatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

_BLOCK = 256  # histories scored at a time


class Scorer(Protocol):
    """What ranks: SASRec, or anything like it."""

    def score(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """[U, V] scores of every item as the next one."""
        ...


def ranking_metrics(scores: np.ndarray, targets: Sequence[int] | np.ndarray, k: int = 10) -> dict[str, float]:
    """Hit rate and NDCG of one relevant item per row, among all items: {"hr@k": ..., "ndcg@k": ...}.

    Args:
        scores: [U, V]; -inf leaves an item out. Items that tie with the target count as ranked above it.
        targets: [U] the relevant items.

    Raises:
        ValueError: other shapes, no row, a target outside 0..V-1, or NaN scores.
    """
    targets = np.asarray(targets, dtype=np.int64)
    if scores.ndim != 2 or targets.shape != scores.shape[:1] or not len(targets):
        raise ValueError(f"scores: expected [U, V] for the {targets.shape} targets, found {scores.shape}")
    if targets.min() < 0 or targets.max() >= scores.shape[1]:
        raise ValueError(f"targets: outside 0..{scores.shape[1] - 1}")
    if np.isnan(scores).any():
        raise ValueError("scores: hold NaN")
    own = np.take_along_axis(scores, targets[:, None], axis=1)
    rank = (scores >= own).sum(axis=1)  # from 1
    gain = np.where(rank <= k, 1.0 / np.log2(rank + 1.0), 0.0)
    return {f"hr@{k}": float((rank <= k).mean()), f"ndcg@{k}": float(gain.mean())}


def full_ranking(
    model: Scorer, histories: Sequence[Sequence[int]], targets: Sequence[int], k: int = 10
) -> dict[str, float]:
    """:func:`ranking_metrics` of the model, items of each history left out, a block of users at a time."""
    total: dict[str, float] = {}
    for start in range(0, len(histories), _BLOCK):
        block = histories[start : start + _BLOCK]
        scores = model.score(block)
        for row, history in zip(scores, block, strict=True):
            row[list(history)] = -np.inf
        for name, value in ranking_metrics(scores, targets[start : start + _BLOCK], k).items():
            total[name] = total.get(name, 0.0) + value * len(block) / len(histories)
    return total


def sampled_ranking(
    model: Scorer,
    histories: Sequence[Sequence[int]],
    targets: Sequence[int],
    *,
    num_negatives: int = 100,
    seed: int = 0,
    k: int = 10,
) -> dict[str, float]:
    """:func:`ranking_metrics` of the model among each target and `num_negatives` items drawn evenly, without
    repetition, from those that the user never took.

    Raises:
        ValueError: a user has fewer such items.
    """
    total: dict[str, float] = {}
    for start in range(0, len(histories), _BLOCK):
        block, wanted = histories[start : start + _BLOCK], list(targets[start : start + _BLOCK])
        scores = model.score(block)
        shown = np.empty((len(block), 1 + num_negatives), dtype=scores.dtype)
        for row, (history, target) in enumerate(zip(block, wanted, strict=True)):
            free = np.ones(scores.shape[1], dtype=bool)
            free[[*history, target]] = False
            pool = np.flatnonzero(free)
            if len(pool) < num_negatives:
                raise ValueError(f"num_negatives: user {start + row} left only {len(pool)} items, not {num_negatives}")
            negatives = np.random.default_rng([seed, start + row]).choice(pool, num_negatives, replace=False)
            shown[row] = scores[row, [target, *negatives.tolist()]]
        for name, value in ranking_metrics(shown, [0] * len(block), k).items():
            total[name] = total.get(name, 0.0) + value * len(block) / len(histories)
    return total
