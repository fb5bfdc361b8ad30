"""Titles as agents can name them: one line each, never empty, all different."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def fold_title(text: str) -> str:
    """One line without control characters: white space (line breaks too) becomes single spaces, ends are trimmed, and
    invisible format characters (such as bidirectional overrides) go."""
    kept = []
    for character in text:
        category = unicodedata.category(character)
        if category == "Cf":
            continue
        kept.append(" " if category in ("Cc", "Cs", "Co", "Cn") else character)
    return " ".join("".join(kept).split())


def unique_titles(titles: Sequence[str], item_ids: Sequence[str]) -> tuple[str, ...]:
    """Fold all titles and tell equal ones apart: `Untitled [id]` for an empty one, ` [id]` after one that an earlier
    item has (letter case aside, since a reply may name an item in any case)."""
    taken: set[str] = set()
    result = []
    for text, item_id in zip(titles, item_ids, strict=True):
        title = fold_title(text) or f"Untitled [{item_id}]"
        while title.casefold() in taken:
            title = f"{title} [{item_id}]"
        taken.add(title.casefold())
        result.append(title)
    return tuple(result)
