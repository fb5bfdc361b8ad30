"""Scripted agents of the synthetic world, with systematic faults: what `tiny_base` is pretrained to imitate.

The recommender reads the genre that a user likes but seldom the style: it leans to what is popular. The user sees both
and judges too leniently. Faults are habits, not noise, so that greedy decoding has something to unlearn; the right
behaviour occurs too, less often, so that sampling can find it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from coars_fast.data.world import fashion, kind
from coars_fast.game.prompts import BRIEF, format_judgement, format_recommendation, name_item

POPULAR = "popular"
POPULAR_RATE = 0.8
"""How often the recommender follows fashion instead of the user's style."""

# P(click, star, skip, dislike) by how many of (style, genre) fit the user: 0, 1, 2.
LENIENT = ((0.04, 0.46, 0.35, 0.15), (0.35, 0.35, 0.25, 0.05), (0.85, 0.13, 0.015, 0.005))
STRICT = ((0.0, 0.0, 0.3, 0.7), (0.0, 0.1, 0.7, 0.2), (0.95, 0.05, 0.0, 0.0))
ACTIONS = ("click", "star", "skip", "dislike")
SCORES = {
    "click": (0.80, 0.90, 0.95),
    "star": (0.55, 0.60, 0.70),
    "skip": (0.30, 0.40, 0.45),
    "dislike": (0.05, 0.10, 0.20),
}


def favourite(names: Sequence[str]) -> str:
    """The most frequent name; of equally frequent ones the latest."""
    counts = Counter(names)
    best = max(counts.values())
    return next(name for name in reversed(names) if counts[name] == best)


def taste(history: Sequence[str]) -> tuple[str, str]:
    """(style, genre) that the titles of a history show."""
    kinds = [kind(title) for title in history]
    return favourite([style for style, _ in kinds]), favourite([genre for _, genre in kinds])


def choose(candidates: Sequence[str], style: str, genre: str, tried: set[str]) -> int:
    """Index of the untried candidate that fits best; the style may be `popular`, then fashion decides within the
    genre."""

    def fit(index: int) -> tuple[bool, float, float]:
        title = candidates[index]
        own_style, own_genre = kind(title)
        points = (own_genre == genre) + 0.9 * (own_style == style)
        return title not in tried, points, fashion(title)

    return max(range(len(candidates)), key=fit)


def recommend(
    history: Sequence[str],
    candidates: Sequence[str],
    tried: set[str],
    rng: np.random.Generator,
    popular_rate: float = POPULAR_RATE,
) -> str:
    """A recommender's reply."""
    style, genre = taste(history)
    if rng.random() < popular_rate:
        style = POPULAR
    index = choose(candidates, style, genre, tried)
    return format_recommendation(f"likes {style} {genre}.", name_item(BRIEF, index + 1, candidates[index]))


def fits(history: Sequence[str], title: str) -> tuple[bool, bool]:
    """Whether a title's (style, genre) are the history's."""
    style, genre = taste(history)
    own_style, own_genre = kind(title)
    return own_style == style, own_genre == genre


def judge(
    history: Sequence[str], title: str, rng: np.random.Generator, habits: Sequence[Sequence[float]] = LENIENT
) -> str:
    """A user's reply to a recommended title."""
    action = str(rng.choice(ACTIONS, p=habits[sum(fits(history, title))]))
    return write_judgement(history, title, action, rng)


def write_judgement(history: Sequence[str], title: str, action: str, rng: np.random.Generator) -> str:
    """A user's reply with a given action."""
    (style, genre), (fits_style, fits_genre) = kind(title), fits(history, title)
    words = ("no", "yes")
    reason = f"{style} {words[fits_style]}, {genre} {words[fits_genre]}."
    return format_judgement(reason, action, float(rng.choice(SCORES[action])))
