"""The tables of an experiment: `table.md` for people, `table.csv`, `paired.csv` and `cells.csv` with every metric.

    table.csv    a row for each data set, variant and metric, over its finished seeds
    paired.csv   a row for each data set, metric and pair of variants
    cells.csv    a row for each finished cell, metric, and `before` or `after`

`publish` puts `table.md` into another page, between two comments that name the experiment.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from coars_fast import plots
from coars_fast.errors import ConfigError
from coars_fast.experiments.grid import Experiment
from coars_fast.experiments.results import Pair, Results, Row
from coars_fast.experiments.statistics import NUM_RESAMPLES, Estimate
from coars_fast.state.files import atomic_write_text

SHOWN = (
    "hit@1",
    "hit@1_first_turn",
    "hit@1_sampled",
    "user_f1",
    "user_f1_disc@1:1",
    "user_f1_disc@1:3",
    "user_f1_disc@1:9",
    "user_precision",
    "acceptance",
    "exclusion_rate",
    "false_positive_rate",
    "repeat_rate",
    "parse_failure_rec",
)
"""Metrics of the first Markdown table; table.csv has all."""
TESTED = ("hit@1", "hit@1_sampled", "user_f1_disc@1:1", "user_precision", "acceptance", "parse_failure_rec")
"""Metrics of the paired Markdown table."""
NUMBERS = ("value", "low", "high")


def write_tables(results: Results, out: Path, figures: Sequence[Path] = ()) -> Path:
    """Write all four files into `out`; returns the path of `table.md`.

    Args:
        results: of the finished cells.
        out: the experiment's folder.
        figures: SVG files in `out` that `table.md` shows.
    """
    rows, pairs = list(results.rows()), results.pairs()
    _write_csv(
        out / "table.csv",
        ("dataset", "variant", "label", "metric", *NUMBERS, "num_seeds", "seeds", "num_users"),
        (
            (r.dataset, r.variant, results.label(r.variant), r.metric, *_numbers(r.estimate), len(r.seeds),
             " ".join(map(str, r.seeds)), r.num_users)
            for r in rows
        ),
    )  # fmt: skip
    _write_csv(
        out / "paired.csv",
        ("dataset", "variant", "against", "metric", "difference", "low", "high", "p", "p_holm", "num_seeds"),
        (
            (p.dataset, p.variant, p.against, p.metric, *_numbers(p.difference), f"{p.difference.p:.4g}",
             f"{p.p_holm:.4g}", len(p.seeds))
            for p in pairs
        ),
    )  # fmt: skip
    _write_csv(out / "cells.csv", ("dataset", "seed", "variant", "when", "metric", *NUMBERS), _cell_rows(results))
    page = "\n".join([*_markdown(results, rows, pairs), *(f"\n![{f.stem}]({f.name})" for f in figures)]) + "\n"
    atomic_write_text(out / "table.md", page)
    return out / "table.md"


def publish(table: Path, figures: Sequence[Path], experiment: Experiment, page: Path) -> None:
    """Put a `table.md` into `page` between `<!-- results: NAME -->` and `<!-- end: NAME -->`, and the figures and
    tables into a folder beside it.

    Raises:
        ConfigError: the page has no such comments.
    """
    name = experiment.name
    begin, end = f"<!-- results: {name} -->", f"<!-- end: {name} -->"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ConfigError(f"--publish {page}: the page needs a line {begin} and below it a line {end}, once each")
    folder = page.parent / page.stem / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in (*figures, *(table.with_name(f"{stem}.csv") for stem in ("table", "paired", "cells"))):
        shutil.copyfile(file, folder / file.name)
    content = re.sub(r"\]\(([^)/]+\.svg)\)", rf"]({page.stem}/{name}/\1)", table.read_text(encoding="utf-8"))
    before, after = text.partition(begin)[0], text.partition(end)[2]
    atomic_write_text(page, f"{before}{begin}\n{content}{end}{after}")


def _markdown(results: Results, rows: Sequence[Row], pairs: Sequence[Pair]) -> Iterator[str]:
    experiment = results.experiment
    found = {(row.dataset, row.variant, row.metric): row for row in rows}
    for dataset, label in experiment.datasets.items():
        variants = results.variants(dataset)
        metrics = [m for m in SHOWN if any((dataset, v, m) in found for v in variants)]
        yield f"\n### {_plain(label)}\n"
        if not variants:
            yield "Not yet run."
            continue
        yield from _table(
            ("", *(plots.label(metric) for metric in metrics), "seeds"),
            (
                (
                    results.label(v),
                    *(_estimate(row.estimate) if (row := found.get((dataset, v, m))) else "" for m in metrics),
                    _count(found, dataset, v),
                )
                for v in variants
            ),
        )
        yield "\n95% intervals of a two-level bootstrap: seeds, then users within each; one seed: users alone."
        for variant in experiment.compare:
            yield from _changes(results, dataset, variant)
        for against in experiment.compare:
            yield from _paired(results, [p for p in pairs if (p.dataset, p.against) == (dataset, against)], against)
    yield from _missing(results)


def _changes(results: Results, dataset: str, variant: str) -> Iterator[str]:
    if variant not in results.variants(dataset):
        return
    found = {change.metric: change for change in results.changes(dataset, variant)}
    yield f"\n**{_plain(results.label(variant))}**, before and after training:\n"
    yield from _table(
        ("", "before", "after", "difference"),
        (
            (
                plots.label(metric),
                _estimate(found[metric].before),
                _estimate(found[metric].after),
                _estimate(found[metric].difference, "+"),
            )
            for metric in SHOWN
            if metric in found
        ),
    )


def _paired(results: Results, pairs: Sequence[Pair], against: str) -> Iterator[str]:
    if not pairs:
        return
    found = {(pair.variant, pair.metric): pair for pair in pairs}
    metrics = [m for m in TESTED if any((p.variant, m) in found for p in pairs)]
    yield f"\nMinus **{_plain(results.label(against))}**, paired by seed and user:\n"
    yield from _table(
        ("", *(plots.label(metric) for metric in metrics)),
        (
            (results.label(v), *(_difference(found.get((v, m))) for m in metrics))
            for v in dict.fromkeys(pair.variant for pair in pairs)
        ),
    )
    yield (
        f"\nBold: the 95% interval leaves out 0. `*`: so does the test after Holm's adjustment for all variants of the "
        f"column (p < .05; {NUM_RESAMPLES:,} resamples, so p is never below {2 / (NUM_RESAMPLES + 1):.3f})."
    )


def _missing(results: Results) -> Iterator[str]:
    """What the tables lack, said plainly."""
    lacking = {cell: state for cell, state in results.states.items() if state.kind != "finished"}
    num_cells = len(results.states)
    yield f"\n{num_cells - len(lacking)} of {num_cells} cells are finished."
    if not lacking:
        return
    yield "\nNot in these tables:\n"
    groups: dict[tuple[str, str, str, str], list[int]] = {}
    for cell, state in lacking.items():
        groups.setdefault((cell.dataset, cell.variant, state.kind, state.note), []).append(cell.seed)
    for (dataset, variant, kind, note), seeds in groups.items():
        words = {"to run": "not run", "cut off": "cut off, goes on when run again"}.get(kind, kind)
        why, numbers = f": {note[:200]}" if note else "", ", ".join(map(str, sorted(seeds)))
        yield f"- {_plain(f'{results.label(variant)} ({dataset}, seeds {numbers}): {words}{why}')}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|---" * len(header) + "|"
    for name, *cells in rows:
        yield "| " + " | ".join([_plain(name), *cells]) + " |"


def _plain(text: str) -> str:
    """Text that cannot be read as markup of a table or of a page."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))


def _estimate(found: Estimate, sign: str = "") -> str:
    """`.483 (.440, .527)`."""
    return f"{_short(found.value, sign)} ({_short(found.low, sign)}, {_short(found.high, sign)})"


def _difference(pair: Pair | None) -> str:
    if pair is None:
        return ""
    text = _estimate(pair.difference, "+")
    text = f"**{text}**" if pair.difference.low > 0 or pair.difference.high < 0 else text
    return text + ("\\*" if pair.p_holm < 0.05 else "")


def _count(found: dict[tuple[str, str, str], Row], dataset: str, variant: str) -> str:
    return str(max(len(row.seeds) for (d, v, _), row in found.items() if (d, v) == (dataset, variant)))


def _short(value: float, sign: str = "") -> str:
    """Four characters beside the sign: .483, 2.41."""
    return f"{value:{sign}.2f}" if abs(value) >= 0.9995 else f"{value:{sign}.3f}".replace("0.", ".", 1)


def _numbers(estimate: Estimate) -> tuple[str, str, str]:
    return f"{estimate.value:.6g}", f"{estimate.low:.6g}", f"{estimate.high:.6g}"


def _cell_rows(results: Results) -> Iterator[Sequence[object]]:
    for cell, record in results.records.items():
        for when in ("before", "after"):
            for metric, interval in record[when].items():
                numbers = (f"{interval[part]:.6g}" for part in NUMBERS)
                yield cell.dataset, cell.seed, cell.variant, when, metric, *numbers


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    atomic_write_text(path, text.getvalue())
