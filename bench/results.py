"""Rows of measurements and their CSV: one row per variant of a case, `results.csv` in a folder of results.

A row whose variant has no time says why in `status` and `reason`. Rows measured again replace the older ones, so a run
that was cut off goes on in the same folder. Left out: the single times (the JSON has them).
"""

from __future__ import annotations

import csv
import io
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from bench.presets import BenchError

CSV_NAME = "results.csv"
STATUSES = ("ok", "absent", "refused", "failed")
"""Timed; cannot run here; gave a wrong result and so has no time; raised an error."""
KINDS = ("ours", "rival", "floor")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant of one case. None: not known, or no such figure."""

    op: str
    case: str
    """Kind of call: which gradients, which inputs."""
    shape: str
    """As `R=2048 H=512 V=32000`."""
    dtype: str
    preset: str
    variant: str
    kind: str
    version: str
    status: str
    reason: str = ""
    median: float | None = None
    """Seconds."""
    p20: float | None = None
    p80: float | None = None
    ratio: float | None = None
    """Median over the floor's."""
    gb_per_s: float | None = None
    tflops: float | None = None
    """Of the work that the case needs, whatever the variant does."""
    tokens_per_s: float | None = None
    peak_mib: float | None = None
    error: float | None = None
    """Largest error against float64, as a part of what is allowed."""
    machine: str
    threads: int
    torch: str
    date: str
    commit: str

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows measurements of the same thing."""
        return (self.op, self.case, self.shape, self.dtype, self.preset, self.variant)

    @property
    def on_cpu(self) -> bool:
        """Whether times are no more than ratios: CPUs of two machines, or of two days, do not compare."""
        return self.machine.startswith("cpu-")

    def sizes(self) -> dict[str, int]:
        """The shape as numbers."""
        return {name: int(value) for name, value in (part.split("=") for part in self.shape.split())}


COLUMNS = tuple(field.name for field in fields(Row))
_NUMBERS = {field.name for field in fields(Row) if "float" in str(field.type)}


def to_csv(rows: Iterable[Row]) -> str:
    """The rows as text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = asdict(row)
        writer.writerow({name: _cell(values[name]) for name in COLUMNS})
    return text.getvalue()


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def csv_path(path: Path) -> Path:
    """`path` itself, or the CSV in the folder `path`."""
    return path / CSV_NAME if path.is_dir() else path


def read_csv(path: Path) -> list[Row]:
    """Rows of a CSV or of the one in a folder; `BenchError` names the file and what is wrong with it."""
    file = csv_path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise BenchError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BenchError(f"{file}: is not a text file") from None
    reader = csv.DictReader(io.StringIO(text))
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise BenchError(f"{file}: is no table of results: its first line has no column {', '.join(missing)}")
    return [_row(file, reader.line_num, values) for values in reader]


def _row(file: Path, line: int, values: dict[str, str | None]) -> Row:
    found: dict[str, object] = {}
    for name in COLUMNS:
        value = values[name]
        if value is None:
            raise BenchError(f"{file}, line {line}: has no value for {name}; the line is cut off")
        try:
            found[name] = (float(value) if value else None) if name in _NUMBERS else value
            if name == "threads":
                found[name] = int(value)
        except ValueError:
            raise BenchError(f"{file}, line {line}: {name} is {value!r}, not a number") from None
    for name, allowed in (("status", STATUSES), ("kind", KINDS)):
        if found[name] not in allowed:
            raise BenchError(f"{file}, line {line}: {name} is {found[name]!r}, expected {', '.join(allowed)}")
    if not re.fullmatch(r"[A-Za-z_]+=\d+( [A-Za-z_]+=\d+)*", str(found["shape"])):
        raise BenchError(f"{file}, line {line}: shape is {found['shape']!r}, expected letters and numbers as R=8 V=100")
    return Row(**found)  # type: ignore[arg-type]


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Old rows in their order, each replaced by a new one with its key; then what is new."""
    rows = {row.key: row for row in old}
    rows.update({row.key: row for row in new})
    return list(rows.values())


def write_beside(path: Path, text: str | bytes) -> None:
    """Write a file beside `path` and rename it: `path` never holds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_bytes(text.encode() if isinstance(text, str) else text)
    beside.replace(path)


@cache
def machine_slug() -> str:
    """Name of the machine's kind, without its host name: `cpu-2core-x86_64`, `nvidia-h100-80gb-hbm3`."""
    import torch

    if torch.cuda.is_available():
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return f"cpu-{os.cpu_count()}core-{platform.machine().lower()}"


_stated_commit: str | None = None


def state_commit(text: str) -> None:
    """Say what is measured, where git cannot tell or where several processes must agree."""
    global _stated_commit
    _stated_commit = text


def commit() -> str:
    """The commit that is measured, `-dirty` after it where files differ; `unknown` outside a checkout."""
    return _commit_by_git() if _stated_commit is None else _stated_commit


@cache
def _commit_by_git() -> str:
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        return git("rev-parse", "--short=10", "HEAD").strip() + ("-dirty" if changed.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def today() -> str:
    """The date in UTC."""
    return datetime.now(UTC).date().isoformat()
