"""One page: what is wanted, what was measured, whether it holds, and the file that says so.

    wanted     the figures that this project set itself against those its peers publish
    measured   on this commit and machine; on a CPU figures are shown and hold nothing, since they were taken at small
               sizes

A line is a function of the evidence; add one with whatever part brings its figure. Left out: opinions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.acceptance.benches import FOLDER, rows_of
from bench.acceptance.environment import FILE as ENVIRONMENT
from bench.acceptance.parts import PARTS
from bench.acceptance.work import Identity, Record, read_json
from bench.report import groups
from bench.results import CSV_NAME, Row, today, write_beside

FILE = "verdict.md"
CSV = f"{FOLDER}/{CSV_NAME}"
HEAD_OF_A_STEP = ("fused_credit_loss", "credit and clipped loss, frozen head")


@dataclass(frozen=True)
class Line:
    """One line of the page.

    Args:
        what: is asked.
        wanted: in words and a number.
        measured: the figure, or why there is none.
        holds: None where nothing was measured.
        source: file in the folder.
    """

    what: str
    wanted: str
    measured: str
    holds: bool | None
    source: str


@dataclass
class Evidence:
    """All that the parts left in a folder."""

    out: Path
    identity: Identity
    cuda: bool

    def __post_init__(self) -> None:
        self.rows: list[Row] = rows_of(self.out / FOLDER, self.identity)

    def results(self, part: str) -> dict[str, Any]:
        """Of a part; empty where it left none."""
        return Record.open(self.out / f"{part}.json", self.identity).results

    def case(self, op: str, case: str = "") -> list[Row]:
        """The rows of an op's largest case whose name holds `case`; empty where it was not measured."""
        found = [g for key, g in groups(self.rows).items() if key[0] == op and case in key[1]]
        return max(found, key=lambda group: math.prod(group[0].sizes().values()), default=[])


def ours(group: Sequence[Row]) -> Row | None:
    """Our variant with a time."""
    return next((row for row in group if row.kind == "ours" and row.median), None)


def rivals(group: Sequence[Row]) -> list[Row]:
    """Those with a time, fastest first."""
    return sorted((row for row in group if row.kind == "rival" and row.median), key=lambda row: row.median or 0.0)


def not_measured(what: str, wanted: str, source: str, why: str = "not measured") -> Line:
    return Line(what, wanted, why, None, source)


def limit(what: str, wanted: str, value: float | None, test: Callable[[float], bool], shown: str, source: str) -> Line:
    """A line about one number; `shown` is its format."""
    if value is None:
        return not_measured(what, wanted, source)
    return Line(what, wanted, shown.format(value), test(value), source)


# --------------------------------------------------------------------------------------------------------------- lines


def tests(evidence: Evidence) -> Iterator[Line]:
    for part, what in (
        ("tests_short", "kernel tests, one size each"),
        ("tests", "all kernel tests that know of a GPU"),
    ):
        results = evidence.results(part)
        failed = [name for found in results.values() for name in found["failed"]]
        passed = sum(found["passed"] for found in results.values())
        stopped = any(found.get("stopped") for found in results.values())
        text = f"{passed} passed, {len(failed)} failed" + (", not all ran" if stopped else "")
        wanted = "all pass, bf16 and fp32"
        if not results or (stopped and not failed):
            yield not_measured(what, wanted, f"{part}.json", text if results else "not measured")
        else:
            yield Line(what, wanted, text, not failed and passed > 0, f"{part}.json")


def sanitizer(evidence: Evidence) -> Iterator[Line]:
    results = evidence.results("sanitizer")
    for tool in ("memcheck", "racecheck"):
        found = results.get(tool)
        if found is None or found["errors"] is None:
            why = found["text"] if found else "not measured"
            yield not_measured(f"compute-sanitizer, {tool}", "0 errors", "sanitizer.json", why)
        else:
            yield Line(f"compute-sanitizer, {tool}", "0 errors", found["text"], not found["errors"], "sanitizer.json")


def accuracy(evidence: Evidence) -> Iterator[Line]:
    rows = [row for row in evidence.rows if row.kind == "ours"]
    what, wanted = "results of ours against float64", "all within the allowed error"
    if not rows:
        yield not_measured(what, wanted, CSV)
        return
    wrong = [row for row in rows if row.status != "ok"]
    worst = max((row.error or 0.0 for row in rows), default=0.0)
    text = f"{len(rows) - len(wrong)} of {len(rows)} cases, the worst error {worst:.2f} of what is allowed"
    yield Line(what, wanted, text, not wrong, CSV)


def head(evidence: Evidence) -> Iterator[Line]:
    """The whole head of a step against its floor, its peers and its memory."""
    group = evidence.case(*HEAD_OF_A_STEP)
    mine, others = ours(group), rivals(group)
    shape = group[0].shape if group else "R=16384 H=3584 V=152064"
    ratio = mine.ratio if mine else None
    yield limit(
        f"head of a step, {shape}", "at most 1.10 times three bare mm", ratio, lambda x: x <= 1.10, "{:.2f}", CSV
    )
    what, wanted = "head against the fastest rival with the same outputs", "at least 1.5 times as fast"
    if mine and others and mine.median and others[0].median:
        gain = others[0].median / mine.median
        yield Line(what, wanted, f"{gain:.2f} ({others[0].variant})", gain >= 1.5, CSV)
    else:
        yield not_measured(what, wanted, CSV)
    memory = mine.peak_mib if mine else None
    wanted = "under 1.5 GB beyond inputs"
    yield limit("peak memory of the head", wanted, memory, lambda x: x * 2**20 < 1.5e9, "{:.0f} MiB", CSV)
    eager = next((row.peak_mib for row in group if row.variant == "eager log_softmax"), None)
    share = memory / eager if memory is not None and eager else None
    wanted = "under a fifth of eager logits'"
    yield limit("peak memory against eager", wanted, share, lambda x: x < 0.2, "{:.3f}", CSV)


FASTEST = (
    ("linear_logprob", "frozen head"), ("linear_logprob", "trainable head"), ("linear_logprob", "mean cross-entropy"),
    ("paired_linear_logprob", ""), ("fused_credit_loss", "no teacher"), ("credit_policy_loss", ""),
    ("sample_with_logprob", ""), ("agent_lora", ""),
)  # fmt: skip
"""Ops whose wanted figure is their fastest rival's."""


def fastest(evidence: Evidence) -> Iterator[Line]:
    for op, case in FASTEST:
        group = evidence.case(op, case)
        mine, others = ours(group), rivals(group)
        what = f"{op}{f', {case}' if case else ''}"
        if mine and others and mine.median and others[0].median:
            gain = others[0].median / mine.median
            about = f"{gain:.2f} ({others[0].variant}); {mine.ratio or 0.0:.2f} times its floor"
            yield Line(what, "no slower than the fastest rival here", about, gain >= 1.0, CSV)
        else:
            yield not_measured(what, "no slower than the fastest rival here", CSV)


def decoding(evidence: Evidence) -> Iterator[Line]:
    """Share of the decode roofline, and waits."""
    what = "decoding, Qwen2.5-7B shape, 256 rows of 2000 tokens"
    wanted = "at least 60% of the decode roofline"
    group = evidence.case("decode")
    mine = ours(group)
    if mine and mine.ratio:
        share = 1.0 / mine.ratio
        full = mine.shape.startswith("B=256 T=2000")
        text = f"{share:.0%}, {mine.tokens_per_s or 0.0:,.0f} tokens/s ({mine.shape})"
        yield Line(what, wanted, text, share >= 0.6 if full else None, CSV)
    else:
        failed = next((f"{row.status}: {row.reason}" for row in group if row.kind == "ours"), "not measured")
        yield not_measured(what, wanted, CSV, failed)
    found = evidence.results("profile").get("decoding")
    waits = found["waits"] if found else None
    wanted = "none for each token"
    yield limit(
        "waits of the host in decoding", wanted, waits, lambda x: x < 0.5, "{:.1f} for each token", "profile.md"
    )


def loops(evidence: Evidence) -> Iterator[Line]:
    """Whole loops against what others do."""
    wanted = (
        ("rollout", "", "generate", "rollout against transformers generate at every turn", 10.0),
        ("step", "random weights", "full logits", "step, large shape, against a packed one with full logits", 1.0),
        ("step", "random weights", "a row per turn", "step, large shape, against a row per turn", 3.5),
        ("iteration", "both agents", "generate", "iteration against generate and a row per turn", 1.0),
    )
    for op, case, rival, what, least in wanted:
        group = evidence.case(op, case)
        mine, other = ours(group), next((row for row in rivals(group) if rival in row.variant), None)
        text = f"at least {least:g} times as fast"
        gain = other.median / mine.median if mine and other and mine.median and other.median else None
        yield limit(what, text, gain, lambda x, least=least: x >= least, "{:.2f}", CSV)


def tuning(evidence: Evidence) -> Iterator[Line]:
    """Whether what is shipped is what was fastest."""
    what, wanted = "the head's path that `auto` takes", "the faster one at every shape"
    found = {name: kept for name, kept in evidence.results("tuning").items() if name.startswith("both, ")}
    if not found:
        yield not_measured(what, wanted, "tuning.md")
        return
    slower = []
    for name, kept in found.items():
        times = kept["ms"]
        other = "fused" if kept["auto"] == "library" else "library"
        if times[kept["auto"]] > 1.02 * times[other]:
            slower.append(
                f"{name.removeprefix('both, ')}: {other} takes {times[other] / times[kept['auto']]:.2f} of it"
            )
    yield Line(what, wanted, "; ".join(slower) or f"so at {len(found)} shapes", not slower, "tuning.md")


def aot(evidence: Evidence) -> Iterator[Line]:
    found = evidence.results("aot").get("ctest")
    what, wanted = "ahead-of-time library, its example on this GPU", "stored results reproduced"
    yield Line(what, wanted, found, True, "aot.log") if found else not_measured(what, wanted, "aot.log")


LINES: tuple[Callable[[Evidence], Iterator[Line]], ...] = (
    tests, sanitizer, accuracy, head, fastest, decoding, loops, tuning, aot,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- page


def lines_of(evidence: Evidence) -> list[Line]:
    return [line for make in LINES for line in make(evidence)]


def as_text(evidence: Evidence, lines: Sequence[Line], states: dict[str, Any]) -> str:
    """The page."""
    identity, facts = evidence.identity, read_json(evidence.out / ENVIRONMENT)
    held = sum(line.holds is True for line in lines) if evidence.cuda else 0
    failed = sum(line.holds is False for line in lines) if evidence.cuda else 0
    device = f"{facts.get('device')}, {facts.get('memory_gib')} GiB" if evidence.cuda else "no GPU"
    parts = [
        f"# Verdict: {held} hold, {failed} do not, {len(lines) - held - failed} not measured", "",
        f"{device}; {identity['machine']}, torch {identity['torch']}, preset {identity['preset']}, commit "
        f"{identity['commit']}, {today()}.",
    ]  # fmt: skip
    if not evidence.cuda:
        parts.append("Run on a CPU at small sizes: the figures show that the command works, and hold nothing.")
    floor = next((row for row in evidence.case(*HEAD_OF_A_STEP) if row.kind == "floor"), None)
    if evidence.cuda and floor and floor.median:
        parts.append(
            f"The floor itself: {floor.variant}, {floor.shape}, {1e3 * floor.median:.1f} ms, {floor.tflops or 0.0:.0f} "
            "TFLOP/s (about 74 ms at the 720 of an H100, 202 ms at the 265 of an A100)."
        )
    parts += ["", "| | wanted | measured | holds | from |", "|---|---|---|---|---|"]
    for line in lines:
        cells = [line.what, line.wanted, line.measured, answer(line, evidence.cuda), line.source]
        parts.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    parts += ["", "| part | | seconds | |", "|---|---|---|---|"]
    for part in PARTS:
        state = states.get(part.name)
        if state is None or state["identity"] != identity:
            parts.append(f"| {part.name} | not run | | |")
        else:
            summary = state["summary"].replace("|", "/")
            parts.append(f"| {part.name} | {state['status']} | {state['seconds']:.0f} | {summary} |")
    return "\n".join(parts) + "\n"


def answer(line: Line, cuda: bool) -> str:
    """On a CPU nothing holds, whatever the figure."""
    return {True: "yes", False: "no", None: "not measured"}[line.holds if cuda else None]


def write(out: Path, identity: Identity, cuda: bool) -> Path:
    """The page of a folder, from what lies in it."""
    evidence = Evidence(out, identity, cuda)
    path = out / FILE
    write_beside(path, as_text(evidence, lines_of(evidence), read_json(out / "state.json").get("parts", {})))
    return path
