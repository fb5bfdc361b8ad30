"""Plain records that the rest of the trainer reads; no torch here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the files of a data set held, and what was left out of it: nothing goes unseen."""

    format: str
    """Layout that was read, as `data.format` calls it."""
    files: tuple[str, ...]
    rows: int
    """Interactions that were read from the files."""
    ordered_by: str
    """`timestamp`, or `file` where there is none and the order of the rows counts."""
    left_out: tuple[tuple[str, int], ...] = ()
    """(what, how many), in the order in which it was left out."""
    tied: int = 0
    """Interactions at the same time as another one of the same user."""
    tied_last_users: int = 0
    """Users whose last two interactions are tied, so that the item's id says which one is held out."""
    untitled: int = 0
    """Items that the files list without a title; they are called `Untitled [id]`."""
    altered_titles: int = 0
    """Items whose title was folded to one line, cut, or told apart from an equal one."""
    latin1_lines: int = 0
    """Lines of the items' file that are not UTF-8 and were read as Latin-1."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A catalogue and what its users took from it. Items and users are indices from 0."""

    name: str
    titles: tuple[str, ...]
    """Title of item i; one line, white space folded, unique."""
    sequences: tuple[tuple[int, ...], ...]
    """Items of user u, oldest first, each item once."""
    user_ids: tuple[str, ...]
    """The data set's own name of user u."""
    item_ids: tuple[str, ...]
    """The data set's own name of item i."""
    test_users: tuple[int, ...] = ()
    """Users that the data set itself sets apart for evaluation, ascending; empty: `data.eval_seed` draws them."""
    reading: Reading | None = field(default=None, compare=False)
    """How it was read; None for what was not read from files."""

    @property
    def num_items(self) -> int:
        return len(self.titles)

    @property
    def num_users(self) -> int:
        return len(self.sequences)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one episode is about: a user, what they took before, and the item that they took next."""

    user: int
    history: tuple[int, ...]
    """Latest items shown to both agents, oldest first; never holds `target`."""
    target: int
    """The held-out next item: the truth."""
    candidates: tuple[int, ...]
    """Items to choose from, shuffled; position p is shown as number p + 1."""
    peer_counts: tuple[int, ...]
    """For each candidate, how many of the user's peers took it (in the training part)."""
    num_peers: int
    peer_similarity: float
    """q of Eq. 8: mean cosine similarity between the user and these peers, in [-1, 1]."""


@dataclass(frozen=True, kw_only=True)
class DiscriminationTask:
    """F1-disc: 20 items, some of which the user took, to be judged one by one."""

    user: int
    history: tuple[int, ...]
    items: tuple[int, ...]
    labels: tuple[bool, ...]
    peer_counts: tuple[int, ...]
    num_peers: int


@dataclass(frozen=True, kw_only=True)
class TrainedTurn:
    """One reply inside a trajectory."""

    fork: int
    """Position at which the teacher's branch leaves the sequence."""
    start: int
    """Position of the first sampled token."""
    end: int
    """One past the last sampled token."""
    reward: float
    """R_t; 0 where there is none (weight 0)."""
    weight: float
    """Importance of the turn before normalization; 0: excluded."""
    reference: tuple[int, ...]
    """Tokens of the branch before the reply: d_t and the repeated role header."""
    reason: int | None = None
    """How many of the reply's tokens come before its decision (the item, or action and score); None: all."""


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One agent's view of an episode."""

    episode: int
    """Number of the episode, for error messages."""
    agent: int
    tokens: tuple[int, ...]
    behaviour_logp: tuple[float, ...]
    """Log-probs of the sampled tokens of all turns, one after the other."""
    turns: tuple[TrainedTurn, ...]
    teacher_logp: tuple[float, ...] | None = None
    """The teacher's log-probs of the same tokens, where somebody has scored them already."""
    old_logp: tuple[float, ...] | None = None
    """The trainer's own log-probs of them under the weights that the update began with, where they differ from what it
    computes: from the second minibatch on."""

    @property
    def num_teacher_tokens(self) -> int:
        """Tokens of the teacher's branches: reference and reply of each turn, but for the reply's last token, whose
        successor nobody asks for."""
        return sum(len(t.reference) + t.end - t.start - 1 for t in self.turns)

    @property
    def num_tokens(self) -> int:
        """Tokens that one step computes for it: its own, and its teacher's branches unless they are scored already."""
        return len(self.tokens) + (self.num_teacher_tokens if self.teacher_logp is None else 0)


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A sequence for supervised learning: tokens [L] and, for each, whether it is to be predicted."""

    tokens: list[int]
    is_answer: list[bool]
