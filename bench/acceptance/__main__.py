"""One part in this process, as `bench.gpu_acceptance` starts it.

    python -m bench.acceptance tuning --out DIR --seconds 60 --preset smoke
    python -m bench.acceptance environment --out DIR

A part that raises is a part that failed; its traceback is in its log.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time
import traceback
from pathlib import Path

from bench.acceptance import environment
from bench.acceptance.parts import part_named
from bench.acceptance.work import FAILED, Finding, Record, Work, read_json


def run_part(name: str, out: Path, seconds: float, preset: str) -> Finding:
    """Run a part to its end; the finding is in its record, too."""
    begun = time.monotonic()
    facts = read_json(out / environment.FILE)
    identity = environment.identity(facts, preset)
    record = Record.open(out / f"{name}.json", identity)
    record.finding = None
    work = Work(name, out, preset, bool(facts.get("cuda")), record, begun + seconds)
    module, _, function = part_named(name).run.partition(":")
    try:
        finding = getattr(importlib.import_module(f"bench.acceptance.{module}"), function)(work)
    # Whatever a part raises is its finding: the other parts go on.
    except Exception as error:
        traceback.print_exc()
        text = str(error).strip().splitlines() or [""]
        finding = Finding(FAILED, f"{type(error).__name__}: {text[0][:160]}")
    record.end(finding)
    return finding


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("part")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--preset", default="smoke")
    parser.add_argument("--commit")
    chosen = parser.parse_args()
    if chosen.part == "environment":
        environment.write(chosen.out, chosen.commit)
        return 0
    # As an error, so that a command that is running is stopped, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(f"stopped: more than {chosen.seconds:.0f} s"))
    finding = run_part(chosen.part, chosen.out, chosen.seconds, chosen.preset)
    print(f"{finding.status}: {finding.summary}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
