"""MovieLens folders: both layouts, order of tied timestamps, duplicates, titles; and the real ml-latest-small."""

from __future__ import annotations

import csv
import logging
import os
import time
from pathlib import Path

import pytest

from coars_fast.config import Config, DataConfig, WorldConfig
from coars_fast.data.load import load_dataset
from coars_fast.data.movielens import load_movielens
from coars_fast.data.titles import fold_title, unique_titles
from coars_fast.errors import DataError

MOVIES_CSV = (
    'movieId,title,genres\n10,"Matrix, The (1999)",Action\n2,Jumanji (1995),Comedy\n5,Unrated (1990),Drama\n7,,Drama\n'
)
RATINGS_CSV = """userId,movieId,rating,timestamp
3,10,4.5,200
3,2,0.5,200
3,7,1,100
1,7,3.0,50
1,2,5.0,40
1,7,2.0,10
"""


def write(folder: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        path = folder / name.replace("_", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_csv_layout(tmp_path: Path):
    data = load_movielens(write(tmp_path, movies_csv=MOVIES_CSV, ratings_csv=RATINGS_CSV))
    assert data.name == tmp_path.name
    assert data.item_ids == ("2", "7", "10")  # rated movies only, by movieId
    assert data.titles == ("Jumanji (1995)", "Untitled [7]", "Matrix, The (1999)")
    assert data.user_ids == ("1", "3")
    # User 1: movie 7 at 10 and again at 50 counts once, at 10. User 3: 2 and 10 are tied, the lower movieId is first.
    assert data.sequences == ((1, 0), (1, 0, 2))


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_csv_line_ends_and_byte_order_mark(tmp_path: Path, ending: str, mark: bytes):
    movies, ratings = (mark + text.replace("\n", ending).encode() for text in (MOVIES_CSV, RATINGS_CSV))
    data = load_movielens(write(tmp_path, movies_csv=movies, ratings_csv=ratings))
    assert data.sequences == ((1, 0), (1, 0, 2))


def test_csv_columns_in_another_order(tmp_path: Path):
    ratings = "timestamp,movieId,userId,rating\n9,2,1,3.5\n8,7,1,3.5\n"
    data = load_movielens(write(tmp_path, movies_csv=MOVIES_CSV, ratings_csv=ratings))
    assert data.item_ids == ("2", "7") and data.sequences == ((1, 0),)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_dat_layout(tmp_path: Path, encoding: str):
    movies = "1::Misérables, Les (1995)::Drama\n2::Face::Off (1997)::Action|Crime\n3::Amélie (2001)::Comedy\n"
    ratings = "6040::2::5::956703932\n6040::1::3::956703932\n12::3::4::1\n6040::3::1::956703000"
    data = load_movielens(write(tmp_path, movies_dat=movies.encode(encoding), ratings_dat=ratings))
    assert data.titles == ("Misérables, Les (1995)", "Face::Off (1997)", "Amélie (2001)")
    assert data.user_ids == ("12", "6040")
    assert data.sequences == ((2,), (2, 0, 1))


def test_few_ratings_of_unknown_movies_are_dropped_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    ratings = "userId,movieId,rating,timestamp\n" + "".join(f"{u},2,3,{u}\n" for u in range(1, 21)) + "4,999,3,77\n"
    write(tmp_path, movies_csv=MOVIES_CSV, ratings_csv=ratings)
    with caplog.at_level(logging.WARNING):
        data = load_movielens(tmp_path)
    assert data.num_users == 20 and data.sequences[3] == (0,)
    assert [r.message for r in caplog.records if "1 of 21" in r.message and "999" in r.message] and len(
        caplog.records
    ) == 1


def test_titles_are_one_line_and_different():
    assert fold_title("  A\tB\r\n\x00C\u2028D\u00a0E \x1b[31m\u202eF ") == "A B C D E [31mF"
    assert unique_titles(["A", "a ", "", "A [7]", "\n"], ["1", "7", "3", "8", "9"]) == (
        "A",
        "a [7]",
        "Untitled [3]",
        "A [7] [8]",
        "Untitled [9]",
    )


@pytest.mark.parametrize("blank", "\u3164\u115f\u1160\uffa0\u2800")
def test_a_title_of_nothing_that_shows_is_none(blank: str):
    assert unique_titles([f"{blank} {blank}", f"A{blank}"], ["7", "8"]) == ("Untitled [7]", "A")


def test_load_dataset_leaves_out_users_of_few_interactions(tmp_path: Path):
    write(tmp_path, movies_csv=MOVIES_CSV, ratings_csv=RATINGS_CSV)
    data = load_dataset(Config(data=DataConfig(path=str(tmp_path), min_interactions=3)))
    assert data.user_ids == ("3",) and data.sequences == ((1, 0, 2),) and data.num_items == 3
    with pytest.raises(DataError, match=r"min_interactions = 4.*the most interactions of a user are 3"):
        load_dataset(Config(data=DataConfig(path=str(tmp_path), min_interactions=4)))


def test_load_dataset_makes_the_world_without_a_path():
    world = WorldConfig(num_users=20)
    data = load_dataset(Config(world=world))
    assert data.num_users == 20 and data.num_items == world.num_items
    assert data == load_dataset(Config(world=world))


@pytest.fixture(scope="module")
def latest_small() -> Path:
    repository = Path(__file__).parents[2]
    folder = (repository / os.environ.get("COARS_DATA", "../shared/data") / "ml-latest-small").resolve()
    if not folder.is_dir():
        pytest.skip(f"no ml-latest-small at {folder}; set COARS_DATA to the folder that holds it")
    return folder


def test_ml_latest_small(latest_small: Path):
    start = time.perf_counter()
    data = load_movielens(latest_small)
    assert time.perf_counter() - start < 5.0  # about 0.3 s on an idle core
    assert (data.num_users, data.num_items, sum(map(len, data.sequences))) == (610, 9724, 100_836)
    assert len({title.casefold() for title in data.titles}) == 9724
    assert all(len(set(s)) == len(s) for s in data.sequences)
    assert data.titles[0] == "Toy Story (1995)"


def test_ml_latest_small_last_timestamps_are_tied_for_94_users(latest_small: Path):
    ratings: dict[str, list[tuple[int, int]]] = {}
    with (latest_small / "ratings.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            ratings.setdefault(row["userId"], []).append((int(row["timestamp"]), int(row["movieId"])))
    data = load_movielens(latest_small)
    num_tied = 0
    for user, sequence in zip(data.user_ids, data.sequences, strict=True):
        latest = max(timestamp for timestamp, _ in ratings[user])
        tied = [movie for timestamp, movie in ratings[user] if timestamp == latest]
        num_tied += len(tied) > 1
        assert data.item_ids[sequence[-1]] == str(max(tied))
        assert [data.item_ids[i] for i in sequence] == [str(movie) for _, movie in sorted(ratings[user])]
    assert num_tied == 94
