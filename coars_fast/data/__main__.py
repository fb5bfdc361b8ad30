"""Look at a data set, fetch a public one, or check SASRec on one.

python -m coars_fast.data inspect PATH             # figures and a plot
python -m coars_fast.data download                 # lists the public sets
python -m coars_fast.data download ml-1m --accept-license
python -m coars_fast.data sasrec PATH              # trains it, ranks the last items, in full and against negatives
"""

from __future__ import annotations

import os
import re
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
from coars_fast.data.download import fetch, fetch_folder, fetch_md5
from coars_fast.data.kept import kept_file, kept_folder
from coars_fast.data.public import PUBLIC, PublicSet
from coars_fast.data.records import Dataset
from coars_fast.errors import ConfigError
from coars_fast.progress import Advance, Screen

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
    """Folder of a data set; of Amazon's reviews or RecBole's atomic files also the file of reviews or the `.inter`."""
    format: Layout = "auto"
    """Layout; `auto` goes by the files found."""
    min_interactions: int = 5
    """Users with fewer interactions, or fewer than 3, are left out."""
    min_item_interactions: int = 5
    """Items with fewer interactions are left out."""
    num_negatives: int = 100
    """Items that the user never took, for the sampled ranking; all users must have left so many."""
    save: str | None = None
    """Where to keep the trained model."""
    sasrec: SASRecConfig = field(default_factory=SASRecConfig)


def inspect(options: Inspect) -> Path:
    """Prints the figures, writes the plot and returns its path."""
    from coars_fast.data.formats import load
    from coars_fast.data.inspection import inspection
    from coars_fast.data.load import core
    from coars_fast.data.picture import draw, picture_path

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
    picture = picture_path(Path(options.plot)) if options.plot else None
    whole = load(Path(options.path), options.format)
    screen.say(f"{whole.name}: {whole.num_users:,} users, {whole.num_items:,} items read")
    dataset = core(whole, users=data.min_interactions, items=data.min_item_interactions)
    for what, figure in inspection(dataset, data):
        screen.say(f"{what:33} {figure}")
    path = draw(whole, dataset, picture or Path(f"inspect-{dataset.name}.png"))
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
    sums = _sums(options, len(wanted.urls))
    cache = Path(options.to) if options.to else default_cache()
    screen.say(f"{options.name}: {wanted.terms}")
    if not (options.accept_license or _agrees()):
        raise ConfigError(f"{options.name}: its terms were not accepted; give --accept-license to accept them")
    folder = download_set(wanted, cache, options.name, sums, screen)
    screen.say(f"{folder}: ready; look at it with `python -m coars_fast.data inspect {folder}`")
    return folder


def download_set(wanted: PublicSet, cache: Path, name: str, sums: Sequence[str | None], screen: Screen) -> Path:
    """Fetch and unpack all files of a set into `cache/name`, but for those that are there from an earlier call.

    Raises:
        DownloadError: see :func:`coars_fast.data.download.fetch`.
        KeptError: something that was not downloaded is in the way; found out before anything is fetched.
    """
    folder = cache / name
    files = [(url, (cache if url.endswith(".zip") else folder) / url.rpartition("/")[2]) for url in wanted.urls]
    there = [
        kept_folder(target, folder, sha256) if target.suffix == ".zip" else kept_file(target, sha256)
        for (_, target), sha256 in zip(files, sums, strict=True)
    ]
    for (url, target), sha256, kept in zip(files, sums, there, strict=True):
        zipped = target.suffix == ".zip"
        if kept:
            again = f"delete {folder if zipped else target} to have it fetched again"
            screen.say(f"{target.name}: complete from an earlier call, SHA-256 {kept}; not fetched ({again})")
            continue
        md5 = fetch_md5(f"{url}.md5") if wanted.md5_beside and not sha256 else None
        with screen.bar(target.name, 100) as advance:

            def progress(done: int, total: int, advance: Advance = advance) -> None:
                advance(100 * done // total if total else 0, f"{done / 1e6:,.1f} MB")

            if zipped:
                found = fetch_folder(url, target, folder, sha256=sha256, md5=md5, progress=progress)
            else:
                found = fetch(url, target, sha256=sha256, md5=md5, progress=progress)
        how = "as you asked" if sha256 else "MD5 as published" if md5 else "nothing published to compare with; kept"
        screen.say(f"{target.name}: SHA-256 {found} ({how})")
    return folder


def _sums(options: Download, num_files: int) -> Sequence[str | None]:
    """What `--sha256` demands of each file."""
    if options.sha256 is None:
        return [None] * num_files
    sums = [part.strip().lower() for part in options.sha256.split(",")]
    if len(sums) != num_files:
        raise ConfigError(f"--sha256: {options.name} has {num_files} files, found {len(sums)} sums")
    for found in sums:
        if not re.fullmatch("[0-9a-f]{64}", found):
            raise ConfigError(f"--sha256: expected 64 hexadecimal digits, found {found!r} ({len(found)} characters)")
    return sums


def default_cache() -> Path:
    """`coars_fast/data` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coars_fast" / "data"


def rank_sasrec(options: RankSASRec) -> dict[str, float]:
    """Prints and returns hit rate and NDCG of the last items."""
    from coars_fast.data.formats import load
    from coars_fast.data.load import core, describe_left_out
    from coars_fast.data.ranking import full_ranking, sampled_ranking
    from coars_fast.data.sasrec import train_sasrec

    _check_sasrec(options)
    screen = Screen()
    dataset = load(Path(options.path), options.format)
    dataset = core(dataset, users=max(3, options.min_interactions), items=options.min_item_interactions)
    screen.say(f"{dataset.name}: {dataset.num_users:,} users, {dataset.num_items:,} items")
    if dataset.reading is not None and dataset.reading.left_out:
        screen.say(f"left out: {describe_left_out(dataset)}")
    _check_negatives(options, dataset)
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


def _check_sasrec(options: RankSASRec) -> None:
    """Refuse before any work what would fail after it."""
    check(Config(sasrec=options.sasrec))
    least = {"num_negatives": 1, "min_interactions": 1, "min_item_interactions": 0}
    for name, bound in least.items():
        if (value := getattr(options, name)) < bound:
            raise ConfigError(f"--{name.replace('_', '-')}: {value} must be {bound} or more")
    if options.save is None:
        return
    path = Path(options.save)
    if path.is_dir():
        raise ConfigError(f"--save: {path} is a folder; name a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--save: {path.parent} is no folder that can be written to; make it, or name another one")


def _check_negatives(options: RankSASRec, dataset: Dataset) -> None:
    """Refuse more negatives than some user has items left."""
    user = max(range(dataset.num_users), key=lambda u: len(dataset.sequences[u]))
    taken = len(dataset.sequences[user])
    left = dataset.num_items - taken
    if left < options.num_negatives:
        ways_out = [f"use --num-negatives {left} or fewer"] if left else []
        if options.min_item_interactions > 1:
            ways_out.append(f"keep more items (--min-item-interactions is {options.min_item_interactions})")
        raise ConfigError(
            f"--num-negatives: user {dataset.user_ids[user]} took {taken:,} of {dataset.num_items:,} items, which "
            f"leaves {left}, not {options.num_negatives}; {', or '.join(ways_out) or 'take that user out of the files'}"
        )


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
