"""What a run prints at its end."""

import io

import pytest
from rich.console import Console

from coars_fast.summary import SHOWN, comparison_table


def printed(width: int) -> str:
    figures = {name: {"value": 0.4833, "low": 0.4101, "high": 0.9999} for name in SHOWN}
    figures["mean_turns"] = {"value": 2.344, "low": 2.1, "high": 2.6}
    difference = {name: {"value": -0.0512, "low": -0.12, "high": 1.25} for name in SHOWN}
    record = {"before": figures, "after": figures, "difference": difference, "info": {"num_eval_users": 150}}
    file = io.StringIO()
    Console(file=file, width=width, highlight=False).print(comparison_table(record))
    return file.getvalue()


def test_the_table_fits_80_columns() -> None:
    lines = printed(80).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:]}
    assert list(rows) == list(SHOWN)
    assert " ".join(rows["user_f1_disc@1:1"]) == ".483 (.410, 1.00) .483 (.410, 1.00) -.051 (-.120, +1.25)"
    assert rows["mean_turns"][:3] == ["2.34", "(2.10,", "2.60)"]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_names_are_never_cut(width: int) -> None:
    text = printed(width)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text and all(name in text for name in SHOWN)
