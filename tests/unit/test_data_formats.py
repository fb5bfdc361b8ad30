"""Public layouts as their publishers pack them: what is read, how it is ordered, what is dropped and counted."""

from __future__ import annotations

import gzip
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from coars_fast.config import Config, DataConfig
from coars_fast.data.formats import FORMATS, detect, load
from coars_fast.data.inspection import inspection
from coars_fast.data.load import describe_left_out, load_dataset, notes
from coars_fast.data.records import Dataset
from coars_fast.data.splits import make_split
from coars_fast.data.table import Rows, Titles, assemble, id_order, parse_time
from coars_fast.data.titles import MAX_TITLE
from coars_fast.errors import DataError


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder


def lines(*records: dict[str, object]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def taken(data: Dataset) -> dict[str, list[str]]:
    return {
        user: [data.titles[i] for i in sequence] for user, sequence in zip(data.user_ids, data.sequences, strict=True)
    }


ML_100K = {
    "u.item": "1|Toy Story (1995)|01-Jan-1995||http://x|0|1\n2|Misérables, Les (1995)|||http://y|1|0\n".encode(
        "latin-1"
    ),
    "u.data": "196\t2\t3\t881250949\n196\t1\t3\t881250940\n22\t1\t1\t878887116\n",
    "u.user": "196|49|M|writer|55105\n",
}
LASTFM = {
    "artists.dat": "id\tname\turl\tpictureURL\n7\tBjörk\thttp://a\thttp://b\n8\tMúm\thttp://a\t\n9\tNobody\t\t\n",
    "user_taggedartists-timestamps.dat": (
        "userID\tartistID\ttagID\ttimestamp\n2\t8\t13\t1238536800000\n2\t7\t15\t1238536800000\n"
        "2\t8\t14\t1230000000000\n3\t7\t1\t1\n"
    ),
    "user_artists.dat": "userID\tartistID\tweight\n2\t7\t13883\n2\t9\t11690\n3\t7\t5\n",
}
LLARA = {
    "id2name.txt": "0::Cher\n1::Sting::Live\n2::Abba\n3::Queen\n",
    "train_data.jsonl": lines(
        {"seq": [0, 1, 2, 4, 4], "len_seq": 3, "next": 3},
        {"seq": [0, 1, 4, 4, 4], "len_seq": 2, "next": 3},
        {"seq": [3, 2, 1, 0, 4], "len_seq": 4, "next": 2},
    ),
    "Val_data.jsonl": lines({"seq": [3, 2, 1, 4, 4], "len_seq": 3, "next": 0}),
    "Test_data.jsonl": lines({"seq": [2, 1, 0, 4, 4], "len_seq": 3, "next": 3}),
}
AMAZON_2018 = {
    "Musical_Instruments_5.json.gz": lines(
        {"overall": 5.0, "reviewerID": "A2", "asin": "B01", "unixReviewTime": 1400000000, "reviewText": "ok\n"},
        {"overall": 1.0, "reviewerID": "A2", "asin": "B00", "unixReviewTime": 1300000000},
        {"overall": 1.0, "reviewerID": "A1", "asin": "B00", "unixReviewTime": 1300000000},
        {"overall": 1.0, "reviewerID": "A1", "asin": "B02", "unixReviewTime": 1300000000},
    ),
    "meta_Musical_Instruments.json.gz": lines(
        {"asin": "B00", "title": "Strings &amp; Picks"},
        {"asin": "B00", "title": "Strings, again"},
        {"asin": "B01", "title": "var aPageStart = (new Date()).getTime();"},
        {"asin": "B99", "title": "Nobody's"},
    ),
}
AMAZON_2023 = {
    "Video_Games.jsonl.gz": lines(
        {"user_id": "U", "asin": "C1", "parent_asin": "P1", "timestamp": 1600000000123, "rating": 5.0},
        {"user_id": "U", "asin": "C2", "parent_asin": "P2", "timestamp": 1600000000122, "rating": 5.0},
    ),
    "meta_Video_Games.jsonl.gz": lines({"parent_asin": "P1", "title": "One"}, {"parent_asin": "P2", "title": None}),
}
RECBOLE = {
    "toy.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "u\t10\t5\t2.5\nu\t9\t1\t1e0\nv\t9\t1\t3\n",
    "toy.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\n9\tNine Lives\t1990\n10\tTen\t\n",
}
PLAIN = {
    "interactions.csv": "user_id,Item,when,timestamp\n"
    "ann,x,,2024-05-02\nann,y,,2024-05-01T23:00:00+00:00\nbob,x,,2024-01-01\n",
    "items.csv": 'item,title\nx,"A ""title"", on\ntwo lines"\ny,Plain\n',
}


def test_movielens_100k(tmp_path: Path) -> None:
    data = load(write(tmp_path / "ml-100k", ML_100K))
    assert taken(data) == {"22": ["Toy Story (1995)"], "196": ["Toy Story (1995)", "Misérables, Les (1995)"]}


def test_lastfm_is_ordered_by_the_first_tag(tmp_path: Path) -> None:
    data = load(write(tmp_path, LASTFM))
    assert taken(data) == {"2": ["Múm", "Björk"], "3": ["Björk"]}
    assert data.reading and data.reading.format == "lastfm" and data.reading.rows == 4
    counts = dict(data.reading.left_out)
    assert counts["artists of users in user_artists.dat that they never tagged (no time)"] == 1
    assert counts["repeated interactions of a user with an item"] == 1
    assert counts["items of artists.dat that nobody took"] == 1


def test_llara_rows_are_users_and_its_test_rows_are_evaluated(tmp_path: Path) -> None:
    data = load(write(tmp_path, LLARA))
    assert taken(data) == {
        "1": ["Cher", "Sting::Live", "Abba", "Queen"],
        "4": ["Queen", "Abba", "Sting::Live", "Cher"],
        "5": ["Abba", "Sting::Live", "Cher", "Queen"],
    }
    assert data.reading and data.reading.ordered_by == "file"
    assert dict(data.reading.left_out) == {
        "windows of fewer than 3 items": 1,
        "windows that hold their next item": 1,
    }
    assert [data.user_ids[u] for u in data.test_users] == ["5"]
    split = make_split(data, DataConfig())
    assert split.eval_users == data.test_users and split.train_users == (0, 1)
    small = load_dataset(Config(data=DataConfig(path=str(tmp_path), min_interactions=4)))
    assert [small.user_ids[u] for u in small.test_users] == ["5"]
    with pytest.raises(DataError, match="all 3 users are set apart"):
        make_split(replace(data, test_users=(0, 1, 2)), DataConfig())


def test_amazon_2018(tmp_path: Path) -> None:
    data = load(write(tmp_path, AMAZON_2018))
    assert data.name == "Musical_Instruments"
    assert taken(data) == {"A1": ["Strings & Picks"], "A2": ["Strings & Picks", "Untitled [B01]"]}
    assert data.reading and data.reading.untitled == 1
    counts = dict(data.reading.left_out)
    assert counts["interactions with items that meta_Musical_Instruments.json.gz lacks"] == 1
    assert counts["repeated items in meta_Musical_Instruments.json.gz"] == 1


@pytest.mark.parametrize(
    "ratings",
    [
        {"Musical_Instruments.csv": "B01,A2,5.0,1400000000\nB00,A2,1.0,1300000000\n"},
        {"Musical_Instruments.csv.gz": "user_id,parent_asin,rating,timestamp\nA2,B01,5,14\nA2,B00,5,13\n"},
    ],
)
def test_amazon_ratings_without_reviews(tmp_path: Path, ratings: dict[str, str | bytes]) -> None:
    meta = AMAZON_2018["meta_Musical_Instruments.json.gz"]
    data = load(write(tmp_path, {**ratings, "meta_Musical_Instruments.json.gz": meta}))
    assert taken(data) == {"A2": ["Strings & Picks", "Untitled [B01]"]}


def test_amazon_2023_knows_products_by_their_parent(tmp_path: Path) -> None:
    folder = write(tmp_path, AMAZON_2023)
    assert taken(load(folder)) == {"U": ["Untitled [P2]", "One"]}
    write(folder, AMAZON_2018)
    with pytest.raises(DataError, match=r"several categories.*Musical_Instruments_5\.json\.gz, Video_Games\.jsonl\.gz"):
        load(folder)
    assert load(folder / "Video_Games.jsonl.gz").name == "Video_Games"


def test_recbole(tmp_path: Path) -> None:
    folder = write(tmp_path, RECBOLE)
    assert taken(load(folder)) == taken(load(folder / "toy.inter")) == {"u": ["Nine Lives", "Ten"], "v": ["Nine Lives"]}
    assert load(folder).item_ids == ("9", "10"), "whole numbers by value"
    write(folder, {"toy.inter": "session_id:token\titem_id:token\nu\t10\nu\t9\n"})
    data = load(folder)
    assert taken(data) == {"u": ["Ten", "Nine Lives"]} and data.reading and data.reading.ordered_by == "file"


def test_plain(tmp_path: Path) -> None:
    data = load(write(tmp_path, PLAIN))
    assert taken(data) == {"ann": ["Plain", 'A "title", on two lines'], "bob": ['A "title", on two lines']}
    assert data.reading and data.reading.altered_titles == 1


@pytest.mark.parametrize("ending", ["\r", "\r\n"])
def test_csv_lines_may_end_in_a_carriage_return(tmp_path: Path, ending: str) -> None:
    plain = {name: text.replace("\n", ending) for name, text in PLAIN.items()}
    assert taken(load(write(tmp_path / "plain", plain))) == taken(load(write(tmp_path / "as it is", PLAIN)))
    ratings = "user_id,parent_asin,rating,timestamp\nU,P1,5,14\nU,P2,5,13\n".replace("\n", ending)
    meta = AMAZON_2023["meta_Video_Games.jsonl.gz"]
    data = load(write(tmp_path / "amazon", {"Video_Games.csv": ratings, "meta_Video_Games.jsonl.gz": meta}))
    assert taken(data) == {"U": ["Untitled [P2]", "One"]}


def test_lines_of_titles_that_are_not_utf_8_are_read_as_latin_1_and_counted(tmp_path: Path) -> None:
    """Each by itself: one bad byte changes no other line of a file in UTF-8."""
    sets = {
        "ml-100k": ML_100K | {"u.item": b"1|Caf\xc3\xa9|x\n2|Bad\xff|x\n"},
        "ml-1m": {"movies.dat": b"1::Caf\xc3\xa9::x\n2::Bad\xff::x\n", "ratings.dat": "1::2::5::1\n1::1::5::2\n"},
        "lastfm": LASTFM | {"artists.dat": b"id\tname\n7\tCaf\xc3\xa9\n8\tBad\xff\n"},
        "llara": LLARA | {"id2name.txt": b"0::Caf\xc3\xa9\n1::Bad\xff\n2::x\n3::y\n"},
    }
    for name, files in sets.items():
        data = load(write(tmp_path / name, files))
        assert {"Café", "Badÿ"} <= set(data.titles), name
        assert data.reading and data.reading.latin1_lines == 1
        assert notes(data)[-1] == "read as Latin-1: 1 lines of the items' file that are not UTF-8"
    data = load(tmp_path / "llara")
    assert ("lines read as Latin-1, not UTF-8", "1 in the items' file") in inspection(data, DataConfig())
    assert load(write(tmp_path / "published", ML_100K)).titles[1] == "Misérables, Les (1995)"


def test_a_byte_order_mark_is_read_in_every_layout(tmp_path: Path) -> None:
    dat = {"movies.dat": "1::One::x\n", "ratings.dat": "1::1::5::1\n"}
    layouts = {"ml-1m": dat, "ml-100k": ML_100K, "lastfm": LASTFM, "llara": LLARA, "recbole": RECBOLE, "plain": PLAIN}
    layouts["amazon"] = AMAZON_2023
    for name, files in layouts.items():
        marked = {k: b"\xef\xbb\xbf" + (v if isinstance(v, bytes) else v.encode()) for k, v in files.items()}
        assert (
            load(write(tmp_path / name, marked)).sequences == load(write(tmp_path / "without" / name, files)).sequences
        )


def test_users_of_unknown_items_alone_are_counted(tmp_path: Path) -> None:
    rows = "user,item\n" + "ann,x\nann,y\n" * 10 + "bob,z\nbob,z2\n"
    data = load(write(tmp_path, {"interactions.csv": rows, "items.csv": "item,title\nx,X\ny,Y\n"}))
    assert data.user_ids == ("ann",)
    assert data.reading and data.reading.left_out[:2] == (
        ("interactions with items that items.csv lacks", 2),
        ("users of nothing but those", 1),
    )


def test_every_layout_is_detected_and_only_it(tmp_path: Path) -> None:
    layouts = {"movielens": ML_100K, "lastfm": LASTFM, "llara": LLARA, "amazon": AMAZON_2023}
    layouts |= {"recbole": RECBOLE, "plain": PLAIN}
    assert list(layouts) == list(FORMATS)
    for name, files in layouts.items():
        assert detect(write(tmp_path / name, files)) == name
    with pytest.raises(DataError, match=rf"one folder further down; use --data.path {tmp_path / 'amazon'}"):
        detect(tmp_path)
    both = write(tmp_path / "amazon", PLAIN)
    with pytest.raises(DataError, match=r"could be amazon or plain; say which with --data.format"):
        detect(both)
    assert load_dataset(Config(data=DataConfig(path=str(both), format="plain", min_interactions=1))).num_users == 2


def test_what_the_core_leaves_out_is_counted_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path, PLAIN)
    with caplog.at_level(logging.INFO, logger="coars_fast.data.load"):
        data = load_dataset(Config(data=DataConfig(path=str(folder), min_interactions=2)))
    expected = "1 users of fewer than 2 interactions, 1 interactions with those users and items"
    assert describe_left_out(data) == expected
    assert [record.message for record in caplog.records] == [f"{data.name}: left out: {expected}"]


def test_ties_and_repetitions_by_hand() -> None:
    rows = Rows()
    for user, item, time in (
        ("b", "10", 5), ("b", "9", 5), ("b", "x", 4), ("b", "10", 1), ("a", "9", 2), ("a", "x", 2), ("c", "9", 1),
    ):  # fmt: skip
        rows.add(user, item, time)
    titles = Titles(file="items", of={"x": "X", "9": "Nine", "10": "Ten", "y": "Y"})
    data = assemble(rows.table(), titles, name="toy", layout="plain", files=[Path("rows")])
    assert data.item_ids == ("9", "10", "x") and data.user_ids == ("a", "b", "c")
    assert taken(data) == {"a": ["Nine", "X"], "b": ["Ten", "X", "Nine"], "c": ["Nine"]}
    reading = data.reading
    assert reading and (reading.rows, reading.tied, reading.tied_last_users) == (7, 2, 1)


def test_ids_are_ordered_by_value_where_they_are_whole_numbers() -> None:
    assert sorted(["b", "10", "9", "-1", "B", "007", "1.5", "²"], key=id_order) == [
        "-1", "007", "9", "10", "1.5", "B", "b", "²",
    ]  # fmt: skip


def test_times() -> None:
    path = Path("t")
    assert parse_time("1e3", path, 1) == 1000 and parse_time(" 7 ", path, 1) == 7
    assert parse_time("1970-01-02", path, 1) == 86400
    assert parse_time("1970-01-01T01:00:00+01:00", path, 1) == 0


def test_endless_titles_are_cut_and_stay_different(tmp_path: Path) -> None:
    long = "A very long title " * 200
    files = {
        "items.csv": f"item,title\n1,{long}\n2,{long}\n",
        "interactions.csv": "user,item\nu,1\nu,2\n",
    }
    data = load(write(tmp_path, files))
    assert len(data.titles[0]) <= MAX_TITLE and data.titles[1] == f"{data.titles[0]} [2]"
    assert data.reading and data.reading.altered_titles == 2
