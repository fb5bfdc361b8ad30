"""The ahead-of-time library for this GPU: CMake's build, and ctest, which runs the C++ example against stored results.

Left out: machines without a GPU, where `tests/kernels/test_cmake.py` does the same up to the example's run.
"""

from __future__ import annotations

import os
import shutil
import sys

from bench.acceptance.environment import FILE
from bench.acceptance.sanitizer import last_line
from bench.acceptance.work import CUT_OFF, DONE, FAILED, ROOT, SKIPPED, Finding, Work, read_json


def run(work: Work) -> Finding:
    """Configure, build, test; CMake itself leaves out what is built."""
    absent = [name for name in ("cmake", "ctest", "cc", "c++") if shutil.which(name) is None]
    if absent:
        return Finding(SKIPPED, f"not on the path: {', '.join(absent)}")
    architecture = read_json(work.out / FILE)["capability"].replace(".", "")
    build, jobs = work.out / "aot_build", max(2, (os.cpu_count() or 2) // 2)
    options = (f"-DCOARS_PYTHON={sys.executable}", f"-DCOARS_ARCHS={architecture}", f"-DCOARS_JOBS={jobs}")
    steps = {
        "configure": ["cmake", "-S", ROOT, "-B", build, *options],
        "build": ["cmake", "--build", build],
        "ctest": ["ctest", "--test-dir", build, "--output-on-failure", "--no-tests=error"],
    }
    for name, command in steps.items():
        code, output = work.command(command)
        if code is None:
            return Finding(CUT_OFF, f"stopped in {name}")
        if code:
            return Finding(FAILED, f"{name}: {last_line(output)}")
        work.record.keep(name, last_line(output))
    return Finding(DONE, f"built for sm_{architecture}; ctest passed")
