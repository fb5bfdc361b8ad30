"""Look at a data set, fetch a public one, or check SASRec on one.

python -m coars_fast.data inspect PATH             # figures and a plot
python -m coars_fast.data download                 # lists the public sets
python -m coars_fast.data download ml-1m --accept-license
python -m coars_fast.data sasrec PATH              # trains it, ranks the last items, in full and against negatives
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from coars_fast import cli
from coars_fast.config import Config, DataConfig, SASRecConfig
from coars_fast.config_checks import check
from coars_fast.data.download import fetch, fetch_md5, unpack
from coars_fast.data.public import PUBLIC, PublicSet
from coars_fast.errors import ConfigError
from coars_fast.progress import Screen

Layout = Literal["auto", "movielens", "lastfm", "llara", "amazon", "recbole", "plain"]


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Print what a data set holds, and draw its popularity and history lengths."""

    path: tyro.conf.Positional[str]
    """Folder of a data set; of Amazon's reviews or RecBole's atomic files also the file of reviews or the `.inter`."""
    format: Layout = "auto"
    """Layout; `auto` goes by the files found."""
    min_interactions: int = DataConfig.min_interactions
    """Users with fewer interactions are left out."""
    min_item_interactions: int = DataConfig.min_item_interactions
    """Items with fewer interactions are left out."""
    train_targets: int = DataConfig.train_targets
    """Items at the end of each history used as targets of training episodes."""
    candidates: str = "top20+gt"
    """Candidates that users must leave enough items for."""
    plot: str | None = None
    """Where to write the plot. Default: `inspect-<name>.png` here."""


@dataclass(frozen=True, kw_only=True)
class Download:
    """Fetch a public data set into a folder of the cache; without a name, list them."""

    name: tyro.conf.Positional[str] = ""
    """Which one."""
    accept_license: bool = False
    """Accept its terms without being asked."""
    to: str | None = None
    """Folder that holds the data sets. Default: `coars_fast/data` in $XDG_CACHE_HOME or ~/.cache."""
    sha256: str | None = None
    """SHA-256 that the file must have; for sets of several files, one for each, with commas between."""


@dataclass(frozen=True, kw_only=True)
class RankSASRec:
    """Train SASRec on all but each user's last two items, stop by the last but one, and rank the last one."""

    path: tyro.conf.Positional[str]
    """Folder of a data set, or its file of interactions."""
    format: Layout = "auto"
    """Layout; `auto` goes by the files found."""
    min_interactions: int = 5
    """Users with fewer interactions are left out."""
    min_item_interactions: int = 5
    """Items with fewer interactions are left out."""
    num_negatives: int = 100
    """Items that the user never took, for the sampled ranking."""
    save: str | None = None
    """Where to keep the trained model."""
    sasrec: SASRecConfig = field(default_factory=SASRecConfig)


def inspect(options: Inspect) -> Path:
    """Prints the figures, writes the plot and returns its path."""
    from coars_fast.data.formats import load
    from coars_fast.data.inspection import inspection
    from coars_fast.data.load import core
    from coars_fast.data.picture import draw

    data = DataConfig(
        path=options.path,
        format=options.format,
        candidates=options.candidates,
        min_interactions=options.min_interactions,
        min_item_interactions=options.min_item_interactions,
        train_targets=options.train_targets,
    )
    check(Config(data=data))
    screen = Screen()
    whole = load(Path(options.path), options.format)
    screen.say(f"{whole.name}: {whole.num_users:,} users, {whole.num_items:,} items in the files")
    dataset = core(whole, users=data.min_interactions, items=data.min_item_interactions)
    for what, figure in inspection(dataset, data):
        screen.say(f"{what:33} {figure}")
    path = draw(whole, dataset, Path(options.plot or f"inspect-{dataset.name}.png"))
    screen.say(f"plot: {path}")
    return path


def download(options: Download) -> Path | None:
    """Returns the folder of the data set; None if there was no name."""
    screen = Screen()
    if not options.name:
        for name, found in PUBLIC.items():
            screen.say(f"{name:24} {found.urls[0]}")
        return None
    if options.name not in PUBLIC:
        raise ConfigError(f"{options.name}: no such data set; known are {', '.join(PUBLIC)}")
    wanted = PUBLIC[options.name]
    sums = options.sha256.split(",") if options.sha256 else [None] * len(wanted.urls)
    if len(sums) != len(wanted.urls):
        raise ConfigError(f"--sha256: {options.name} has {len(wanted.urls)} files, found {len(sums)} sums")
    cache = Path(options.to) if options.to else default_cache()
    screen.say(f"{options.name}: {wanted.terms}")
    if not (options.accept_license or _agrees()):
        raise ConfigError(f"{options.name}: its terms were not accepted; give --accept-license to accept them")
    folder = download_set(wanted, cache, options.name, sums, screen)
    screen.say(f"{folder}: ready; look at it with `python -m coars_fast.data inspect {folder}`")
    return folder


def download_set(wanted: PublicSet, cache: Path, name: str, sums: Sequence[str | None], screen: Screen) -> Path:
    """Fetch and unpack all files of a set into `cache/name`."""
    folder = cache / name
    for url, sha256 in zip(wanted.urls, sums, strict=True):
        zipped = url.endswith(".zip")
        target = (cache if zipped else folder) / url.rpartition("/")[2]
        md5 = fetch_md5(f"{url}.md5") if wanted.md5_beside and not sha256 else None
        with screen.bar(target.name, 100) as advance:
            found = fetch(
                url,
                target,
                sha256=sha256,
                md5=md5,
                progress=lambda done, total, advance=advance: advance(
                    100 * done // total if total else 0, f"{done / 1e6:,.1f} MB"
                ),
            )
        how = "as you asked" if sha256 else "MD5 as published" if md5 else "nothing published to compare with; kept"
        screen.say(f"{target.name}: SHA-256 {found} ({how})")
        if zipped:
            unpack(target, folder)
            target.unlink()
    return folder


def default_cache() -> Path:
    """`coars_fast/data` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coars_fast" / "data"


def rank_sasrec(options: RankSASRec) -> dict[str, float]:
    """Prints and returns hit rate and NDCG of the last items."""
    from coars_fast.data.formats import load
    from coars_fast.data.load import core
    from coars_fast.data.ranking import full_ranking, sampled_ranking
    from coars_fast.data.sasrec import train_sasrec

    check(Config(sasrec=options.sasrec))
    screen = Screen()
    dataset = load(Path(options.path), options.format)
    dataset = core(dataset, users=max(3, options.min_interactions), items=options.min_item_interactions)
    screen.say(f"{dataset.name}: {dataset.num_users:,} users, {dataset.num_items:,} items")
    start, epochs = time.monotonic(), 0

    def show(epoch: int, of: int, loss: float) -> None:
        nonlocal epochs
        epochs = epoch
        advance(epoch, f"loss {loss:.3f}, {time.monotonic() - start:,.0f} s")

    with screen.bar("SASRec", options.sasrec.num_epochs) as advance:
        model = train_sasrec(
            [sequence[:-2] for sequence in dataset.sequences],
            dataset.num_items,
            options.sasrec,
            seed=options.sasrec.seed,
            validation=[sequence[-2] for sequence in dataset.sequences],
            progress=show,
        )
    if options.save:
        model.save(options.save)
    histories = [sequence[:-1] for sequence in dataset.sequences]
    targets = [sequence[-1] for sequence in dataset.sequences]
    figures = full_ranking(model, histories, targets)
    screen.say(f"among all items: HR@10 {figures['hr@10']:.4f}, NDCG@10 {figures['ndcg@10']:.4f}")
    sampled = sampled_ranking(model, histories, targets, num_negatives=options.num_negatives, seed=options.sasrec.seed)
    screen.say(
        f"among {options.num_negatives} negatives: HR@10 {sampled['hr@10']:.4f}, NDCG@10 {sampled['ndcg@10']:.4f}"
    )
    screen.say(f"{epochs} epochs and both rankings in {time.monotonic() - start:,.0f} s")
    return figures | {f"{name}_sampled": value for name, value in sampled.items()}


def _agrees() -> bool:
    if not sys.stdin.isatty():
        return False
    return input("Type yes to accept these terms: ").strip().casefold() in ("yes", "y")


COMMANDS: dict[str, tuple[type, Callable[[Any], object]]] = {
    "inspect": (Inspect, inspect),
    "download": (Download, download),
    "sasrec": (RankSASRec, rank_sasrec),
}


@cli.main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    if arguments[0] not in COMMANDS:
        raise ConfigError(f"{arguments[0]}: no such command; there are {', '.join(COMMANDS)}")
    options, run = COMMANDS[arguments[0]]
    run(cli.parse(options, arguments[1:], f"python -m coars_fast.data {arguments[0]}"))


if __name__ == "__main__":
    main()
