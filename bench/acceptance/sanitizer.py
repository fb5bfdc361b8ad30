"""`compute-sanitizer` over `small_calls`: memcheck for accesses out of bounds, racecheck for hazards in shared memory.

PyTorch's caching allocator is switched off, since within one of its blocks nothing is out of bounds. Without the tool,
or where it refuses the device, the calls run by themselves and the part is skipped with the reason.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from bench.acceptance.work import CUT_OFF, DONE, FAILED, SKIPPED, Finding, Work, python

TOOLS = ("memcheck", "racecheck")
ERRORS_FOUND = 86
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
CALLS = python("-m", "bench.acceptance.small_calls")


def find_tool() -> str | None:
    """On the path, or where CUDA's toolkit has it."""
    usual = Path("/usr/local/cuda/bin/compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(usual) if usual.exists() else None)


def run(work: Work) -> Finding:
    """Both tools, one after the other."""
    tool = find_tool() if work.cuda else None
    if tool is None:
        code, output = work.command(CALLS)
        if code is None:
            return Finding(CUT_OFF, "the calls by themselves took too long")
        if code:
            return Finding(FAILED, f"the calls fail by themselves: {last_line(output)}")
        absent = "compute-sanitizer is absent" if work.cuda else "compute-sanitizer is absent: no GPU here"
        return Finding(SKIPPED, f"{absent}; {output.count('called: ')} calls ran without it")
    for name in TOOLS:
        work.once(name, lambda name=name: check(work, tool, name))
    results = {name: work.record.results[name] for name in TOOLS}
    for name, found in results.items():
        if found["stopped"]:
            del work.record.results[name]
    summary = "; ".join(f"{name}: {found['text']}" for name, found in results.items())
    if any(found["errors"] for found in results.values()):
        return Finding(FAILED, summary)
    if any(found["stopped"] for found in results.values()):
        return Finding(CUT_OFF, summary)
    refused = all(found["errors"] is None for found in results.values())
    return Finding(SKIPPED if refused else DONE, summary)


def check(work: Work, tool: str, name: str) -> dict[str, Any]:
    """Errors that one tool found; None where it could not look."""
    code, output = work.command(
        [tool, "--tool", name, "--error-exitcode", ERRORS_FOUND, *CALLS],
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    summary = SUMMARY.search(output)
    calls = output.count("called: ")
    if code is None:
        return {"errors": None, "stopped": True, "text": f"stopped after {calls} calls"}
    if summary is None or (code not in (0, ERRORS_FOUND) and not int(summary[1])):
        return {"errors": None, "stopped": False, "text": f"could not look: {last_line(output)}"}
    return {"errors": int(summary[1]), "stopped": False, "text": f"{summary[1]} errors in {calls} calls"}


def last_line(output: str) -> str:
    """What a command said last, for a message."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "no output"
