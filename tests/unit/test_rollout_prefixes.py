"""What prompts have in common, and what follows what in replies."""

from __future__ import annotations

import random

import pytest

from coars_fast.rollout.drafts import CERTAIN, CONTEXT, Drafter
from coars_fast.rollout.prefixes import SHORTEST, common_length, find_prefixes


def test_common_length() -> None:
    assert common_length([1, 2, 3], [1, 2, 4]) == 2
    assert common_length([1, 2], [1, 2, 4]) == 2
    assert common_length([], [1]) == 0 == common_length([2], [1])


def test_instructions_are_shared_by_all_and_prompts_by_their_group() -> None:
    system = list(range(100, 120))
    histories = [[n * 7 + i for i in range(30)] for n in range(3)]
    prompts = [[*system, *histories[n], *([40 + k] if k else [])] for n in range(3) for k in (0, 1, 2)]
    random.Random(0).shuffle(prompts)
    found = find_prefixes(1, prompts)
    roots = {id(prefix.parent) for prefix in found if prefix}
    assert len(roots) == 1
    for prompt, prefix in zip(prompts, found, strict=True):
        assert prefix is not None and prefix.agent == 1 and prefix.members == 3
        assert list(prefix.tokens) == prompt[: len(prefix.tokens)] and len(prefix.tokens) == 50
        assert prefix.parent is not None and list(prefix.parent.tokens) == system and prefix.parent.members == 3


def test_what_is_short_or_alone_is_not_shared() -> None:
    assert find_prefixes(0, [[1] * 50]) == [None]
    assert find_prefixes(0, []) == []
    assert find_prefixes(0, [[1] * (SHORTEST - 1) + [n] * 30 for n in range(2, 5)]) == [None] * 3
    assert find_prefixes(0, [[], [1] * 40, [1] * 40])[0] is None
    pair = find_prefixes(0, [[], [1] * 40, [1] * 40])
    assert pair[1] is pair[2] is not None and pair[1].members == 2 and pair[1].parent is None


@pytest.mark.parametrize("seed", range(30))
def test_prefixes_are_prefixes_and_members_are_counted(seed: int) -> None:
    generator = random.Random(seed)
    trunk = [generator.randrange(3) for _ in range(40)]
    prompts = []
    for _ in range(generator.randrange(1, 9)):
        cut = generator.randrange(40)
        tail = [generator.randrange(3) for _ in range(generator.randrange(20))]
        prompts += [[*trunk[:cut], *tail]] * generator.randrange(1, 3)
    found = find_prefixes(0, prompts)
    members: dict[int, int] = {}
    prefixes = {}
    for prompt, prefix in zip(prompts, found, strict=True):
        if prefix is not None:
            members[id(prefix)] = members.get(id(prefix), 0) + 1
            prefixes[id(prefix)] = prefix
            assert list(prefix.tokens) == prompt[: len(prefix.tokens)] and len(prefix.tokens) >= SHORTEST
            if prefix.parent is not None:
                assert list(prefix.parent.tokens) == prompt[: len(prefix.parent.tokens)]
                assert len(prefix.parent.tokens) < len(prefix.tokens)
    for parent in {id(p.parent): p.parent for p in prefixes.values() if p.parent}.values():
        children = sum(p.parent is parent for p in prefixes.values())
        members[id(parent)] = members.get(id(parent), 0) + children
        prefixes[id(parent)] = parent
    assert all(prefix.members == members[number] for number, prefix in prefixes.items())


def test_guesses_are_what_came_before() -> None:
    drafter = Drafter()
    reply = [1, 2, 3, 4, 5, 6, 7]
    assert drafter.guess(0, reply[:CONTEXT], [1, 2], 5) == []
    drafter.learn(0, reply, CONTEXT)
    assert drafter.guess(0, reply[:CONTEXT], [1, 2], 5) == [], "once is an accident"
    drafter.learn(0, reply, CONTEXT)
    assert drafter.guess(0, reply[:CONTEXT], [1, 2], 9) == [4, 5, 6, 7]
    assert drafter.guess(0, reply[:CONTEXT], [1, 2], 2) == [4, 5]
    assert drafter.guess(0, [9, 9, 2, 3, 4], [1, 2], 9) == [5, 6, 7], "the last tokens count"
    assert drafter.guess(1, reply[:CONTEXT], [1, 2], 9) == [], "each agent has its own"
    assert drafter.guess(0, reply[:CONTEXT], [1, 2], 0) == []


def test_guesses_look_at_fewer_tokens_where_those_before_are_new() -> None:
    drafter = Drafter()
    for _ in range(3):
        drafter.learn(0, [1, 2, 3, 4], 1)
        drafter.learn(0, [8, 3, 5], 1)
        drafter.learn(0, [7, 3, 5], 1)
    assert drafter.guess(0, [1, 2, 3], [9], 1) == [4]
    assert drafter.guess(0, [6, 2, 3], [9], 1) == [4], "two are known"
    assert drafter.guess(0, [6, 8, 3], [9], 1) == [5]
    assert drafter.guess(0, [6, 6, 2], [9], 2) == [3, 4]


def test_a_form_is_guessed_from_the_start() -> None:
    drafter = Drafter()
    drafter.learn(0, [50, 51, 1, 2], 1, times=CERTAIN)
    drafter.learn(0, [3, 4, 5], 1, times=CERTAIN)
    assert drafter.guess(0, [49, 50, 51], [49, 50, 51], 8) == [1, 2]
    assert drafter.guess(0, [2, 77, 3], [49, 50, 51], 8) == [4, 5]


def test_a_title_goes_on_as_in_the_view() -> None:
    drafter = Drafter()
    for _ in range(2):
        drafter.learn(0, [1, 2, 3], 1)
    view = [30, 31, 32, 40, 41, 42, 30, 9]
    assert drafter.guess(0, [5, 6, 40], view, 8) == [41], "one token: what the title begins with was a choice"
    assert drafter.guess(0, [5, 6, 30], view, 8) == [], "it stands there twice"
    assert drafter.guess(0, [5, 6, 9], view, 8) == [], "nothing follows"
    assert drafter.guess(0, [5, 6, 1], [1, 44], 8) == [2, 3], "what replies said comes first"


def test_guesses_follow_a_change_of_mind() -> None:
    drafter = Drafter()
    for _ in range(40):
        drafter.learn(0, [1, 2, 3, 4], CONTEXT)
    for _ in range(40):
        drafter.learn(0, [1, 2, 3, 8], CONTEXT)
    assert drafter.guess(0, [1, 2, 3], [1], 1) == [8]


def test_what_is_undecided_is_not_guessed() -> None:
    drafter = Drafter()
    for n in range(60):
        drafter.learn(0, [1, 2, 3, n], CONTEXT)
    assert drafter.guess(0, [1, 2, 3], [1], 1) == []
