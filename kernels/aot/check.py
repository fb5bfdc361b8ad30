"""Checks of a built library on any machine; ctest runs them.

    export PYTHONPATH=kernels
    python -m aot.check --library build/libcoars_kernels.so --resources
    python -m aot.check --library build/libcoars_kernels.so --symbols kernels/aot/library/coars_kernels.h

`--symbols`: the library exports the header's functions and nothing else. `--resources`: registers, spills and shared
memory, read from the machine code inside the library, fit the GPU and are what the table says.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from aot.compile import SHARED_LIMIT, resource_usage
from coars_kernels.aot_library import Library

REGISTERS_PER_PROCESSOR = 65536
TUNED_FOR = (80, 90)
"""GPUs for which no register may be spilled; elsewhere a few bytes are no fault, and are only printed."""


def check_symbols(library: Path, header: Path, nm: str) -> list[str]:
    """What differs between the header's functions and the library's symbols."""
    declared = set(re.findall(r"^COARS_KERNELS_API\b[^;(]*?(\w+)\(", header.read_text(), re.MULTILINE))
    command = [nm, "-D", "--defined-only", str(library)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    exported = {line.split()[-1].split("@")[0] for line in lines}
    print(f"{len(exported)} symbols exported, {len(declared)} declared")
    return [f"{name}: declared, not exported" for name in sorted(declared - exported)] + [
        f"{name}: exported, not declared" for name in sorted(exported - declared)
    ]


def check_resources(library: Path) -> list[str]:
    """Kernels that would not run, or whose figures in the table are not those of their machine code."""
    problems, kernels = [], Library(library).kernels
    for kernel in kernels:
        usage = resource_usage(kernel.cubin)
        local_bytes = usage["LOCAL"] + usage["STACK"]
        figures = f"{usage['REG']} registers, {local_bytes} local, {kernel.shared_bytes} shared bytes"
        if local_bytes:
            print(f"{kernel.name} sm_{kernel.arch}: {figures}")
        limits = {
            "figures differ from the table's": (kernel.registers, kernel.local_bytes) != (usage["REG"], local_bytes),
            "registers are spilled": local_bytes > 0 and kernel.arch in TUNED_FOR,
            "too many registers for a thread": kernel.registers > 255,
            "too many registers for a block": kernel.registers * 32 * kernel.num_warps > REGISTERS_PER_PROCESSOR,
            "too much shared memory": kernel.shared_bytes > SHARED_LIMIT[kernel.arch],
        }
        problems += [f"{kernel.name} sm_{kernel.arch}: {what} ({figures})" for what, broken in limits.items() if broken]
    print(f"{len(kernels)} kernels, at most {max(kernel.registers for kernel in kernels)} registers")
    return problems


def main() -> None:
    """Run the checks that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m aot.check", description="Check a built library.")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--symbols", type=Path, metavar="HEADER")
    parser.add_argument("--nm", default="nm")
    parser.add_argument("--resources", action="store_true")
    arguments = parser.parse_args()
    problems = []
    if arguments.symbols:
        problems += check_symbols(arguments.library, arguments.symbols, arguments.nm)
    if arguments.resources:
        problems += check_resources(arguments.library)
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
