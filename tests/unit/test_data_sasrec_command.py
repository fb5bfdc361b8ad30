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
