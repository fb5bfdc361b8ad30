"""The plot of `inspect`: written where it says, or an error that says why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from coars_fast.data.picture import draw, picture_path
from coars_fast.data.records import Dataset
from coars_fast.errors import ConfigError

TOY = Dataset(name="toy", titles=("A", "B"), sequences=((0, 1), (1,)), user_ids=("u", "v"), item_ids=("a", "b"))


def test_the_path_that_is_returned_is_the_file_that_is_there(tmp_path: Path) -> None:
    for name, written in (("a.PNG", "a.PNG"), ("b", "b.png"), ("c.svg", "c.svg")):
        assert draw(TOY, TOY, tmp_path / name) == tmp_path / written
        assert (tmp_path / written).is_file()
    assert len(list(tmp_path.iterdir())) == 3


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--plot: .* is a folder; give the name of a file"):
        draw(TOY, TOY, tmp_path)
    with pytest.raises(ConfigError, match=r"--plot: .*x\.png: no folder .*nowhere; make it"):
        draw(TOY, TOY, tmp_path / "nowhere" / "x.png")
    with pytest.raises(ConfigError, match=r"x\.foo: no such format; known are .*png"):
        picture_path(tmp_path / "x.foo")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere" / "x.png")
    with pytest.raises(ConfigError, match=r"gone\.png cannot be written \(No such file"):
        draw(TOY, TOY, tmp_path / "gone.png")
    assert not list(tmp_path.glob("*.foo"))
