"""The synthetic world of the embedded default: a catalogue whose titles show a genre and a style, and users with
tastes.

A title is a compound and a noun: "Softstar Diary" is calm (soft) and about space (star). Words mean the same in every
world; the catalogue, what is popular, the users and their histories are drawn anew from the seed. So a model that was
pretrained on many worlds can read a new one, and has to find out what its users like. What it leaves out: drifting
tastes, series, anything that a title does not show.
"""

from __future__ import annotations

import numpy as np

from coars_fast.config import WorldConfig
from coars_fast.data.records import Dataset
from coars_fast.errors import ConfigError

# Styles stand in order of fashion, and so do the stems of a genre: the first is the most popular in every world.
STYLES: dict[str, str] = {"epic": "Grand", "funny": "Silly", "dark": "Grim", "odd": "Strange", "calm": "Soft"}
"""Style -> its stem."""
GENRES: dict[str, tuple[str, ...]] = {
    "space": ("star", "comet"),
    "crime": ("heist", "alibi"),
    "nature": ("river", "moss"),
    "music": ("song", "drum"),
    "sport": ("race", "goal"),
}
"""Genre -> its stems."""
NOUNS = tuple(
    "Diary Papers Club Road House Letters Garden Winter Brothers Code Island Mirror "
    "Castle Summer Sisters Bridge Secret Market Tower Harbor Lantern Window Forest Kitchen".split()
)
KINDS: dict[str, tuple[str, str]] = {
    style_stem + genre_stem: (style, genre)
    for style, style_stem in STYLES.items()
    for genre, genre_stems in GENRES.items()
    for genre_stem in genre_stems
}
"""(style, genre) of every compound."""
FASHION: dict[str, float] = {
    style_stem + genre_stem: 1.0 / (1.0 + s + 0.5 * g)
    for s, style_stem in enumerate(STYLES.values())
    for genre_stems in GENRES.values()
    for g, genre_stem in enumerate(genre_stems)
}

# How often a user's item fits both tastes, only the genre, only the style, neither.
MATCH_RATES = (0.76, 0.12, 0.08, 0.04)
MAX_ITEMS = len(KINDS) * len(NOUNS)


def kind(title: str) -> tuple[str, str]:
    """(style, genre) of a world's title."""
    return KINDS[title.partition(" ")[0]]


def fashion(title: str) -> float:
    """How fashionable a title's compound is, in (0, 1]; the same in every world."""
    return FASHION[title.partition(" ")[0]]


def draw_titles(num_items: int, rng: np.random.Generator) -> list[str]:
    """`num_items` different titles in random order."""
    compounds = list(KINDS)
    picks = rng.permutation(MAX_ITEMS)[:num_items]
    return [f"{compounds[p // len(NOUNS)]} {NOUNS[p % len(NOUNS)]}" for p in picks]


def draw_history(
    taste: tuple[str, str],
    kinds: np.ndarray,
    popularity: np.ndarray,
    length: int,
    rng: np.random.Generator,
) -> list[int]:
    """Items that a user with this (style, genre) taste takes, one after the other, none twice.

    Args:
        taste: liked (style, genre).
        kinds: [I, 2] style and genre names of the items.
        popularity: [I] positive weights.
        length: how many items.
    """
    fits_style, fits_genre = kinds[:, 0] == taste[0], kinds[:, 1] == taste[1]
    classes = [fits_style & fits_genre, ~fits_style & fits_genre, fits_style & ~fits_genre, ~fits_style & ~fits_genre]
    taken: list[int] = []
    free = np.ones(len(kinds), dtype=bool)
    for drawn in rng.choice(4, size=length, p=MATCH_RATES):
        mask = classes[drawn] & free
        if not mask.any():
            mask = free
        weights = np.where(mask, popularity, 0.0)
        item = int(rng.choice(len(kinds), p=weights / weights.sum()))
        free[item] = False
        taken.append(item)
    return taken


def make_world(config: WorldConfig) -> Dataset:
    """Draw a world: the same configuration gives the same one.

    Raises:
        ConfigError: more items than titles exist, or histories longer than half the catalogue.
    """
    if not 50 <= config.num_items <= MAX_ITEMS:
        raise ConfigError(f"world.num_items: {config.num_items} must be between 50 and {MAX_ITEMS}")
    if not 4 <= config.interactions_per_user <= config.num_items // 2:
        raise ConfigError(
            f"world.interactions_per_user: {config.interactions_per_user} must be between 4 and half of world.num_items"
        )
    if config.num_users < 10:
        raise ConfigError(f"world.num_users: {config.num_users} must be at least 10")
    rng = np.random.default_rng([config.seed, 20_604])
    titles = draw_titles(config.num_items, rng)
    kinds = np.array([kind(title) for title in titles])
    popularity = np.array([fashion(title) for title in titles]) * rng.lognormal(0.0, 0.5, size=len(titles))
    styles, genres = list(STYLES), list(GENRES)
    sequences = []
    for _ in range(config.num_users):
        taste = (styles[rng.integers(len(styles))], genres[rng.integers(len(genres))])
        sequences.append(tuple(draw_history(taste, kinds, popularity, config.interactions_per_user, rng)))
    return Dataset(
        name=f"synthetic world {config.seed}",
        titles=tuple(titles),
        sequences=tuple(sequences),
        user_ids=tuple(f"u{u}" for u in range(config.num_users)),
        item_ids=tuple(f"i{i}" for i in range(config.num_items)),
    )
