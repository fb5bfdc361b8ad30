"""`python -m coars_fast.report RUN`: the figures and a self-contained `report.html` of a run folder.

Everything comes from the files of the run (`config.json`, `metrics.jsonl`, `evaluation.json`, `episodes.jsonl`), so it
can be made again at any time, also of a run that is still going on; what is missing is left out. Figures are embedded,
nothing is fetched, and every text that a model or a data set wrote is escaped. No torch here.
"""

from __future__ import annotations

import base64
import dataclasses
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import tyro

from coars_fast import cli, plots
from coars_fast.errors import RunFolderError
from coars_fast.state.files import atomic_write_text, read_json, read_jsonl

Record = Mapping[str, Any]
NUM_TRANSCRIPTS = 10
PACKAGES = ("coars-fast", "torch", "transformers", "tokenizers", "safetensors", "numpy", "triton")


def write_report(run_folder: str | Path) -> Path:
    """Write `learning_curves.png`, `before_after.png` and `report.html` into `run_folder`; returns the report's path.

    Raises :class:`RunFolderError` if there is no `config.json` or a file is damaged.
    """
    folder = Path(run_folder)
    config = read_json(folder / "config.json")
    evaluation = read_json(folder / "evaluation.json") if (folder / "evaluation.json").exists() else {}
    metrics = read_jsonl(folder / "metrics.jsonl")
    train = [record for record in metrics if record.get("kind", "train") == "train"]
    evaluations = [record for record in metrics if record.get("kind") == "evaluation"]
    figures = [
        ("Before and after training, with 95% intervals", plots.before_after(evaluation, folder)),
        ("Learning curves", plots.learning_curves(train, evaluations, folder)),
    ]
    info = dict(evaluation.get("info") or {})
    versions = info.pop("versions", None)
    page = _environment().from_string(TEMPLATE)
    text = page.render(
        name=folder.resolve().name,
        rows=list(_comparison(evaluation)),
        warnings=evaluation.get("warnings") or [],
        num_steps=max((record.get("step") or 0 for record in train), default=0),
        figures=[(caption, _embedded(path)) for caption, path in figures if path],
        episodes=list(choose_episodes(read_jsonl(folder / "episodes.jsonl"))),
        info=list(_flatten(info)),
        settings=list(_flatten(config)),
        versions=list((versions or installed_versions()).items()),
        versions_of="the run" if versions else "the installation that wrote this report",
    )
    atomic_write_text(folder / "report.html", text)
    return folder / "report.html"


def installed_versions() -> dict[str, str]:
    """Python's and the packages' versions that figures may depend on; absent packages are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def choose_episodes(episodes: Sequence[Record], count: int = NUM_TRANSCRIPTS) -> Iterator[tuple[str, Record]]:
    """About `count` episodes with what they show: before and after for the same users, then training's first and last
    step, hits, misses and invalid replies."""
    before = [episode for episode in episodes if episode.get("kind") == "eval_before"]
    # A run that was resumed and went on has evaluated more than once: the last is the one in evaluation.json.
    last_of = {episode.get("user"): episode for episode in episodes if episode.get("kind") == "eval_after"}
    train = [episode for episode in episodes if episode.get("kind") == "train"]
    steps = [episode.get("step") or 0 for episode in train]
    wanted: list[tuple[str, Iterable[Record]]] = []
    for episode in before[:2]:
        wanted.append(("Before training", [episode]))
        if episode.get("user") in last_of:
            wanted.append(("The same user after training", [last_of[episode.get("user")]]))
    if not before:
        wanted.append(("After training", list(last_of.values())))
    late = train[::-1]
    wanted += [
        ("First training step", [e for e in train if e.get("step") == min(steps)]),
        ("Last training step", [e for e in late if e.get("step") == max(steps)]),
        ("A hit, late in training", [e for e in late if _hit(e)]),
        ("A miss, late in training", [e for e in late if not _hit(e)]),
        ("An invalid reply", [e for e in (*late, *before) if _invalid(e)]),
        ("A wrong item, accepted", [e for e in late if _accepted_miss(e)]),
    ]
    shown: list[Record] = []
    for caption, choices in wanted:
        choice = next((episode for episode in choices if not any(episode is other for other in shown)), None)
        if choice is not None and len(shown) < count:
            shown.append(choice)
            yield caption, choice


def _turns(episode: Record) -> list[Record]:
    return episode.get("turns") or []


def _hit(episode: Record) -> bool:
    return bool(_turns(episode)) and bool(_turns(episode)[-1].get("hit"))


def _invalid(episode: Record) -> bool:
    return any(not turn.get("rec_valid", True) or not turn.get("user_valid", True) for turn in _turns(episode))


def _accepted_miss(episode: Record) -> bool:
    return any(not turn.get("hit") and (turn.get("score") or 0) >= 0.5 for turn in _turns(episode))


def _comparison(evaluation: Record) -> Iterator[dict[str, Any]]:
    """A row a metric; `certain` says that the difference's interval leaves out zero."""
    before, after = evaluation.get("before") or {}, evaluation.get("after") or {}
    for name in [*before, *(name for name in after if name not in before)]:
        difference = (evaluation.get("difference") or {}).get(name)
        low, high = (difference or {}).get("low"), (difference or {}).get("high")
        yield {
            "label": plots.label(name),
            "name": name,
            "cells": [before.get(name), after.get(name), difference],
            "certain": low is not None and high is not None and (low > 0 or high < 0),
        }


def _estimate(estimate: Any, signed: bool = False) -> str:
    """`0.570 [0.530, 0.610]`, as far as it is there."""
    if not isinstance(estimate, Mapping) or estimate.get("value") is None:
        return "–"
    spec = "+.3f" if signed else ".3f"
    text = format(estimate["value"], spec)
    if estimate.get("low") is not None and estimate.get("high") is not None:
        text += f" [{estimate['low']:{spec}}, {estimate['high']:{spec}}]"
    return text


def _number(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "–" if value is None else str(value)


def _flatten(table: Record, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, "–" if value is None else value


def _embedded(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.ChainableUndefined, trim_blocks=True)
    environment.filters.update(estimate=_estimate, number=_number)
    return environment


TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>coars_fast: {{ name }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2rem .9rem .2rem 0; vertical-align: top; }
th { font-weight: 600; } tbody tr { border-top: 1px solid #eee; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; } .clear { font-weight: 600; }
img { max-width: 100%; } figure { margin: 1rem 0; } figcaption, .quiet { color: #666; font-size: .9em; }
.warning { background: #fff3d6; border-left: 4px solid #e69f00; padding: .4rem .8rem; margin: .4rem 0; }
details { border: 1px solid #ddd; border-radius: 6px; padding: .5rem .9rem; margin: .5rem 0; }
summary { cursor: pointer; } pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .88em; margin: .2rem 0;
  padding: .5rem .7rem; border-radius: 6px; } pre.rec { background: #eaf3f9; } pre.user { background: #fdf3dd; }
.tag { font-size: .8em; border-radius: 4px; padding: 0 .4em; background: #eee; } .hit { background: #cfeadf; }
.bad { background: #f6d9c8; }
</style>
</head>
<body>
<h1>{{ name }}</h1>
<p class="quiet">A run of coars_fast, {{ num_steps }} training steps.</p>
{% for warning in warnings %}
<p class="warning"><strong>Warning.</strong> {{ warning }}</p>
{% endfor %}
{% if rows %}
<h2>Before and after</h2>
<table>
<thead><tr><th>Metric</th><th>Before</th><th>After</th><th>Difference</th></tr></thead>
<tbody>
{% for row in rows %}
<tr><td title="{{ row.name }}">{{ row.label }}</td><td class="number">{{ row.cells[0] | estimate }}</td>
<td class="number">{{ row.cells[1] | estimate }}</td>
<td class="number{{ ' clear' if row.certain }}">{{ row.cells[2] | estimate(signed=true) }}</td></tr>
{% endfor %}
</tbody>
</table>
<p class="quiet">In brackets: 95% intervals. A difference is bold where its interval leaves out zero.</p>
{% else %}
<p class="quiet">There is no evaluation yet.</p>
{% endif %}
{% for caption, image in figures %}
<figure><img src="{{ image }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
{% if episodes %}
<h2>Conversations</h2>
{% for caption, episode in episodes %}
<details{{ ' open' if loop.first }}>
<summary><strong>{{ caption }}</strong> <span class="quiet">step {{ episode.step }}, user {{ episode.user }}, next item:
{{ episode.target_title }}</span></summary>
<p class="quiet">History: {{ (episode.history or []) | join(" · ") }}<br>
Candidates: {{ (episode.candidates or []) | join(" · ") }}</p>
{% for turn in episode.turns or [] %}
<p><strong>Turn {{ loop.index }}</strong> {{ turn.item_title if turn.item_title is not none }}
{% if turn.hit %}<span class="tag hit">hit</span>{% endif %}
{% if turn.rec_valid is false %}<span class="tag bad">invalid recommendation</span>{% endif %}
{% if turn.user_text and turn.user_valid is false %}<span class="tag bad">invalid answer</span>{% endif %}
{% if turn.excluded %}<span class="tag">excluded</span>{% endif %}
<span class="quiet">reward {{ turn.reward_rec | number }} / {{ turn.reward_user | number }},
mean credit {{ turn.credit_rec | number }} / {{ turn.credit_user | number }} (recommender / user)</span></p>
<pre class="rec">{{ turn.rec_text }}</pre>
{% if turn.user_text %}<pre class="user">{{ turn.user_text }}</pre>{% endif %}
{% endfor %}
</details>
{% endfor %}
{% endif %}
{% if info %}
<h2>Run</h2>
<table><tbody>
{% for key, value in info %}<tr><td>{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}</tbody></table>
{% endif %}
<h2>Settings</h2>
<details><summary>All {{ settings | length }} settings</summary><table><tbody>
{% for key, value in settings %}<tr><td>{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}</tbody></table></details>
<h2>Versions</h2>
<p class="quiet">Of {{ versions_of }}.</p>
<table><tbody>
{% for key, value in versions %}<tr><td>{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}</tbody></table>
</body>
</html>
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Draw a run's figures and write its report.html again, from the files in the run folder."""

    run: tyro.conf.Positional[Path]
    """The run folder."""


@cli.main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """The command of this module."""
    options = cli.parse(ReportConfig, argv, "python -m coars_fast.report")
    if not options.run.is_dir():
        raise RunFolderError(f"{options.run}: no such folder")
    print(write_report(options.run))


if __name__ == "__main__":
    main()
