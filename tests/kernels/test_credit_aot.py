"""The Triton kernels of `credit_policy_loss` compile for sm_80 and sm_90 on a machine without a GPU, and spill nothing.

Registers and local memory are the compiler's figures, read off the machine code; no measurement.
"""

import os
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton, which carries the compiler for the GPU")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter's kernels cannot be compiled", allow_module_level=True)

from aot.compile import Compiled, compile_kernel  # noqa: E402
from coars_kernels.credit_policy_loss import triton_credit  # noqa: E402
from coars_kernels.credit_policy_loss.reference import OBJECTIVES  # noqa: E402

FLOATS, SUMS = "*fp32", "*fp64"
TURNS = {"offsets_ptr": "*i32", "weight_ptr": FLOATS, "agent_ptr": "*i8"}
TOKENS = {f"{name}_ptr": FLOATS for name in ("grad", "logp", "teacher", "anchor", "sampler", "reference", "reward")}
NUMBERS = {"default_weight", "credit_weight", "credit_clip", "low", "high", "dual_clip", "importance_cap", "kl_weight"}
EVERYTHING = {"sums_ptr": SUMS, "center_ptr": SUMS} | TOKENS | TURNS | dict.fromkeys(NUMBERS, "fp32")
OPTIONAL = (
    "teacher_ptr", "anchor_ptr", "sampler_ptr", "reference_ptr", "weight_ptr", "agent_ptr", "center_ptr", "kl_weight",
)  # fmt: skip
# With at most so many, 5 programs of 128 threads fit into the 65,536 registers of a multiprocessor.
MAX_REGISTERS = 96


def compiled(kernel: Any, arguments: dict[str, Any], capability: int, num_warps: int) -> Compiled:
    signature = {name: value for name, value in arguments.items() if isinstance(value, str)}
    result = compile_kernel(
        kernel,
        signature,
        {name: value for name, value in arguments.items() if name not in signature},
        capability=capability,
        num_warps=num_warps,
        divisible=[name for name, value in signature.items() if value.startswith("*")],
    )
    assert result.local_bytes == 0 and result.count("LDL") == result.count("STL") == 0, result
    assert result.registers <= MAX_REGISTERS, result.registers
    return result


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("objective", "absent"), [*((objective, ()) for objective in OBJECTIVES), ("faithful", OPTIONAL)]
)
def test_policy_kernel(objective: str, absent: tuple[str, ...], capability: int) -> None:
    if objective not in ("clipped", "gspo"):
        absent = (*absent, "dual_clip")
    arguments = EVERYTHING | dict.fromkeys(absent)
    arguments |= {"OBJECTIVE": OBJECTIVES.index(objective), "BLOCK": triton_credit.BLOCK_TOKENS}
    compiled(triton_credit.credit_policy_kernel, arguments, capability, triton_credit.NUM_WARPS)


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_before_and_after(capability: int) -> None:
    names = ("sums_ptr", "logp_ptr", "teacher_ptr", *TURNS, "default_weight", "credit_clip")
    arguments = {name: EVERYTHING[name] for name in names} | {"BLOCK": triton_credit.BLOCK_TOKENS}
    compiled(triton_credit.credit_center_kernel, arguments, capability, triton_credit.NUM_WARPS)
    arguments = {"loss_ptr": FLOATS, "metrics_ptr": FLOATS, "sums_ptr": SUMS, "BY_AGENT": True}
    compiled(triton_credit.credit_metrics_kernel, arguments, capability, 1)
