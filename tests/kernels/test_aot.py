"""Every shipped kernel compiles for sm_80 and sm_90 on a machine without a GPU, and stays within what a GPU has.

Figures of the compiler, not measurements: no register is spilled to memory, shared memory fits, and the matrix product
is done by wgmma where the hardware has it.
"""

import os
import re
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton, which carries the compiler for the GPU")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter's kernels cannot be compiled", allow_module_level=True)

from aot.compile import SHARED_LIMIT  # noqa: E402
from aot.kernels import agent_lora, sampling, shipped  # noqa: E402


def variant(name: str) -> bool:
    """Whether it is the policy loss with some of its arguments left out: the fullest of each objective stands for them
    here. The library's build and ctest look at every one."""
    return name.startswith("credit_") and name.count("_") > 1


CASES = [
    pytest.param(kernel, capability, id=f"{kernel.name}-sm_{capability}")
    for kernel in shipped()
    if not variant(kernel.name)
    for capability in kernel.capabilities
]


@pytest.mark.parametrize(("kernel", "capability"), CASES)
def test_fits_the_hardware(kernel: Any, capability: int) -> None:
    compiled = kernel.compile(capability)
    figures = f"{compiled.registers} registers, {compiled.local_bytes} local, {compiled.shared_bytes} shared bytes"
    print(f"{kernel.name} sm_{capability}: {figures}")
    assert compiled.local_bytes == 0, figures  # stack and local memory: where spilled registers go
    assert compiled.registers <= 255 and compiled.shared_bytes <= SHARED_LIMIT[capability], figures
    # one block must fit a multiprocessor's 64Ki registers, or the launch fails
    assert compiled.registers * 32 * kernel.num_warps <= 65536, figures
    if kernel.tensor_cores:
        assert compiled.count("HGMMA" if capability >= 90 else "HMMA") > 0


@pytest.mark.parametrize("kernel", [kernel for kernel in shipped() if kernel.name == "head_rows_bf16"])
def test_rows_are_read_and_written_in_16_byte_words(kernel: Any) -> None:
    sass = kernel.compile(90).sass
    assert "LDG.E.128" in sass and "STG.E.128" in sass


@pytest.mark.parametrize("kernel", [kernel for kernel in sampling() if "merge" not in kernel.name])
def test_logits_are_read_in_16_byte_words(kernel: Any) -> None:
    kinds = re.findall(r"LDG\.E\.?(\S*)", kernel.compile(90).sass)
    # the others are a row's id and position, a graph's seed, and the winner's logit
    assert sum("128" in kind for kind in kinds) == (2 if "fp32" in kernel.name else 1), kinds
    assert len(kinds) <= (6 if "graph" in kernel.name else 5), kinds


@pytest.mark.parametrize("kernel", agent_lora())
def test_adapters_take_16_byte_words_and_tensor_cores(kernel: Any) -> None:
    compiled = kernel.compile(90)
    if "first" in kernel.name:  # inputs and factors are copied ahead
        copies = re.findall(r"LDGSTS\.E\.?(\S*)", compiled.sass)
        assert copies and all("128" in kind for kind in copies), copies
    else:
        assert "E.128" in compiled.sass
    assert compiled.count(r"HMMA\.16816\.F32(\.BF16)?") > 0


def test_names_are_unique() -> None:
    names = [f"{kernel.name}-sm_{capability}" for kernel in shipped() for capability in kernel.capabilities]
    assert len(set(names)) == len(names)
