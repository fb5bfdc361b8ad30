"""Compile every shipped kernel for some GPUs and write what the library is made of. CMakeLists.txt runs it.

    PYTHONPATH=kernels python -m aot.build --out build/aot --archs 80,90

In --out: `kernels.bin`, the machine code one after the other; `kernels_table.c`, a table of names, figures and places
in it; `figures.json`, the same figures for reading. Triton's own cache, under --out too, keeps what was compiled: a
kernel is compiled again only if its source, its arguments or Triton changed.

What is left out: the C side (`kernels/aot/library`), and GPUs other than NVIDIA's.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ALIGNMENT = 64
"""Machine code begins at multiples of this in `kernels.bin`."""


class Job(NamedTuple):
    """One kernel of `shipped()`, by its place there (it travels to another process), and a GPU to compile it for."""

    number: int
    arch: int


class Built(NamedTuple):
    """What the library's table says of one kernel, and its machine code."""

    name: str
    function: str
    arch: int
    num_warps: int
    shared_bytes: int
    registers: int
    local_bytes: int
    num_arguments: int
    arguments: str
    constants: str
    triton: str
    cubin: bytes


def tiles_of(arch: int) -> int:
    """The capability in the kernels' tables whose sizes a GPU takes, as `triton_fused.config_of` chooses them."""
    return 90 if arch // 10 in (9, 10) else 80


def build_kernel(job: Job) -> Built:
    """Compile one kernel, or take it from the cache, and hold it to what the library's launch can serve."""
    import triton
    from triton import knobs

    from aot.compile import PTX_TYPES, SCRATCH_ARGUMENTS
    from aot.kernels import shipped

    knobs.compilation.disable_line_info = True  # smaller, and free of the builder's paths
    kernel = shipped()[job.number]
    compiled = kernel.compile(job.arch)
    passed = {name: kind for name, kind in kernel.ordered_arguments() if isinstance(kind, str)}
    constants = {name: value for name, value in kernel.ordered_arguments() if name not in passed}
    expected = ["u64" if kind.startswith("*") else PTX_TYPES[kind.split(":")[0]] for kind in passed.values()]
    found = compiled.parameters
    assert found == (*expected, *SCRATCH_ARGUMENTS), f"{kernel.name}: takes {found}, the launch would give {expected}"
    # The library launches plain blocks and gives no scratch memory.
    metadata = compiled.metadata
    plain = {"num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False}
    plain |= {"global_scratch_size": 0, "profile_scratch_size": 0, "warp_size": 32}
    needs = {name: metadata[name] for name, value in plain.items() if metadata[name] != value}
    assert not needs, f"{kernel.name}: needs {needs}, which the library cannot give"
    return Built(
        name=kernel.name,
        function=compiled.name,
        arch=job.arch,
        num_warps=kernel.num_warps,
        shared_bytes=compiled.shared_bytes,
        registers=compiled.registers,
        local_bytes=compiled.local_bytes,
        num_arguments=len(passed),
        arguments=", ".join(f"{name} {kind}" for name, kind in passed.items()),
        constants=", ".join(f"{name}={value}" for name, value in constants.items()),
        triton=json.dumps(_for_python(kernel, passed, constants, metadata, triton.__version__), sort_keys=True),
        cubin=compiled.cubin,
    )


def _for_python(
    kernel: Any, passed: Mapping[str, str], constants: Mapping[str, Any], metadata: Mapping[str, Any], version: str
) -> dict[str, Any]:
    """What `coars_kernels.aot_library` needs to tell whether a launch may take this machine code."""
    return {
        "module": kernel.kernel.module,
        "source": kernel.kernel.cache_key,
        "signature": {name: kind.split(":")[0] for name, kind in passed.items()},
        "constants": dict(constants),
        "divisible": [name for name, kind in passed.items() if kind.endswith(":16")],
        "triton_version": version,
        # a path on the builder's machine, and a hash that means its cache
        "metadata": {
            name: vars(value) if name == "target" else value
            for name, value in metadata.items()
            if name not in ("extern_libs", "hash")
        },
    }


def c_string(text: str) -> str:
    """`text`, ASCII, as a C string literal."""
    assert text.isascii() and text.isprintable(), text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("?", "\\?") + '"'


def write(kernels: list[Built], out: Path) -> None:
    """Write the machine code, the table and the figures."""
    code, rows = bytearray(), []
    for kernel in kernels:
        code += bytes(-len(code) % ALIGNMENT)
        texts = (c_string(text) for text in (kernel.arguments, kernel.constants, kernel.triton))
        numbers = (kernel.arch, kernel.num_warps, kernel.shared_bytes, kernel.registers, kernel.local_bytes)
        fields = (
            *(c_string(text) for text in (kernel.name, kernel.function)),
            *map(str, (*numbers, kernel.num_arguments)),
            *texts,
            f"coars_kernels_code + {len(code)}",
            str(len(kernel.cubin)),
        )
        rows.append("    {" + ", ".join(fields) + "},\n")
        code += kernel.cubin
    table = (
        "/* Written by aot.build; the machine code is in kernels.bin. */\n"
        '#include "coars_kernels.h"\n\n'
        "extern const unsigned char coars_kernels_code[];\n"
        "const coars_kernel_info coars_kernels_table[] = {\n" + "".join(rows) + "};\n"
        f"const int coars_kernels_table_length = {len(kernels)};\n"
    )
    figures = [{name: value for name, value in k._asdict().items() if name not in ("cubin", "triton")} for k in kernels]
    (out / "kernels.bin").write_bytes(code)
    (out / "kernels_table.c").write_text(table)
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


def parse_archs(text: str) -> list[int]:
    """`80,90` (or `80;90`) to numbers; a ValueError names what is not known."""
    from aot.compile import SHARED_LIMIT

    known = ", ".join(map(str, SHARED_LIMIT))
    archs = []
    for part in text.replace(";", ",").split(","):
        if not part.strip().isdigit() or int(part) not in SHARED_LIMIT:
            raise ValueError(f"COARS_ARCHS: {part.strip()!r} is none of {known}")
        archs.append(int(part))
    return sorted(set(archs))


def main() -> None:
    """Compile and write; every failure is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m aot.build", description="Compile the shipped kernels.")
    parser.add_argument("--out", type=Path, default=Path("build/aot"), help="folder to write to")
    parser.add_argument("--archs", default="80,90", help="compute capabilities, ten times: 80,90")
    parser.add_argument("--processes", type=int, default=2, help="how many compile at one time")
    parser.add_argument("--check-archs", action="store_true", help="only say whether --archs is known")
    arguments = parser.parse_args()
    os.environ["TRITON_CACHE_DIR"] = str((arguments.out / "triton_cache").resolve())
    try:
        archs = parse_archs(arguments.archs)
    except ValueError as error:
        sys.exit(str(error))
    if arguments.check_archs:
        return
    from aot.kernels import shipped

    arguments.out.mkdir(parents=True, exist_ok=True)
    jobs = [
        Job(number, arch)
        for number, kernel in enumerate(shipped())
        for arch in archs
        if tiles_of(arch) in kernel.capabilities
    ]
    with ProcessPoolExecutor(arguments.processes) as pool:
        kernels = list(pool.map(build_kernel, jobs))
    write(kernels, arguments.out)
    print(f"{len(kernels)} kernels for {', '.join(f'sm_{arch}' for arch in archs)}, {_mebibytes(kernels):.1f} MiB")


def _mebibytes(kernels: list[Built]) -> float:
    return sum(len(kernel.cubin) for kernel in kernels) / 2**20


if __name__ == "__main__":
    main()
