"""What everything else is measured on: asked anew in every call, in a process of its own, since asking a GPU takes it.

`environment.json` has the facts that other parts need, `environment.txt` the whole report of `coars_kernels`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.acceptance.work import Identity, write_json
from bench.results import commit, machine_slug, write_beside

FILE = "environment.json"


def write(out: Path, stated_commit: str | None = None) -> None:
    """Both files."""
    import torch

    from coars_kernels import env_report

    cuda = torch.cuda.is_available()
    facts: dict[str, Any] = {
        "cuda": cuda, "machine": machine_slug(), "commit": stated_commit or commit(), "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else "", "memory_gib": 0.0, "capability": "",
    }  # fmt: skip
    if cuda:
        facts["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    write_json(out / FILE, facts)
    report = env_report.as_table(env_report.collect())
    write_beside(out / "environment.txt", report + "\n")
    print(report)


def identity(facts: Mapping[str, Any], preset: str) -> Identity:
    """What results of these facts belong to."""
    return {"preset": preset} | {name: str(facts[name]) for name in ("commit", "machine", "torch")}
