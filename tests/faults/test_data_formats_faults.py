"""Broken files of the public layouts: each error names the file, the line, what was found, and the way out."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import pytest

from coars_fast.config import Config, DataConfig
from coars_fast.data.formats import FORMATS, detect, load
from coars_fast.data.load import load_dataset
from coars_fast.errors import DataError, MissingDataError
from tests.faults.test_game_hostile_titles import HOSTILE
from tests.unit.test_data_formats import AMAZON_2018, AMAZON_2023, LASTFM, LLARA, ML_100K, PLAIN, RECBOLE, write

AMAZON_RATINGS = {"Video_Games.csv": "", "meta_Video_Games.jsonl.gz": AMAZON_2023["meta_Video_Games.jsonl.gz"]}


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"found nothing\. Known are: MovieLens.*interactions.csv and items.csv"):
        detect(tmp_path)
    write(tmp_path, {"notes.txt": "x"})
    with pytest.raises(MissingDataError, match=r"found notes.txt\. Known"):
        detect(tmp_path)
    write(tmp_path, {"ml.zip": "x", "ratings.csv.gz": "x"})
    with pytest.raises(MissingDataError, match=r"notes.txt, ratings.csv.gz; unpack ml.zip, ratings.csv.gz there"):
        detect(tmp_path)


@pytest.mark.parametrize("name", ["auto", *FORMATS])
def test_no_folder_or_a_file_for_one_is_the_same_error_in_every_layout(tmp_path: Path, name: str) -> None:
    write(tmp_path, {"notes.txt": "x", "ml.zip": "x"})
    with pytest.raises(MissingDataError, match=r"nowhere: no such folder.*download.*--data.path"):
        load(tmp_path / "nowhere", name)
    with pytest.raises(MissingDataError, match=r"notes\.txt: this is a file; give the folder that holds the data set"):
        load(tmp_path / "notes.txt", name)
    with pytest.raises(MissingDataError, match=r"ml\.zip: this is an archive; unpack it and give the folder"):
        load(tmp_path / "ml.zip", name)
    with pytest.raises(MissingDataError, match=r"found ml\.zip, notes\.txt"):
        load(tmp_path, name)


def test_reviews_without_metadata_name_what_is_missing(tmp_path: Path) -> None:
    write(tmp_path, {"Games_5.json.gz": "{}"})
    for path in (tmp_path, tmp_path / "Games_5.json.gz"):
        with pytest.raises(MissingDataError, match=r"if Games_5\.json\.gz holds .*, meta_Games\.json\.gz is missing"):
            load(path)
        with pytest.raises(MissingDataError, match=r"beside them, meta_Games\.json\.gz; found Games_5\.json\.gz"):
            load(path, "amazon")


@pytest.mark.parametrize(
    ("good", "name", "content", "message"),
    [
        (ML_100K, "u.data", "196\t2\t3\n", r"u\.data, line 1: expected 4 fields"),
        (ML_100K, "u.item", "one|Toy Story\n", r"u\.item, line 1: movieId should be a whole number"),
        (ML_100K, "u.item", "1\n", r"u\.item, line 1: expected a movieId and a title"),
        (LASTFM, "artists.dat", "id\turl\n", r"artists\.dat, line 1: expected a column name, found 'id,url'"),
        (LASTFM, "artists.dat", "id\tname\n7\n", r"artists\.dat, line 2: expected the fields id, name"),
        (LASTFM, "user_taggedartists-timestamps.dat", "", r"timestamps\.dat: no interaction"),
        (
            LASTFM,
            "user_taggedartists-timestamps.dat",
            "userID\tartistID\ttimestamp\n1\t7\tsoon\n",
            r"line 2: timestamp should be a number or a date like 2024-05-01, found 'soon'",
        ),
        (LLARA, "id2name.txt", "0 Cher\n", r"id2name\.txt, line 1: expected id::name"),
        (
            LLARA,
            "Val_data.jsonl",
            "[1, 2]\n",
            r"Val_data\.jsonl, line 1: expected a JSON object, found '\[1, 2\]'",
        ),
        (LLARA, "Val_data.jsonl", '{"seq": [[1]], "len_seq": 1, "next": 2}\n', r"line 1: expected seq \(a list"),
        (LLARA, "Val_data.jsonl", '{"seq": "12345", "len_seq": 4, "next": 2}\n', r"line 1: expected seq \(a list"),
        (LLARA, "Val_data.jsonl", '{"seq": [1], "len_seq": Infinity, "next": 2}\n', r"len_seq \(a whole number\)"),
        (LLARA, "Val_data.jsonl", '{"seq": [1], "len_seq": 1}\n', r"next \(an item\), found"),
        (LLARA, "Val_data.jsonl", '{"seq": [1], "len_seq": -1, "next": 2}\n', r"from 0 to 1, .*found -1"),
        (LLARA, "Val_data.jsonl", '{"seq": [1], "len_seq": 50, "next": 2}\n', r"line 1: len_seq should .*found 50"),
        (LLARA, "Val_data.jsonl", "[" * 200_000, r"line 1: not JSON \(maximum recursion"),
        (AMAZON_2018, "Musical_Instruments_5.json.gz", "[" * 200_000, r"line 1: not JSON \(maximum recursion"),
        (
            AMAZON_2023,
            "Video_Games.jsonl.gz",
            '{"user_id": "U", "parent_asin": null, "timestamp": 1}\n',
            r"line 1: expected a review with user_id, parent_asin, timestamp, found",
        ),
        (AMAZON_RATINGS, "Video_Games.csv", "P1,U,5,1\nP1,U\rx,5,2\n", r"Video_Games\.csv, line 2: expected 4 fields"),
        (AMAZON_RATINGS, "Video_Games.csv", f"P1,{'z' * 200_000},5,1\n", r"line 1: not readable as CSV \(field larger"),
        (
            PLAIN,
            "items.csv",
            gzip.compress(b"item,title\n", mtime=0),
            r"items\.csv: looks like a gzip or zip archive; unpack",
        ),
        (ML_100K, "u.item", b"PK\x03\x04", r"u\.item: looks like a gzip or zip archive"),
        (ML_100K, "u.data", gzip.compress(b"1\t1\t1\t1\n", mtime=0), r"u\.data: looks like a gzip or zip archive"),
        (
            PLAIN,
            "interactions.csv",
            "id,user_id,product_id\n1,ann,x\n",
            r"item_id or iid, found 'id,user_id,prod",
        ),
        (AMAZON_2018, "Musical_Instruments_5.json.gz", "{'asin': 1}\n", r"line 1: not JSON"),
        (AMAZON_2018, "Musical_Instruments_5.json.gz", "3\n", r"line 1: expected a JSON object"),
        (
            AMAZON_2018,
            "Musical_Instruments_5.json.gz",
            '{"reviewerID": "A", "asin": "B00"}\n',
            r"line 1: expected a review with reviewerID, asin, unixReviewTime, found",
        ),
        (AMAZON_2018, "Musical_Instruments_5.json.gz", '{"a": 1}\n', r"unixReviewTime or user_id, parent_asin"),
        (AMAZON_2018, "meta_Musical_Instruments.json.gz", '{"title": 1}\n', r"line 1: expected a product with asin"),
        (AMAZON_2023, "meta_Video_Games.jsonl.gz", "", r"2 of 2 interactions are with items that meta_Video_Games"),
        (RECBOLE, "toy.inter", "item_id:token\n1\n", r"toy\.inter, line 1: expected a column user_id or session_id"),
        (
            RECBOLE,
            "toy.inter",
            "user_id:token\titem_id_list:token_seq\titem_id:token\n",
            r"toy\.inter: holds prepared sequences",
        ),
        (RECBOLE, "toy.inter", "", r"toy\.inter: empty"),
        (RECBOLE, "toy.inter", "user_id:token\titem_id:token\nu\n", r"line 2: expected 2 fields between tabs"),
        (RECBOLE, "toy.inter", "user_id:token\titem_id:token\nu\t \n", r"line 2: item_id is empty"),
        (RECBOLE, "toy.item", "item_id:token\tyear:token\n", r"toy\.item, line 1: no field with title or name"),
        (PLAIN, "interactions.csv", "who,item\n", r"interactions\.csv, line 1: expected a column user or user_id"),
        (PLAIN, "interactions.csv", "", r"interactions\.csv: empty"),
        (PLAIN, "interactions.csv", "user,item\n", r"interactions\.csv: no interaction in it"),
        (PLAIN, "interactions.csv", "user,item,time\nu,x,1\n\nu,x\n", r"line 4: fewer fields than the header has"),
        (PLAIN, "interactions.csv", "user,item,time\nu,x,inf\n", r"line 2: timestamp should be a finite number"),
        (PLAIN, "interactions.csv", 'user,item\n"u,x\n', r"interactions\.csv, line 2: not readable as CSV"),
        (PLAIN, "interactions.csv", b"user,item\n\xe9,x\n", r"line 2: not UTF-8 \(b'\\xe9,x'\); save the file"),
        (
            PLAIN,
            "items.csv",
            "item,title\nx,X\nx,Y\n",
            r"items\.csv, line 3: item x stands in line 2 with another title",
        ),
        (PLAIN, "items.csv", "item,title\n", r"items\.csv: no item in it"),
        (PLAIN, "items.csv", "item,title\nz,Z\n", r"3 of 3 interactions are with items that items\.csv lacks"),
    ],
)
def test_malformed(tmp_path: Path, good: dict[str, str | bytes], name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(write(tmp_path, {**good, name: content}))


@pytest.mark.parametrize(
    ("good", "without", "name", "message"),
    [
        (LASTFM, "user_taggedartists-timestamps.dat", "auto", r"play counts but no times.*no order"),
        (LASTFM, "artists.dat", "lastfm", r"expected artists\.dat and user_taggedartists.*found user_artists"),
        (LLARA, "Val_data.jsonl", "auto", r"val_data\.jsonl is missing; found Test_data"),
        (AMAZON_2023, "meta_Video_Games.jsonl.gz", "amazon", r"beside them, meta_.*found Video_Games\.jsonl\.gz"),
        (RECBOLE, "toy.item", "auto", r"toy\.item: no such file; the agents name items by their titles"),
        (RECBOLE, "toy.inter", "recbole", r"expected NAME\.inter and NAME\.item; found toy\.item"),
        (PLAIN, "items.csv", "plain", r"expected interactions\.csv and items\.csv; found interactions\.csv"),
    ],
)
def test_missing(tmp_path: Path, good: dict[str, str | bytes], without: str, name: str, message: str) -> None:
    with pytest.raises(MissingDataError, match=message):
        load(write(tmp_path, {k: v for k, v in good.items() if k != without}), name)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    write(tmp_path, {"id2name.txt": "0::A\n", "train_data.df": b"\x80\x04", "Test_data.df": b"\x80\x04"})
    with pytest.raises(MissingDataError, match=r"Test_data\.df, train_data\.df are pickles.*not opened.*read_pickle"):
        load(tmp_path)


def test_several_atomic_data_sets(tmp_path: Path) -> None:
    write(tmp_path, {**RECBOLE, "other.inter": "x"})
    with pytest.raises(DataError, match=r"several data sets \(other\.inter, toy\.inter\); point --data.path at one"):
        load(tmp_path)


def test_a_packed_file_that_was_cut_short(tmp_path: Path) -> None:
    folder = write(tmp_path, AMAZON_2023)
    path = folder / "Video_Games.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"Video_Games\.jsonl\.gz: broken or cut short after line \d+.*download"):
        load(folder)
    path.write_bytes(b"not packed")
    with pytest.raises(DataError, match=r"broken or cut short after line 0"):
        load(folder)
    path.write_bytes(gzip.compress(b'{"user_id": "\xff"}\n'))
    with pytest.raises(DataError, match=r"line 1: not UTF-8"):
        load(folder)


def test_users_of_one_interaction_are_left_out_or_named(tmp_path: Path) -> None:
    rows = "".join(f"u{u},{i}\n" for u in range(3) for i in range(u * 2 + 1))
    items = "".join(f"{i},T{i}\n" for i in range(9))
    folder = write(tmp_path, {"interactions.csv": "user,item\n" + rows, "items.csv": "item,title\n" + items})
    data = load_dataset(Config(data=DataConfig(path=str(folder), min_interactions=3)))
    assert data.user_ids == ("u1", "u2")
    with pytest.raises(DataError, match=r"min_interactions = 6.*a user are 5"):
        load_dataset(Config(data=DataConfig(path=str(folder), min_interactions=6)))


def test_hostile_titles_become_one_line_each_and_stay_different(tmp_path: Path) -> None:
    """What is left in them is text to the agents: tests/faults/test_game_hostile_titles.py."""
    titles = [title.encode(errors="replace").decode() for title in HOSTILE.values()] * 2
    listed = io.StringIO()
    csv.writer(listed).writerows([("item", "title"), *enumerate(titles)])
    rows = "user,item\n" + "".join(f"u,{i}\n" for i in range(len(titles)))
    data = load(write(tmp_path, {"interactions.csv": rows, "items.csv": listed.getvalue()}))
    assert data.num_items == len(titles) == len({title.casefold() for title in data.titles})
    assert all(title.isprintable() and title.strip() == title for title in data.titles)
