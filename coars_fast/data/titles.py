"""Titles as agents can name them: one line each, never empty, not endless, all different."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

MAX_TITLE = 200
"""Characters that are kept of a title; a shop's may run to thousands, and 20 of them stand in one prompt."""

BLANK = "\u115f\u1160\u2800\u3164\uffa0"
"""Letters and symbols to Unicode (fillers of Hangul, the empty Braille pattern) that show nothing."""


def fold_title(text: str) -> str:
    """One line without control characters: white space (line breaks and blank letters too) becomes single spaces, ends
    are trimmed, and invisible format characters (such as bidirectional overrides) go."""
    kept = []
    for character in text:
        category = unicodedata.category(character)
        if category == "Cf":
            continue
        kept.append(" " if category in ("Cc", "Cs", "Co", "Cn") or character in BLANK else character)
    return " ".join("".join(kept).split())


def unique_titles(titles: Sequence[str], item_ids: Sequence[str]) -> tuple[str, ...]:
    """Fold all titles, cut long ones, and tell equal ones apart: `Untitled [id]` for an empty one, ` [id]` after one
    that an earlier item has (letter case aside, since a reply may name an item in any case)."""
    taken: set[str] = set()
    result = []
    for text, item_id in zip(titles, item_ids, strict=True):
        name = fold_title(item_id)
        title = fold_title(text) or f"Untitled [{name}]"
        if len(title) > MAX_TITLE:
            title = title[: MAX_TITLE - 1].rstrip() + "…"
        while title.casefold() in taken:
            title = f"{title} [{name}]"
        taken.add(title.casefold())
        result.append(title)
    return tuple(result)
