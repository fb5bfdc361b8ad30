"""Compile a Triton kernel for a GPU that this machine need not have, and say what the machine code uses.

    from aot.compile import compile_kernel
    compiled = compile_kernel(kernel, {"x": "*bf16", "n": "i32"}, {"BLOCK": 1024}, capability=90, num_warps=4)
    compiled.registers, compiled.local_bytes, compiled.shared_bytes, compiled.sass

Triton keeps what it compiled in its own cache on disk, and the figures read off the machine code go there too, so a
second call costs milliseconds. `ptxas`, `cuobjdump` and `nvdisasm` are those of Triton's wheel.

What is left out: choosing what to compile (`aot.kernels`) and turning it into a library.
"""

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

# Shared memory that one block may have, in bytes, by compute capability (CUDA C++ Programming Guide).
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# How PTX writes an argument of each Triton type; all pointers are u64.
PTX_TYPES = {"i8": "u8", "i16": "u16", "i32": "u32", "i64": "u64", "fp32": "f32", "fp64": "f64"}
# What follows a kernel's own arguments in machine code by Triton 3.6: two pointers to scratch memory.
SCRATCH_ARGUMENTS = ("u64", "u64")


@dataclass(frozen=True)
class Compiled:
    """One kernel's machine code and its needs; all figures are those of the compiler, none is a measurement."""

    name: str
    """The kernel's function, which is the symbol in the machine code too."""
    capability: int
    cubin: bytes
    ptx: str
    registers: int
    """Per thread."""
    local_bytes: int
    """Stack and local memory per thread: what did not fit into registers goes here."""
    shared_bytes: int
    """Per block, given at launch."""
    metadata: Mapping[str, Any]
    """What Triton keeps beside the machine code: all options, and what a launch needs."""

    @cached_property
    def sass(self) -> str:
        """The machine code as text."""
        return _run_tool(knobs.nvidia.nvdisasm.path, ["-c"], self.cubin)

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """PTX types of the parameters that the machine code takes, Triton's scratch pointers included."""
        entry = re.search(r"\.visible \.entry \w+\(([^)]*)\)", self.ptx)
        assert entry is not None, f"{self.name}: no entry in its PTX"
        return tuple(re.findall(r"\.param \.(\w+)", entry[1]))

    def count(self, instruction: str) -> int:
        """How often an instruction stands in the machine code: HGMMA is wgmma, LDL and STL are spilled registers."""
        return len(re.findall(rf"\b{instruction}\b", self.sass))


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    capability: int,
    num_warps: int,
    num_stages: int = 3,
    divisible: Sequence[str] = (),
) -> Compiled:
    """Compile `kernel` for `capability` (80, 90).

    Args:
        kernel: a function under `triton.jit`.
        signature: Triton's type of every argument that is no constant: "*bf16", "*i64", "i32", "fp32".
        constants: values of the rest: `tl.constexpr` arguments, and None for a pointer that is not given.
        capability: ten times the compute capability.
        num_warps: warps per program.
        num_stages: depth of the software pipeline of loads.
        divisible: pointers and integers that are multiples of 16. Without this no load is wider than one element, so
            name what a launch would find to be divisible: all pointers, and strides and sizes where the tables say so.
    """
    names = list(kernel.arg_names)
    missing = set(names) ^ (signature.keys() | constants.keys())
    assert not missing and not signature.keys() & constants.keys(), f"{kernel.__name__}: {sorted(missing)}"
    assert set(divisible) <= signature.keys(), f"{kernel.__name__}: {sorted(set(divisible) - signature.keys())}"
    source = ASTSource(
        kernel,
        {name: signature.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = resource_usage(result.asm["cubin"])
    return Compiled(
        name=kernel.__name__,
        capability=capability,
        cubin=result.asm["cubin"],
        ptx=result.asm["ptx"],
        registers=usage["REG"],
        local_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=result.metadata.shared,
        metadata=result.metadata._asdict(),
    )


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of the one function in `cubin`; SHARED is what the driver keeps for itself."""
    cache = get_cache_manager(hashlib.sha256(b"resource usage" + cubin).hexdigest())
    known = cache.get_file("usage.json")
    if known is None:
        text = _run_tool(knobs.nvidia.cuobjdump.path, ["--dump-resource-usage"], cubin)
        usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
        known = cache.put(json.dumps(usage), "usage.json", binary=False)
    return json.loads(Path(known).read_text())


def _run_tool(tool: str, arguments: list[str], cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *arguments, file.name], check=True, capture_output=True, text=True).stdout
