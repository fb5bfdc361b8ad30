"""Broken data folders and SASRec files: each error names the place, what was found, and the way out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from coars_fast.config import DataConfig, SASRecConfig
from coars_fast.data.movielens import load_movielens
from coars_fast.data.records import Dataset
from coars_fast.data.sasrec import SASRec, train_sasrec
from coars_fast.data.splits import make_split
from coars_fast.errors import ConfigError, DataError, MissingDataError, MissingModelError, ModelError, NonFiniteError

MOVIES = b"movieId,title,genres\n1,One,x\n2,Two,x\n"
HEADER = b"userId,movieId,rating,timestamp\n"


def folder_of(tmp_path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_missing_folder_and_files(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"expected movies.csv and ratings.csv, or .*found nothing"):
        load_movielens(tmp_path)
    folder_of(tmp_path, {"movies.csv": MOVIES, "ratings.dat": b"", "notes.txt": b""})
    with pytest.raises(MissingDataError, match=r"found movies.csv, notes.txt, ratings.dat\..*both files"):
        load_movielens(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"1,2,3.0,x", r"line 3: timestamp should be a whole number, found 'x'"),
        (b"1,2.5,3.0,4", r"line 3: movieId should be a whole number, found '2.5'"),
        (b"1,2,good,4", r"line 3: rating should be a number, found 'good'"),
        (b"1,2,nan,4", r"line 3: rating should be a number, found 'nan'"),
        (b"1,2,3.0", r"line 3: expected 4 fields .*found '1,2,3.0'"),
        (b"<html>", r"line 3: expected 4 fields .*found '<html>'"),
        (b",2,3.0,4", r"line 3: userId should be a whole number, found ''"),
        (b"1,99999999999999999999,3.0,4", r"line 3: movieId is out of range, found '99999999999999999999'"),
        (b"1,2,3.0,\xff\xfe", r"line 3: not UTF-8 \(b'\\xff\\xfe"),
        (b"1,2,3.0,\x00", r"line 3: timestamp should be a whole number, found '\\x00'"),
    ],
)
def test_malformed_csv_rating(tmp_path: Path, line: bytes, message: str):
    folder_of(tmp_path, {"movies.csv": MOVIES, "ratings.csv": HEADER + b"1,1,3.0,4\n" + line + b"\n1,2,3.0,9\n"})
    with pytest.raises(DataError, match=r"ratings\.csv, " + message):
        load_movielens(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"1::2::3", r"line 2: expected 4 fields .*'::', found '1::2::3'"),
        (b"1,2,3,4", r"line 2: expected 4 fields"),
        (b"1::b::3::4", r"line 2: movieId should be a whole number, found 'b'"),
        (b"\xef\xbb\xbf1::1::3::4", r"line 2: userId should be a whole number, found '\\ufeff1'"),
        (b"1::\xe9::3::4", r"line 2: movieId should be a whole number, found 'é'"),
    ],
)
def test_malformed_dat_rating(tmp_path: Path, line: bytes, message: str):
    folder_of(tmp_path, {"movies.dat": b"1::One::x\n", "ratings.dat": b"1::1::3::4\n" + line + b"\n"})
    with pytest.raises(DataError, match=r"ratings\.dat, " + message):
        load_movielens(tmp_path)


@pytest.mark.parametrize(
    ("movies", "message"),
    [
        (b"movieId,name\n1,One\n", r"line 1: expected a header with movieId, title; title is not in 'movieId,name'"),
        (b"", r"line 1: expected a header"),
        (b"movieId,title,genres\n", r"no movie in it"),
        (b"movieId,title,genres\n1,One,x\none,Two,x\n", r"line 3: movieId should be a whole number, found 'one'"),
        (b"movieId,title,genres\n1,One,x\n1,Two,x\n", r"line 3: movieId 1 stands there twice"),
        (b"movieId,title,genres\n1\n", r"line 2: expected a movieId and a title, found '1'"),
        (b'movieId,title,genres\n1,"a\nb",x\nq,Two,x\n', r"line 4: movieId"),
        (b'movieId,title,genres\n1,One,x\n2,"Two,x\n', r"line 3: not readable as CSV"),
        (b"movieId,title,genres\n1,One,x\n2,\xe9t\xe9,x\n", r"line 3: not UTF-8"),
    ],
)
def test_malformed_movies(tmp_path: Path, movies: bytes, message: str):
    folder_of(tmp_path, {"movies.csv": movies, "ratings.csv": HEADER + b"1,1,3.0,4\n"})
    with pytest.raises(DataError, match=r"movies\.csv(, |: )" + message):
        load_movielens(tmp_path)


@pytest.mark.filterwarnings("error")
def test_no_ratings_wrong_header_and_foreign_movies(tmp_path: Path):
    folder_of(tmp_path, {"movies.csv": MOVIES, "ratings.csv": HEADER})
    with pytest.raises(DataError, match=r"ratings.csv: no rating in it"):
        load_movielens(tmp_path)
    folder_of(tmp_path, {"ratings.csv": b"1,1,3.0,4\n"})
    with pytest.raises(DataError, match=r"ratings.csv, line 1: expected a header with userId"):
        load_movielens(tmp_path)
    folder_of(tmp_path, {"ratings.csv": HEADER + b"1,1,3.0,4\n1,77,3.0,4\n"})
    with pytest.raises(DataError, match=r"1 of 2 interactions are with items that movies.csv lacks \(such as 77"):
        load_movielens(tmp_path)


def dataset(*lengths: int) -> Dataset:
    return Dataset(
        name="toy",
        titles=tuple(f"T{i}" for i in range(30)),
        sequences=tuple(tuple(range(n)) for n in lengths),
        user_ids=tuple(f"u{u}" for u in range(len(lengths))),
        item_ids=tuple(str(i) for i in range(30)),
    )


def test_split_of_too_little():
    with pytest.raises(
        ConfigError, match=r"data.train_targets.*user u1 of toy \(4 interactions\).*min_interactions to 5"
    ):
        make_split(dataset(9, 4), DataConfig(train_targets=3))
    with pytest.raises(DataError, match=r"toy: 1 users are too few"):
        make_split(dataset(9), DataConfig())
    with pytest.raises(ConfigError, match=r"seed: -1 must not be negative"):
        make_split(dataset(9, 9), DataConfig(eval_seed=-1))


def test_sasrec_refuses_bad_arguments():
    with pytest.raises(DataError, match="no user has 2 items"):
        train_sasrec([[1], []], 5, SASRecConfig(), seed=0)
    with pytest.raises(DataError, match=r"number 1 holds an item outside the catalogue \(0..4\)"):
        train_sasrec([[1, 2], [3, 5]], 5, SASRecConfig(), seed=0)
    with pytest.raises(ConfigError, match=r"sasrec.num_heads: 5 does not divide"):
        train_sasrec([[1, 2]], 5, SASRecConfig(num_heads=5), seed=0)
    model = SASRec(5, SASRecConfig())
    with pytest.raises(ValueError, match="number 1 is empty"):
        model.score([[1], []])
    with pytest.raises(ValueError, match="number 0 holds an item outside"):
        model.score([[1, -1]])


def test_sasrec_stops_at_a_loss_that_is_not_finite():
    with pytest.raises(NonFiniteError, match="lower sasrec.learning_rate"):
        train_sasrec([[1, 2, 3]] * 8, 5, SASRecConfig(learning_rate=1e20, num_epochs=4, batch_size=4), seed=0)


def test_broken_sasrec_files(tmp_path: Path):
    path = tmp_path / "sasrec.safetensors"
    with pytest.raises(MissingModelError, match="no such file"):
        SASRec.load(path)
    SASRec(5, SASRecConfig(hidden_size=8)).save(path)
    whole = path.read_bytes()
    for cut in (0, 4, 200, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelError, match="broken SASRec file.*delete it"):
            SASRec.load(path)
    path.write_bytes(b"\x80\x04not a pickle to load")
    with pytest.raises(ModelError):
        SASRec.load(path)
    save_file({"weight": np.zeros(3, dtype=np.float32)}, path)
    with pytest.raises(ModelError, match="not a SASRec file"):
        SASRec.load(path)
    metadata = {"format": "coars_fast.sasrec.1", "num_items": "5", "config": '{"hidden_size": 8, "colour": 1}'}
    save_file({"weight": np.zeros(3, dtype=np.float32)}, path, metadata=metadata)
    with pytest.raises(ModelError, match="colour"):
        SASRec.load(path)


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "sasrec.safetensors"
    SASRec(5, SASRecConfig(hidden_size=8)).save(path)
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        SASRec(5, SASRecConfig(hidden_size=8)).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
