"""Public data sets that `python -m coars_fast.data download` knows: where they are, and on what terms.

Nothing of them is shipped. Checksums: MovieLens publishes an `.md5` file beside each archive, which is fetched and
compared; for the others none is published that we could check, so the SHA-256 of the first download is kept and later
ones are compared with it, or give the one that you trust (`--sha256`).
"""

from __future__ import annotations

from dataclasses import dataclass

_GROUPLENS = "https://files.grouplens.org/datasets"
_MCAULEY = "https://datarepo.eng.ucsd.edu/mcauley_group/data"

_MOVIELENS_TERMS = (
    "MovieLens, GroupLens Research, University of Minnesota. For research; no commercial use without permission of "
    "GroupLens; no endorsement may be implied; name the data set in publications (Harper and Konstan, ACM TiiS 5(4), "
    "2015, doi 10.1145/2827872). Passing it on: see the README of the archive, which holds the terms in full. "
    "https://grouplens.org/datasets/movielens/"
)
_LASTFM_TERMS = (
    "HetRec 2011 Last.FM, Information Retrieval Group of Universidad Autonoma de Madrid, distributed by GroupLens. For "
    "research, not for commercial use; the data are Last.fm's; name Last.fm and Cantador, Brusilovsky and Kuflik "
    "(HetRec at RecSys 2011). The archive's readme holds the terms in full. "
    "https://grouplens.org/datasets/hetrec-2011/"
)
_AMAZON_TERMS = (
    "Amazon reviews, McAuley Lab, UC San Diego. Published for research without an explicit licence; reviews and "
    "product texts belong to their authors and to Amazon; name {paper}. {page}"
)
_AMAZON_2018_TERMS = _AMAZON_TERMS.format(
    paper="Ni, Li and McAuley (EMNLP 2019)", page="https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/"
)
_AMAZON_2023_TERMS = _AMAZON_TERMS.format(
    paper="Hou et al. (arXiv 2403.03952)", page="https://amazon-reviews-2023.github.io/"
)


@dataclass(frozen=True, kw_only=True)
class PublicSet:
    """A data set that can be fetched."""

    urls: tuple[str, ...]
    terms: str
    """Licence in short, and where it stands in full; shown before anything is fetched."""
    md5_beside: bool = False
    """Each URL with `.md5` at its end holds its checksum."""


def _movielens(name: str) -> PublicSet:
    return PublicSet(urls=(f"{_GROUPLENS}/movielens/{name}.zip",), terms=_MOVIELENS_TERMS, md5_beside=True)


def _amazon_2018(category: str) -> PublicSet:
    root = f"{_MCAULEY}/amazon_v2"
    files = (f"{root}/categoryFilesSmall/{category}_5.json.gz", f"{root}/metaFiles2/meta_{category}.json.gz")
    return PublicSet(urls=files, terms=_AMAZON_2018_TERMS)


def _amazon_2023(category: str) -> PublicSet:
    root = f"{_MCAULEY}/amazon_2023/raw"
    files = (f"{root}/review_categories/{category}.jsonl.gz", f"{root}/meta_categories/meta_{category}.jsonl.gz")
    return PublicSet(urls=files, terms=_AMAZON_2023_TERMS)


_CATEGORIES = {"instruments": "Musical_Instruments", "cds": "CDs_and_Vinyl", "games": "Video_Games"}
PUBLIC: dict[str, PublicSet] = {
    **{
        name: _movielens(name)
        for name in ("ml-latest-small", "ml-100k", "ml-1m", "ml-10m", "ml-20m", "ml-25m", "ml-32m")
    },
    "lastfm": PublicSet(urls=(f"{_GROUPLENS}/hetrec2011/hetrec2011-lastfm-2k.zip",), terms=_LASTFM_TERMS),
    **{f"amazon2018-{short}": _amazon_2018(category) for short, category in _CATEGORIES.items()},
    **{f"amazon2023-{short}": _amazon_2023(category) for short, category in _CATEGORIES.items()},
}
