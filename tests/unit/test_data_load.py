"""The part of a data set that is played with: users and items of enough interactions, counted until both hold."""

from __future__ import annotations

from itertools import compress, product

import numpy as np
import pytest

from coars_fast.config import Config, DataConfig, WorldConfig
from coars_fast.data.load import core, load_dataset
from coars_fast.data.records import Dataset
from coars_fast.errors import DataError

TITLES = "ABCDEF"


def dataset(*sequences: str) -> Dataset:
    """Users u0, u1... who took items A to F in the order of their letters; item A's own name is `a`."""
    return Dataset(
        name="toy",
        titles=tuple(TITLES),
        sequences=tuple(tuple(TITLES.index(letter) for letter in sequence) for sequence in sequences),
        user_ids=tuple(f"u{u}" for u in range(len(sequences))),
        item_ids=tuple(TITLES.lower()),
    )


def letters(data: Dataset) -> dict[str, str]:
    """What each user took, by title; the items' own names must have moved with the titles."""
    assert data.item_ids == tuple(title.lower() for title in data.titles) and data.name == "toy"
    return {
        user: "".join(data.titles[i] for i in sequence)
        for user, sequence in zip(data.user_ids, data.sequences, strict=True)
    }


def test_core_by_hand() -> None:
    # E and F are taken once and go; u2 is left with C alone and goes; C is then taken by u0 alone and goes; A is taken
    # by nobody.
    found = core(dataset("BCD", "BD", "CE", "DBF"), users=2, items=2)
    assert letters(found) == {"u0": "BD", "u1": "BD", "u3": "DB"}
    assert found.titles == ("B", "D") and found.num_items == 2
    assert found.sequences == ((0, 1), (0, 1), (1, 0)), "numbered anew, in the order that they had"


def test_one_item_too_few_can_undo_everything_but_a_clique() -> None:
    """A chain: each user who goes takes the next one's item below its bound."""
    chain = ("AB", "BC", "CD", "DEF", "EFD", "FDE")
    assert letters(core(dataset(*chain), users=2, items=2)) == {"u3": "DEF", "u4": "EFD", "u5": "FDE"}
    assert letters(core(dataset(*chain), users=2, items=1)) == {f"u{u}": taken for u, taken in enumerate(chain)}


def test_without_a_bound_on_items_all_of_them_stay() -> None:
    data = dataset("BCD", "BD", "CE", "DBF")
    assert core(data, users=2, items=0) == data
    found = core(data, users=3, items=0)
    assert found.titles == tuple(TITLES) and letters(found) == {"u0": "BCD", "u3": "DBF"}
    assert found.sequences == (data.sequences[0], data.sequences[3])
    taken = core(data, users=3, items=1)
    assert taken.titles == ("B", "C", "D", "F") and letters(taken) == {"u0": "BCD", "u3": "DBF"}


def test_what_fulfils_both_bounds_stays_as_it_is() -> None:
    data = dataset("ABCDEF", "FEDCBA", "ABCFED")
    assert core(data, users=6, items=3) == data
    once = core(dataset("BCD", "BD", "CE", "DBF"), users=2, items=2)
    assert core(once, users=2, items=2) == once


def largest_part(data: Dataset, users: int, items: int) -> tuple[str, dict[str, str]]:
    """Titles and users of it, of all 64 choices of items with the users that each leaves."""
    parts = []
    for choice in product((0, 1), repeat=len(TITLES)):
        shown = "".join(compress(TITLES, choice))
        kept = {user: "".join(t for t in sequence if t in shown) for user, sequence in letters(data).items()}
        kept = {user: part for user, part in kept.items() if len(part) >= users}
        if all(sum(title in part for part in kept.values()) >= items for title in shown):
            parts.append((shown, kept))
    return max(parts, key=lambda part: len(part[0]))


def test_core_is_the_largest_part_that_fulfils_both_bounds() -> None:
    rng, sizes = np.random.default_rng(0), []
    for _ in range(60):
        data = dataset(*("".join(rng.permutation(list(TITLES))[: rng.integers(1, 6)]) for _ in range(6)))
        users, items = int(rng.integers(2, 4)), int(rng.integers(2, 5))
        titles, kept = largest_part(data, users, items)
        sizes.append((len(titles), len(kept)))
        if titles:
            found = core(data, users=users, items=items)
            assert ("".join(found.titles), letters(found)) == (titles, kept)
        else:
            with pytest.raises(DataError):
                core(data, users=users, items=items)
    assert (0, 0) in sizes and len(set(sizes)) > 8, "of every size, nothing included"


def test_nothing_left_names_both_settings() -> None:
    both = r"^toy: .*data\.min_interactions = {} .*data\.min_item_interactions = {} .*a user are 3\); lower"
    for users, items in ((2, 4), (4, 0), (4, 1), (3, 3)):
        with pytest.raises(DataError, match=both.format(users, items)):
            core(dataset("BCD", "BD", "CE", "DBF"), users=users, items=items)
    with pytest.raises(DataError, match=r"a user are 0\)"):
        core(dataset(), users=1, items=0)


def test_load_dataset_counts_users_and_items() -> None:
    world = WorldConfig(num_users=60, num_items=90, interactions_per_user=12)
    everything = load_dataset(Config(world=world))
    found = load_dataset(Config(world=world, data=DataConfig(min_interactions=10, min_item_interactions=5)))
    assert found == core(everything, users=10, items=5)
    assert found.num_items < everything.num_items == 90 and found.num_users < everything.num_users == 60
    taken = np.bincount([item for sequence in found.sequences for item in sequence], minlength=found.num_items)
    assert taken.min() >= 5 and min(map(len, found.sequences)) >= 10
    whole = dict(zip(everything.user_ids, everything.sequences, strict=True))
    for user, sequence in zip(found.user_ids, found.sequences, strict=True):
        before = [everything.titles[i] for i in whole[user]]
        assert [found.titles[i] for i in sequence] == [title for title in before if title in found.titles]
    with pytest.raises(DataError, match=r"data\.min_item_interactions = 61"):
        load_dataset(Config(world=world, data=DataConfig(min_item_interactions=61)))
