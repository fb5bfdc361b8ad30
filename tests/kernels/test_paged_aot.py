"""What the machine code of the paged kernels must show, beside the limits that hold for all (`test_aot.py`)."""

import os
import re
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton, which carries the compiler for the GPU")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter's kernels cannot be compiled", allow_module_level=True)

from aot.compile import SHARED_LIMIT  # noqa: E402
from aot.kernels import paged_attention  # noqa: E402

KERNELS = [kernel for kernel in paged_attention() if "merge" not in kernel.name]
CASES = [
    pytest.param(kernel, kernel.capabilities[0], id=f"{kernel.name}-{kernel.capabilities[0]}") for kernel in KERNELS
]


@pytest.mark.parametrize(("kernel", "capability"), CASES)
def test_keys_are_copied_ahead_in_16_byte_words(kernel: Any, capability: int) -> None:
    compiled, fixed = kernel.compile(capability), kernel.arguments
    # single numbers are page ids; everything else goes past the registers in the widest copies that there are
    copies = re.findall(r"LDGSTS\.E\.?(\S*)", compiled.sass)
    wide = sum("128" in kind for kind in copies)
    assert wide > 0 and len(copies) - wide <= (10 if "prefill" in kernel.name else 5), copies
    size = 4 if "fp32" in kernel.name else 2
    block = size * fixed["BLOCK_KEYS"] * fixed["BLOCK_HEAD"]
    assert compiled.shared_bytes >= 2 * 2 * block  # keys and values, two blocks of each in flight
    if size == 2 and "decode" in kernel.name:
        assert compiled.count(r"HMMA\.16816\.F32(\.BF16)?") > 0


@pytest.mark.parametrize(("kernel", "capability"), [case for case in CASES if case.values[1] == 80])
def test_code_for_8_0_fits_the_smaller_memory_of_8_6_and_8_9(kernel: Any, capability: int) -> None:
    assert kernel.compile(capability).shared_bytes <= SHARED_LIMIT[86]


def test_two_blocks_fit_a_multiprocessor() -> None:
    """As the numbers of splits assume, at the shapes of the trainer's models."""
    for kernel, capability in ((k, k.capabilities[0]) for k in KERNELS if "bf16_128" in k.name):
        if "prefill" not in kernel.name:
            compiled = kernel.compile(capability)
            registers = -(-compiled.registers // 8) * 8 * 32 * kernel.num_warps
            resident = min((SHARED_LIMIT[capability] + 1024) // (compiled.shared_bytes + 1024), 65536 // registers)
            print(f"{kernel.name} sm_{capability}: {resident} blocks")
            assert resident >= (1 if "prefix" in kernel.name and capability == 80 else 2)
