"""`python -m coars_fast.data sasrec`: what it prints, and what it refuses before any training."""

from __future__ import annotations

from pathlib import Path

import pytest

from coars_fast.data import __main__ as program

SMALL = ["--sasrec.hidden-size", "8", "--sasrec.num-epochs", "2", "--sasrec.patience", "1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 users of 9 items each, of the first 68 of 150."""
    folder = tmp_path / "toy"
    folder.mkdir()
    rows = "".join(f"{u},{(u + t) % 150}\n" for u in range(60) for t in range(9))
    (folder / "interactions.csv").write_text("user,item\n" + rows)
    (folder / "items.csv").write_text("item,title\n" + "".join(f"{i},T{i}\n" for i in range(150)))
    return folder


def test_sasrec_of_a_data_set(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folder), "--min-item-interactions", "0", "--num-negatives", "20", "--save", str(tmp_path / "m")]
    program.main(["sasrec", *arguments, *SMALL])
    shown = capsys.readouterr().out
    assert "among all items: HR@10" in shown and "among 20 negatives" in shown and (tmp_path / "m").is_file()


def test_sasrec_says_what_was_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program.main(["sasrec", str(folder), "--num-negatives", "20", "--min-item-interactions", "3", *SMALL])
    shown = capsys.readouterr().out
    assert "left out: 82 items of items.csv that nobody took, " in shown
    assert "4 items of fewer than 3 interactions" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-negatives", "-3"], "--num-negatives: -3 must be 1 or more"),
        (["--num-negatives", "0"], "--num-negatives: 0 must be 1 or more"),
        (["--min-interactions", "-2"], "--min-interactions: -2 must be 1 or more"),
        (["--min-item-interactions", "-4"], "--min-item-interactions: -4 must be 0 or more"),
        (["--save", "/nonexistent/m"], "--save: /nonexistent is no folder that can be written to; make it"),
        (["--save", "/"], "--save: / is a folder; name a file"),
        ([], "user 0 took 9 of 68 items, which leaves 59, not 100; use --num-negatives 59 or fewer"),
    ],
)
def test_what_would_fail_after_training_is_refused_before(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("coars_fast.data.sasrec.train_sasrec", lambda *a, **k: pytest.fail("it was trained"))
    with pytest.raises(SystemExit, match="2"):
        program.main(["sasrec", str(folder), "--min-item-interactions", "0", *arguments])
    assert message in capsys.readouterr().err


def test_the_number_of_negatives_that_is_named_will_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program.main(["sasrec", str(folder), "--min-item-interactions", "0", "--num-negatives", "59", *SMALL])
    assert "among 59 negatives: HR@10" in capsys.readouterr().out


def test_a_user_who_took_everything(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / "interactions.csv").open("a") as file:
        file.writelines(f"all,{i}\n" for i in range(150))
    for bound, way_out in (
        (0, "take that user out of the files"),
        (2, "keep more items (--min-item-interactions is 2)"),
    ):
        with pytest.raises(SystemExit):
            program.main(["sasrec", str(folder), "--min-item-interactions", str(bound)])
        message = capsys.readouterr().err
        assert "user all took" in message and f"leaves 0, not 100; {way_out}" in message
