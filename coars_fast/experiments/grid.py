"""An experiment file (TOML) -> its cells: every data set, seed and variant with all settings of that run.

    extends = "variants.toml"        # another file whose tables these are laid over
    seeds = [71, 72, 73]
    compare = "clipped"              # the variant that the others are tested against; a list is taken too

    [base]                           # a preset and settings of all cells, written as in a preset
    preset = "cpu_tiny"
    train.num_steps = 40

    [per_seed]                       # what a seed sets; {seed} stands for its number
    seed = "{seed}"
    data.eval_seed = "2{seed}"

    [datasets.world]                 # label (what tables call it) and settings
    label = "synthetic world"

    [variants.no_credit]             # label, datasets, seeds (a list, or the first so many) and settings
    label = "without credit"
    loss.credit_weight = 0

Later ones win: preset, base, flags of the command line, data set, seed, variant. The variants of a data set and seed
are evaluated on the same users and candidates. No torch here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from coars_fast import cli
from coars_fast.config import Config
from coars_fast.config_checks import check
from coars_fast.errors import ConfigError

TOP_LEVEL = ("extends", "seeds", "compare", "curves", "base", "per_seed", "datasets", "variants")
SETTINGS = tuple(f.name for f in fields(Config) if f.name not in ("out", "resume", "preset"))
"""What a table of settings may hold at its top; where a cell runs is not its own to say."""
EVALUATED = (
    "path", "format", "min_interactions", "min_item_interactions", "hold_out_users", "eval_seed", "num_eval_users",
    "candidates",
)  # fmt: skip
"""Settings of `data` that say on which users and candidates a cell is evaluated; all of `world` does so too."""
SASREC = "sasrec_top1"
"""The row of SASRec's best candidate: it needs no run, every cell's evaluation.json has its hits."""
Table = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train, or not to."""

    name: str
    label: str
    datasets: tuple[str, ...]
    """Data sets that it runs on."""
    seeds: tuple[int, ...]
    """Seeds that it runs with."""
    settings: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the grid."""

    dataset: str
    seed: int
    variant: str
    config: Config = field(repr=False)
    """Its settings; `out` and `resume` are for the runner to add."""

    @property
    def name(self) -> str:
        """`world/71/clipped`, also its folder."""
        return f"{self.dataset}/{self.seed}/{self.variant}"

    def matches(self, pattern: str) -> bool:
        """Whether a pattern of `--only` means this cell: its whole name, or its data set, seed or variant."""
        parts = (self.name, self.dataset, str(self.seed), self.variant)
        expression = re.compile(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."))
        return any(expression.fullmatch(part) for part in parts)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A checked experiment file."""

    name: str
    """The file's stem."""
    source: str
    """The file, for messages."""
    seeds: tuple[int, ...]
    datasets: Mapping[str, str]
    """name -> label."""
    variants: Mapping[str, Variant]
    compare: tuple[str, ...]
    """Variants that the others are tested against."""
    curves: tuple[str, ...]
    """Variants whose learning curves are drawn."""
    cells: tuple[Cell, ...]
    """In the order in which they run: all variants of a seed before the next seed."""

    def select(self, patterns: Sequence[str]) -> tuple[Cell, ...]:
        """The cells that any of the patterns means; all without patterns."""
        for pattern in patterns:
            if not any(cell.matches(pattern) for cell in self.cells):
                known = sorted({part for cell in self.cells for part in cell.name.split("/")} | {self.cells[0].name})
                raise ConfigError(f"--only {pattern}: no such cell; {nearest(pattern, known)}")
        return tuple(c for c in self.cells if not patterns or any(c.matches(pattern) for pattern in patterns))


def load_experiment(path: Path, flags: Sequence[str] = ()) -> Experiment:
    """Read and check a file.

    Args:
        path: the TOML file.
        flags: settings of the command line (`--data.path FOLDER`), in place of those of `[base]`.

    Raises:
        ConfigError: the file is malformed, names what does not exist, or makes a cell whose settings contradict each
            other.
    """
    table, source = _read(path, ()), str(path)
    _known(table, TOP_LEVEL, source, "")
    seeds = _seeds(table.get("seeds"), f"{source}: seeds")
    datasets = _tables(table, "datasets", source)
    variants = {
        name: _variant(name, entry, tuple(datasets), seeds, source)
        for name, entry in _tables(table, "variants", source).items()
    }
    if SASREC in variants:
        raise ConfigError(f"{source}: variants.{SASREC}: the row of SASRec is called so; choose another name")
    base, per_seed = _settings(table.get("base", {}), "base", source, also=("preset",)), table.get("per_seed", {})
    _settings(per_seed, "per_seed", source)
    starts = {
        name: _start(base, _settings(entry, f"datasets.{name}", source, also=("preset", "label")), source, flags)
        for name, entry in datasets.items()
    }
    cells = []
    for seed in seeds:
        for dataset, start in starts.items():
            seeded = cli.overlay(start, _filled(per_seed, seed), f"{source}: per_seed")
            for v in variants.values():
                if dataset in v.datasets and seed in v.seeds:
                    config = cli.overlay(seeded, v.settings, f"{source}: variants.{v.name}")
                    cell = Cell(dataset=dataset, seed=seed, variant=v.name, config=config)
                    cells.append(_checked(cell, source))
    if not cells:
        raise ConfigError(f"{source}: no variant runs on any data set and seed, so there is nothing to do")
    _comparable(cells, source)
    labels = {name: str(entry.get("label", name)) for name, entry in datasets.items()}
    _told_apart(labels, f"{source}: datasets")
    _told_apart({name: variant.label for name, variant in variants.items()}, f"{source}: variants")
    return Experiment(
        name=path.stem,
        source=source,
        seeds=seeds,
        datasets=labels,
        variants=variants,
        compare=_names(table.get("compare", []), variants, f"{source}: compare"),
        curves=_names(table.get("curves", []), variants, f"{source}: curves"),
        cells=tuple(cells),
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """Names like this one, in words."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"nearest: {', '.join(near)}" if near else f"there are {', '.join(known)}"


def _read(path: Path, above: tuple[Path, ...]) -> Table:
    """A file laid over the one that it extends."""
    if path.resolve() in above:
        raise ConfigError(f"{path}: extends: the files extend each other in a circle")
    if not path.is_file():
        by = f" (`extends` of {above[-1]})" if above else ""
        raise ConfigError(
            f"{path}{by}: no such experiment file; those that come with the repository are in experiments/"
        )
    table = cli.read_toml(path)
    parent = table.pop("extends", None)
    if parent is None:
        return table
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends: expected a file's name, got {parent!r}")
    return _merged(_read(path.parent / parent, (*above, path.resolve())), table)


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> Table:
    both = {**old, **new}
    for key in old.keys() & new.keys():
        if isinstance(old[key], Mapping) and isinstance(new[key], Mapping):
            both[key] = _merged(old[key], new[key])
    return both


def _known(table: Mapping[str, Any], known: Sequence[str], source: str, prefix: str) -> None:
    for key in table:
        if key not in known:
            raise ConfigError(f"{source}: {prefix}{key}: no such entry; {nearest(key, known)}")


def _tables(table: Mapping[str, Any], key: str, source: str) -> dict[str, Table]:
    """`[key.NAME]` tables, at least one; their names become folders."""
    found = table.get(key)
    if not isinstance(found, Mapping) or not found:
        raise ConfigError(f"{source}: {key}: none is given; write at least one table [{key}.NAME]")
    for name, entry in found.items():
        if not re.fullmatch(r"[A-Za-z0-9_.+-]*[A-Za-z0-9_+-]", name):
            raise ConfigError(f"{source}: {key}.{name!r}: a name is made of letters, digits and _ . + -")
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{source}: {key}.{name}: expected a table [{key}.{name}], got {entry!r}")
    return {name: dict(entry) for name, entry in found.items()}


def _settings(table: Any, name: str, source: str, *, also: Sequence[str] = ()) -> Table:
    """A table of settings without what else may stand in it (`also`)."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{source}: {name}: expected a table [{name}], got {table!r}")
    for key in table:
        if key not in SETTINGS and key not in also:
            in_words = nearest(key, (*also, *SETTINGS))
            raise ConfigError(f"{source}: {name}.{key}: no such setting; {in_words}")
    return {key: value for key, value in table.items() if key != "label"}


def _start(base: Table, dataset: Table, source: str, flags: Sequence[str]) -> Config:
    """Settings of a data set before seed and variant."""
    preset = dataset.pop("preset", base.get("preset", Config.preset))
    if not isinstance(preset, str):
        raise ConfigError(f"{source}: preset: expected a name or a file, got {preset!r}")
    start = replace(cli.load_preset(preset), preset=preset)
    common = {key: value for key, value in base.items() if key != "preset"}
    start = cli.overlay(start, common, f"{source}: base")
    if flags:
        start = cli.parse(Config, flags, "python -m coars_fast.experiment FILE", default=start)
        if start.out is not None or start.resume is not None or start.preset != preset:
            raise ConfigError(
                "--resume and --preset are not for an experiment: it goes on by itself, its file has presets"
            )
    return cli.overlay(start, dataset, f"{source}: datasets")


def _filled(table: Mapping[str, Any], seed: int) -> Table:
    """`per_seed` for one seed: texts are templates of whole numbers, everything else stays."""
    found: Table = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found[key] = _filled(value, seed)
        elif isinstance(value, str) and "{seed}" in value:
            text = value.replace("{seed}", str(seed))
            found[key] = int(text) if text.isdecimal() else text
        else:
            found[key] = value
    return found


def _variant(name: str, entry: Table, datasets: tuple[str, ...], seeds: tuple[int, ...], source: str) -> Variant:
    where = f"{source}: variants.{name}"
    settings = _settings(entry, f"variants.{name}", source, also=("label", "datasets", "seeds"))
    chosen = settings.pop("datasets", list(datasets))
    given = settings.pop("seeds", len(seeds))
    if type(given) is int and given > 0:
        wanted = seeds[:given]
    else:
        wanted = _seeds(given, f"{where}.seeds")
        for seed in wanted:
            if seed not in seeds:
                raise ConfigError(f"{where}.seeds: {seed} is not among the file's seeds {list(seeds)}")
    return Variant(
        name=name,
        label=str(entry.get("label", name)),
        datasets=_names(chosen, datasets, f"{where}.datasets", empty=False),
        seeds=tuple(seed for seed in seeds if seed in wanted),
        settings=settings,
    )


def _names(value: Any, known: Iterable[str], where: str, *, empty: bool = True) -> tuple[str, ...]:
    """One name or a list of names, each of which exists; an empty list only if that may be."""
    names, known = [value] if isinstance(value, str) else value, list(known)
    if not isinstance(names, list) or not (names or empty):
        raise ConfigError(f"{where}: expected a name or a list of names, got {value!r}")
    for name in names:
        if name not in known:
            raise ConfigError(f"{where}: {name!r} is not there; {nearest(str(name), known)}")
    return tuple(names)


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    whole = isinstance(value, list) and value and all(type(s) is int and s >= 0 for s in value)
    if not whole or len(set(value)) < len(value):
        raise ConfigError(f"{where}: expected a list of different whole numbers such as [71, 72, 73], got {value!r}")
    return tuple(value)


def _comparable(cells: Sequence[Cell], source: str) -> None:
    """Raise :class:`ConfigError` if seeds are no different runs, or variants would not be evaluated on the same."""
    first: dict[tuple[str, int], Cell] = {}
    other_seeds: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        alike = other_seeds.setdefault((cell.dataset, cell.variant), cell)
        if alike is not cell and alike.config == cell.config:
            raise ConfigError(
                f"{source}: seeds: {alike.name} and {cell.name} have the same settings and would be the same run; say "
                'what a seed sets, as in [per_seed] seed = "{seed}"'
            )
        beside = first.setdefault((cell.dataset, cell.seed), cell)
        ours, theirs = _evaluated(cell.config), _evaluated(beside.config)
        for name in ours:
            if ours[name] != theirs[name]:
                raise ConfigError(
                    f"{source}: variants.{cell.variant}: {name} is {ours[name]}, that of {beside.variant} is "
                    f"{theirs[name]}: they would be evaluated on different users or candidates and could not be "
                    "compared; set it in [base] or [per_seed], or make two data sets of them"
                )


def _evaluated(config: Config) -> dict[str, Any]:
    """Setting -> value: what a cell is evaluated on."""
    found = {f"data.{name}": getattr(config.data, name) for name in EVALUATED}
    return found | {f"world.{f.name}": getattr(config.world, f.name) for f in fields(config.world)}


def _told_apart(labels: Mapping[str, str], where: str) -> None:
    """Raise :class:`ConfigError` if a table would call two of them the same."""
    names: dict[str, str] = {}
    for name, label in labels.items():
        if names.setdefault(label, name) != name:
            raise ConfigError(f"{where}: {names[label]} and {name} are both called {label!r}; give another `label`")


def _checked(cell: Cell, source: str) -> Cell:
    try:
        check(cell.config)
    except ConfigError as error:
        raise ConfigError(f"{source}: {cell.name}: {error}") from error
    return cell
