"""What the agents are told and how they answer: prompt texts, reply formats and their parsing.

Two sets of texts: `brief` for models that were trained on the format, `full` for models that never saw it. No text that
a student or an evaluation sees is ever given the truth; only `reference_*` is (used in training, by the teacher alone).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

Action = str
ACTIONS: dict[Action, tuple[float, float]] = {
    "dislike": (0.0, 0.25),
    "skip": (0.25, 0.5),
    "star": (0.5, 0.75),
    "click": (0.75, 1.0),
}
"""Each action and the interval of its acceptance score: [low, high), the last one closed."""
BELOW = 1e-4  # a score at an open end is moved this far inside


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Texts with named fields."""

    system_rec: str
    first_rec: str
    system_user: str
    item: str
    """How a candidate is listed and how a recommender names it."""
    item_separator: str
    history_separator: str
    peers: str
    invalid_rec: str
    reference_rec: str
    reference_user: str
    neutral_rec: str


BRIEF = PromptSet(
    system_rec="Recommend one item.",
    first_rec="History: {history}\nCandidates: {candidates}",
    system_user="Judge the item.\nHistory: {history}",
    item="{title}",  # a small model copies a title easily, and finds its number hardly at all (docs/log.md)
    item_separator="; ",
    history_separator="; ",
    peers="\nPeers: {count} of {num}",
    invalid_rec="Invalid reply.",
    reference_rec="Note: {verdict}, the user took {item}",
    reference_user="Note: the user {took} {item}, so {action}.",
    neutral_rec="Reason: try this.\nItem: {item}",
)

FULL = PromptSet(
    system_rec=(
        "You are a recommender. From a numbered list of candidates, pick the one item that this user will want next, "
        "judging by the history and by what the user answers. Never recommend an item again that was turned down. "
        "Reply in exactly this format:\nReason: <one sentence>\nItem: <number>. <title>"
    ),
    first_rec="The user's history, oldest first:\n{history}\n\nCandidates:\n{candidates}",
    system_user=(
        "You are a user with the history below. A recommender suggests items one at a time. Judge each by whether it "
        "is the next item that you would really take. click: exactly that; star: interesting; skip: not now; dislike: "
        "unwanted. The score says how willing you are, dislike 0.00-0.24, skip 0.25-0.49, star 0.50-0.74, click "
        "0.75-1.00. Reply in exactly this format:\nReason: <one sentence>\nAction: <click|star|skip|dislike>\n"
        "Score: <0.00-1.00>\n\nYour history, oldest first:\n{history}"
    ),
    item="{number}. {title}",
    item_separator="\n",
    history_separator="\n",
    peers="\n\n({count} of {num} users with a similar taste chose this item.)",
    invalid_rec="The reply was not in the required format, or named no candidate.",
    reference_rec=(
        "Hindsight, for this answer only. The answer given was:\n{transcript}\nIt was {verdict}: the item that the "
        "user took next is {item}. A correct answer ends with:\nItem: {item}"
    ),
    reference_user=(
        "Hindsight, for this answer only. The answer given was:\n{transcript}\nThe user {took} {item}, so the correct "
        "answer ends with:\nAction: {action}"
    ),
    neutral_rec="Reason: You may like this one.\nItem: {item}",
)
PROMPTS = {"brief": BRIEF, "full": FULL}


@dataclass(frozen=True, kw_only=True)
class OtherReferences:
    """Texts of references other than the template's (`game.reference`), with named fields."""

    truth_rec: str
    truth_user: str
    ask_diagnosis: str
    """What an agent is asked about its reply; `{reference}` is the template's text."""
    diagnosis: str


OTHER_REFERENCES = {
    "brief": OtherReferences(
        truth_rec="Note: the user took {item}",
        truth_user="Note: {action}.",
        ask_diagnosis="{reference}\nWhat went wrong?",
        diagnosis="{reference}\n{diagnosis}",
    ),
    "full": OtherReferences(
        truth_rec="Hindsight, for this answer only. The item that the user took next is {item}.",
        truth_user="Hindsight, for this answer only. The right action is {action}.",
        ask_diagnosis=(
            "{reference}\n\nLook back at that answer, knowing this. In one or two sentences, say what was wrong or "
            "right about it and what it overlooked. Do not answer in the required format now."
        ),
        diagnosis="{reference}\n\nWhat was wrong or right about the answer given: {diagnosis}",
    ),
}


def name_item(prompts: PromptSet, number: int, title: str) -> str:
    """A candidate as these prompts name it, by its number (from 1) and title or by its title alone."""
    return prompts.item.format(number=number, title=title)


def list_items(prompts: PromptSet, titles: Sequence[str]) -> str:
    """The candidates as these prompts list them."""
    return prompts.item_separator.join(name_item(prompts, n, title) for n, title in enumerate(titles, start=1))


def one_line(text: str) -> str:
    """Text with control characters and runs of white space folded into single spaces."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() or c.isspace() else " " for c in text)
    return " ".join(text.split())


def normal(title: str) -> str:
    """A title for comparison: lower case, letters and digits only."""
    return " ".join(re.findall(r"\w+", title.lower()))


REPLY_LINES = (("Reason:", "Item:"), ("Reason:", "Action:", "Score: 0."))
"""By agent, how the lines of a reply begin."""


def format_recommendation(reason: str, item: str) -> str:
    """A recommender's reply; `item` as `name_item` writes it."""
    return f"Reason: {reason}\nItem: {item}"


def format_judgement(reason: str, action: Action, score: float) -> str:
    return f"Reason: {reason}\nAction: {action}\nScore: {score:.2f}"


def last_field(text: str, name: str) -> str | None:
    """What follows `name:` on the last line that starts so; None where no line does."""
    found = re.findall(rf"^[^\S\n]*{name}:(.*)$", text, flags=re.MULTILINE | re.IGNORECASE)
    return found[-1].strip() if found else None


def decision_start(text: str, name: str) -> int:
    """Where the last line that starts with `name:` begins; the text's length where no line does."""
    found = list(re.finditer(rf"^[^\S\n]*{name}:", text, flags=re.MULTILINE | re.IGNORECASE))
    return found[-1].start() if found else len(text)


def parse_recommendation(text: str, titles: Sequence[str], prompts: PromptSet) -> int | None:
    """Index of the candidate that a recommender's reply names; None where it names none, or several.

    The last line that starts with `Item:` counts. A candidate exactly as these prompts list it is that one, whatever
    other titles look like. Else, in this order: the whole title (where titles alone are listed in any case and
    punctuation, and digits alone are a title too), the number, the normalised title with or without a number before it.
    """
    named = last_field(text, "Item")
    if named is None:
        return None
    listed = [name_item(prompts, n, title) for n, title in enumerate(titles, start=1)]
    if named in listed:
        return listed.index(named)
    if "{number}" not in prompts.item:
        if alike := _alike(titles, {normal(named)}):
            return alike[0] if len(alike) == 1 else None
    elif named in titles and not named.isdigit():  # "21. Jump Street" may be a title
        return list(titles).index(named)
    number = re.match(r"(\d{1,6})(?!\d)\s*(?:[.):]|$)", named)
    if number and 1 <= int(number[1]) <= len(titles):
        return int(number[1]) - 1
    # A title may begin with a number itself: "2001: A Space Odyssey".
    alike = _alike(titles, {normal(named), normal(re.sub(r"^\d+\s*[.):]\s*", "", named))})
    return alike[0] if len(alike) == 1 else None


def _alike(titles: Sequence[str], wanted: set[str]) -> list[int]:
    """Indices of the titles that normalise to one of these; what normalises to nothing is like none."""
    wanted = wanted - {""}
    return [i for i, title in enumerate(titles) if normal(title) in wanted]


@dataclass(frozen=True)
class Judgement:
    """A parsed user reply."""

    action: Action
    score: float
    """Acceptance s in [0, 1], inside the action's interval."""
    clamped: bool
    """The written score lay outside the action's interval."""

    @property
    def positive(self) -> bool:
        return self.score >= 0.5


def parse_judgement(text: str) -> Judgement | None:
    """Action and score of a user's reply, or None where either is missing, unknown or not a number from 0 up.

    The score is moved into its action's interval (DESIGN section 2); the last `Action:` and `Score:` lines count.
    """
    action, written = (last_field(text, "Action") or "").lower(), last_field(text, "Score") or ""
    if action not in ACTIONS or not re.fullmatch(r"\d+(\.\d*)?|\.\d+", written):
        return None
    score = float(written)
    low, high = ACTIONS[action]
    inside = min(max(score, low), high if high == 1.0 else high - BELOW)
    return Judgement(action=action, score=inside, clamped=inside != score)
