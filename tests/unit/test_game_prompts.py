"""What counts as a valid reply, and which item, action and score it names."""

from __future__ import annotations

import time

import pytest

from coars_fast.game.prompts import (
    ACTIONS,
    BRIEF,
    FULL,
    PromptSet,
    format_judgement,
    format_recommendation,
    list_items,
    name_item,
    normal,
    one_line,
    parse_judgement,
    parse_recommendation,
)

TITLES = ["Toy Story (1995)", "2001: A Space Odyssey", "300", "Twins", "Twins!", "Amélie", "???", "Se7en", "Heat", "Up"]
EITHER = pytest.mark.parametrize("prompts", [BRIEF, FULL], ids=["brief", "full"])


@pytest.mark.parametrize(
    ("named", "index"),
    [
        ("1. Toy Story (1995)", 0),
        ("1. toy story", 0),
        ("9. Heat", 8),
        ("10. Up", 9),
        ("9", 8),
        ("9.", 8),
        ("9) Heat", 8),
        ("9: Heat", 8),
        ("9.Heat", 8),
        ("009. Heat", 8),
        ("9. Up", 8),  # the number wins over the title
        ("٩. Heat", 8),  # digits of other scripts are numbers too
        ("7. ???", 6),
    ],
)
@EITHER
def test_an_item_is_named_by_its_number(prompts: PromptSet, named: str, index: int) -> None:
    assert parse_recommendation(f"Reason: so.\nItem: {named}", TITLES, prompts) == index


@pytest.mark.parametrize(
    ("named", "index"),
    [
        ("Heat", 8),
        ("  hEAT.  ", 8),
        ("toy story 1995", 0),
        ("TOY-STORY, (1995)", 0),
        ("AMÉLIE", 5),
        ("300", 2),  # no candidate has that number, but one has that title
        ("2001: A Space Odyssey", 1),  # the title's own number is no candidate's
        ("2001. 2001: A Space Odyssey", 1),
        ("11. Heat", 8),  # number out of range, title right
        ("0. Heat", 8),
        ("999999999999999999999999. Heat", 8),
        ("1" * 5000 + ". Heat", 8),
    ],
)
@EITHER
def test_an_item_is_named_by_its_title_where_its_number_is_none(prompts: PromptSet, named: str, index: int) -> None:
    assert parse_recommendation(f"Reason: so.\nItem: {named}", TITLES, prompts) == index


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Reason: Heat is great.",
        "Heat",
        "Item:",
        "Item: ",
        "Item: 0",
        "Item: 11",
        "Item: -1",
        "Item: 1e0",
        "Item: " + "9" * 5000,
        "Item: ²",
        "Item: nothing like it",
        "Item: Heat 2",
        "Item: twins",  # two candidates normalise to it, and it is the whole title of neither
        "Item: Twins?",
        "Item: 99. twins",
        "Item: ??",  # nothing is left of it for comparison
        "Item: 11. ???",
        "Item: 12. ",
        "Reason: the Item: 3. is in the middle of a line",
        "Item 3. Heat",
        "Items: 3",
    ],
)
@EITHER
def test_a_reply_that_names_no_candidate_for_sure_is_invalid(prompts: PromptSet, text: str) -> None:
    assert parse_recommendation(text, TITLES, prompts) is None


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("Item: 9. Heat\nItem: 10. Up", 9),
        ("Item: 9. Heat\nItem: none of them", None),
        ("Item: 9. Heat\nItem:", None),
        ("Item:\nItem: 9. Heat", 8),
        ("Item:\n9. Heat", None),
        ("Item: 9. Heat\nReason: afterwards", 8),
        ("  ITEM: 9. Heat  \n", 8),
        ("\titem:9. Heat\r\n", 8),
        ("Item: 9. Heat\rItem: 10. Up", 8),  # a carriage return starts no line
        ("Item: 9. Heat\u2028Item: 10. Up", 8),
    ],
)
@EITHER
def test_the_last_item_line_counts(prompts: PromptSet, text: str, index: int | None) -> None:
    assert parse_recommendation(text, TITLES, prompts) == index


# Titles that begin with a number, are one, or look like an entry of the list.
NUMBERS = [
    "21 Jump Street", "12 Angry Men (1957)", "2001: A Space Odyssey", "3. Heat", "5", "Heat", "8: The Return", "3:10",
    "9) Nine", "77", "2. Heat",
]  # fmt: skip


@pytest.mark.parametrize(
    ("named", "index"),
    [
        ("Twins", 3),  # others normalise to it too
        ("Twins!", 4),
        ("???", 6),
        ("  Heat  ", 8),
    ],
)
@EITHER
def test_an_item_is_named_by_its_whole_title(prompts: PromptSet, named: str, index: int) -> None:
    assert parse_recommendation(f"Reason: so.\nItem: {named}", TITLES, prompts) == index


@pytest.mark.parametrize(
    ("named", "index"),
    [
        # A whole title wins over the number that it begins with, be it a candidate's or not ...
        ("21 Jump Street", 0),
        ("12 Angry Men (1957)", 1),
        ("2001: A Space Odyssey", 2),
        ("3. Heat", 3),
        ("8: The Return", 6),
        ("3:10", 7),
        ("9) Nine", 8),
        ("2. Heat", 10),
        # ... and digits alone name a candidate by its number, unless they are the title of another (below).
        ("5", 4),
        ("6", 5),
        ("77", 9),
        ("10", 9),
        # A number and the title after it.
        ("1. 21 Jump Street", 0),
        ("4. 3. Heat", 3),
        ("6. Heat", 5),
        ("5. 5", 4),
        ("7. 8: The Return", 6),
        ("11. 2. Heat", 10),
        ("10. 77", 9),
        ("21 jump street", 0),
        ("12 angry men, 1957", 1),
        ("2001: a space odyssey", 2),
        ("3:10 ", 7),
        ("21. jump street", 0),
        ("77. 77", 9),
        ("99. Heat", 5),
        ("12 Angry Men", None),
        ("21", None),
        ("2001", None),
    ],
)
@EITHER
def test_titles_that_begin_with_a_number(prompts: PromptSet, named: str, index: int | None) -> None:
    assert parse_recommendation(f"Reason: so.\nItem: {named}", NUMBERS, prompts) == index


@pytest.mark.parametrize(("named", "title", "number"), [("3. heat", 3, 2), ("8: the return", 6, 7), ("3:10!", 7, 2)])
def test_not_quite_a_title_that_begins_with_a_number(named: str, title: int, number: int) -> None:
    """Where the list has numbers, one that is written as such counts; where it has none, the words do."""
    found = [parse_recommendation(f"Item: {named}", NUMBERS, prompts) for prompts in (BRIEF, FULL)]
    assert found == [title, number]


def test_digits_alone_are_a_title_where_titles_alone_are_listed_and_else_a_number() -> None:
    titles = ["Up", "1", "300", "Heat"]
    found = [[parse_recommendation(f"Item: {named}", titles, p) for named in ("1", "1.", "3")] for p in (BRIEF, FULL)]
    assert found == [[1, 1, 2], [0, 0, 2]]
    for prompts in (BRIEF, FULL):
        assert parse_recommendation("Item: 2. 1", titles, prompts) == 1
        assert parse_recommendation("Item: 300", titles, prompts) == 2  # no candidate has this number


def test_a_candidate_as_it_is_listed_wins_over_titles_that_look_like_it() -> None:
    titles = ["Fake", "7: Up", "12", "1. Fake", "4. 1. Fake", "4 1 FAKE", "Heat"]
    for prompts in (BRIEF, FULL):
        for index, title in enumerate(titles):
            assert parse_recommendation(f"Item: {name_item(prompts, index + 1, title)}", titles, prompts) == index
    brief = {"1. fake": 3, "7: up": 1, "12": 2, "4 1 fake": None, "7. Heat": 6, "2. Fake": 1, "3": 2}
    full = {"1. fake": 0, "7: up": 6, "1. Fake": 0, "4. 1. Fake": 3, "12": 2, "Fake": 0, "9. Heat": 6}
    for prompts, named in ((BRIEF, brief), (FULL, full)):
        assert {text: parse_recommendation(f"Item: {text}", titles, prompts) for text in named} == named


def test_brief_prompts_name_an_item_by_its_title_and_full_ones_by_number_and_title() -> None:
    assert list_items(BRIEF, ["Up", "3. Heat", "300"]) == "Up; 3. Heat; 300"
    assert list_items(FULL, ["Up", "3. Heat", "300"]) == "1. Up\n2. 3. Heat\n3. 300"
    assert (name_item(BRIEF, 7, "Up {title}"), name_item(FULL, 7, "Up {number}")) == ("Up {title}", "7. Up {number}")
    assert format_recommendation("so.", "7. Up") == "Reason: so.\nItem: 7. Up"


@EITHER
@pytest.mark.parametrize("titles", [TITLES, [t for t in NUMBERS if t != "5"], ["3. Heat", "Heat", "Up"]])
def test_what_is_formatted_is_parsed_for_every_candidate(prompts: PromptSet, titles: list[str]) -> None:
    for index, title in enumerate(titles):
        reply = format_recommendation("Item: 1.", name_item(prompts, index + 1, title))
        assert parse_recommendation(reply, titles, prompts) == index


@pytest.mark.parametrize(
    ("action", "written", "score", "clamped"),
    [
        ("dislike", "0.00", 0.0, False),
        ("dislike", "0.24", 0.24, False),
        ("skip", "0.25", 0.25, False),
        ("star", "0.50", 0.5, False),
        ("star", ".6", 0.6, False),
        ("click", "0.75", 0.75, False),
        ("click", "1", 1.0, False),
        ("click", "1.", 1.0, False),
        ("click", "1.00", 1.0, False),
        ("click", "000.9", 0.9, False),
        ("click", "٠.٩", 0.9, False),
        ("dislike", "0.25", 0.2499, True),
        ("dislike", "0.9", 0.2499, True),
        ("skip", "0.1", 0.25, True),
        ("skip", "0.5", 0.4999, True),
        ("star", "0.75", 0.7499, True),
        ("star", "0", 0.5, True),
        ("click", "0.5", 0.75, True),
        ("click", "2", 1.0, True),
        ("dislike", "2", 0.2499, True),
        ("click", "9" * 400, 1.0, True),  # more than a float can hold
    ],
)
def test_a_score_is_moved_into_the_interval_of_its_action(
    action: str, written: str, score: float, clamped: bool
) -> None:
    found = parse_judgement(f"Reason: so.\nAction: {action}\nScore: {written}")
    assert found is not None
    assert (found.action, found.score, found.clamped) == (action, pytest.approx(score), clamped)
    assert found.positive == (action in ("star", "click"))


@pytest.mark.parametrize(
    "written",
    ["", "-0.5", "-0", "+0.5", "nan", "NaN", "inf", "1e9", "5e-1", "0,5", "0.5.5", ".", "half", "0.5/1", "0.5 or so",
     "50%", "0x1", "1_0", "½", "٠,٩"],
)  # fmt: skip
def test_a_score_that_is_no_plain_number_from_zero_up_is_invalid(written: str) -> None:
    assert parse_judgement(f"Action: star\nScore: {written}") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Action: click",
        "Score: 0.90",
        "Action: love\nScore: 0.90",
        "Action: click!\nScore: 0.90",
        "Action: click star\nScore: 0.90",
        "Action:\nclick\nScore: 0.90",
        "Action: click\nScore:\n0.90",
        "Action: click Score: 0.90",
        "I would: Action: click\nScore: 0.90",
        "Action: click\nAction: love\nScore: 0.90",
        "Action: click\nScore: 0.90\nScore: none",
    ],
)
def test_a_judgement_without_a_known_action_and_a_score_is_invalid(text: str) -> None:
    assert parse_judgement(text) is None


@pytest.mark.parametrize(
    ("text", "action", "score"),
    [
        ("Score: 0.90\nAction: click", "click", 0.9),
        ("  action:CLICK  \r\n\tSCORE :0.1\nscore: 0.90 ", "click", 0.9),
        ("Action: skip\nScore: 0.30\nAction: click\nScore: 0.80", "click", 0.8),
        ("Action: love\nAction: click\nScore: none\nScore: 0.80", "click", 0.8),
        ("Action: Star\nScore: 0.60\nReason: afterwards", "star", 0.6),
    ],
)
def test_order_case_and_spaces_do_not_matter_and_the_last_lines_count(text: str, action: str, score: float) -> None:
    found = parse_judgement(text)
    assert found is not None and (found.action, found.score, found.clamped) == (action, pytest.approx(score), False)


@pytest.mark.parametrize("action", list(ACTIONS))
def test_every_two_digit_score_of_an_action_survives_formatting_unclamped(action: str) -> None:
    low, high = ACTIONS[action]
    for hundredths in range(round(low * 100), round(high * 100) + (high == 1.0)):
        found = parse_judgement(format_judgement("so.", action, hundredths / 100))
        assert found is not None and not found.clamped and found.score == pytest.approx(hundredths / 100)


@pytest.mark.parametrize("filler", [" ", "\n", "1", "Item:", "Score: ", "\t \n"])
def test_long_garbage_is_read_in_time_that_grows_with_its_length(filler: str) -> None:
    garbage = filler * 50_000 + "x"
    started = time.perf_counter()
    for text in (garbage, f"Item: {garbage}", f"Action: click\nScore: {garbage}"):
        assert parse_recommendation(text, TITLES, FULL) is None
        assert parse_judgement(text) is None
    assert time.perf_counter() - started < 2  # milliseconds; quadratic matching takes minutes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\r\nc\td", "a b c d"),
        ("  a  b ", "a b"),
        ("a\u2028b\u0085c\x00d\x1be", "a b c d e"),
        ("a\u202eb\ud800c", "a b c"),
        ("\n \x07", ""),
        ("naïve 東京 🎬", "naïve 東京 🎬"),
    ],
)
def test_one_line_folds_white_space_and_control_characters(text: str, expected: str) -> None:
    assert one_line(text) == expected


def test_normal_keeps_letters_and_digits_of_every_script() -> None:
    assert normal("Léon: The Professional (1994) 東京!") == "léon the professional 1994 東京"
    assert normal(" -?! ") == ""
