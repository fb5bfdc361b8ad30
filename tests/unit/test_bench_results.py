"""Results of benches: the CSV and back, comparison of two, table and plots, errors that name the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import compare, report
from bench.presets import BenchError
from bench.results import Row, merge, read_csv, to_csv

ROW = Row(
    op="head", case="frozen", shape="R=64 V=100", dtype="float32", preset="smoke", variant="ours", kind="ours",
    version="coars_kernels 0.1.0", status="ok", median=0.25, p20=0.125, p80=0.5, ratio=1.25, tflops=0.5, peak_mib=3.0,
    error=0.1, machine="cpu-2core-x86_64", threads=2, torch="2.13.0", date="2026-01-31", commit="abc",
)  # fmt: skip
FLOOR = replace(ROW, variant="three bare mm", kind="floor", version="", median=0.2, ratio=1.0, error=None)
ABSENT = replace(
    ROW, variant="theirs", kind="rival", status="absent", reason="not installed: no module x, sorry | really",
    median=None, p20=None, p80=None, ratio=None, tflops=None, peak_mib=None, error=None,
)  # fmt: skip


def write(folder: Path, *rows: Row) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "results.csv").write_text(to_csv(rows))
    return folder


def test_rows_survive_the_csv(tmp_path: Path) -> None:
    assert read_csv(write(tmp_path / "a", ROW, FLOOR, ABSENT)) == [ROW, FLOOR, ABSENT]


def test_rows_measured_again_replace_the_older_ones() -> None:
    again = replace(ROW, median=1.0)
    assert merge([ROW, FLOOR], [again, ABSENT]) == [again, FLOOR, ABSENT]


@pytest.mark.parametrize(("factor", "status"), [(1.04, 0), (1.06, 1), (0.5, 0)])
def test_compare_flags_what_is_more_than_5_percent_slower(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float, status: int
) -> None:
    assert ROW.ratio is not None and ROW.median is not None
    before = write(tmp_path / "a", ROW, FLOOR)
    # On a CPU the ratio counts: twice the time on a machine that is half as fast is no change.
    after = write(tmp_path / "b", replace(ROW, ratio=ROW.ratio * factor, median=2 * ROW.median), FLOOR)
    assert compare.main([str(before), str(after / "results.csv")]) == status
    assert ("SLOWER" in capsys.readouterr().out) == bool(status)


@pytest.mark.parametrize(("factor", "status"), [(1.04, 0), (1.06, 1)])
def test_compare_takes_the_time_of_a_gpu(tmp_path: Path, factor: float, status: int) -> None:
    row = replace(ROW, machine="nvidia-h200")
    assert row.median is not None
    before, after = write(tmp_path / "a", row), write(tmp_path / "b", replace(row, median=row.median * factor))
    assert compare.main([str(before), str(after)]) == status


def test_compare_flags_a_variant_that_lost_its_time(tmp_path: Path) -> None:
    lost = replace(ROW, status="refused", reason="wrong result", median=None, ratio=None)
    assert compare.main([str(write(tmp_path / "a", ROW)), str(write(tmp_path / "b", lost))]) == 1


def test_compare_refuses_what_has_nothing_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "a", ROW)
    other = write(tmp_path / "b", replace(ROW, preset="cpu"))
    assert compare.main([str(before), str(other)]) == 2
    assert str(before / "results.csv") in capsys.readouterr().err
    elsewhere = write(tmp_path / "c", replace(ROW, machine="cpu-64core-x86_64"))
    assert compare.main([str(before), str(elsewhere)]) == 2
    assert "cpu-64core-x86_64" in capsys.readouterr().err


def damaged(text: str, kind: str) -> str:
    first, second = text.splitlines()[:2]
    return {
        "no header": second,
        "not a number": f"{first}\n{second.replace('0.25', 'fast')}\n",
        "cut off": f"{first}\n{second[:40]}\n",
        "status": f"{first}\n{second.replace(',ok,', ',fine,')}\n",
        "shape": f"{first}\n{second.replace('R=64 V=100', 'large')}\n",
    }[kind]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no header", "has no column"),
        ("not a number", "line 2: median is 'fast', not a number"),
        ("cut off", "line 2: has no value for"),
        ("status", "line 2: status is 'fine', expected ok, absent"),
        ("shape", "line 2: shape is 'large'"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, kind: str, words: str) -> None:
    path = tmp_path / "results.csv"
    path.write_text(damaged(to_csv([ROW]), kind))
    with pytest.raises(BenchError, match=words) as error:
        read_csv(tmp_path)
    assert str(path) in str(error.value)


def test_missing_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert report.main([str(tmp_path)]) == 2
    assert str(tmp_path / "results.csv") in capsys.readouterr().err


def test_report_redraws_from_the_csv_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [replace(row, shape=f"R={r} V=100") for r in (16, 32, 64) for row in (ROW, FLOOR, ABSENT)]
    folder = write(tmp_path / "a", *line)
    assert report.main([str(folder)]) == 0
    names = {Path(path).name for path in capsys.readouterr().out.split()}
    assert names == {"table.md", "ratio.png", "sweep_head_R.png"}
    assert all((folder / name).stat().st_size > 100 for name in names)
    assert {path.name for path in folder.iterdir()} == names | {"results.csv"}


def test_the_table_shows_ratios_on_a_cpu_and_times_on_a_gpu() -> None:
    text = report.table([ROW, FLOOR, ABSENT])
    assert "| **ours** | coars_kernels 0.1.0 | 1.25 (0.62 to 2.50) | 3 |" in text
    assert "absent: not installed: no module x, sorry / really" in text
    assert " ms " not in text
    assert "| 250.000 | 0.5 |" in report.table([replace(ROW, machine="nvidia-h200")])
