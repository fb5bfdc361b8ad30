"""Launches of the trainer's operations before a stand-in for Triton's GPU driver: nothing runs, but all is compiled.

    python tests/kernels/aot_launches.py ARCH [LIBRARY]

Prints JSON: which kernels reached the driver, how many came from the library, and the seconds that it took.
"""

import json
import sys
import time
from itertools import combinations

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from coars_kernels import aot_library
from coars_kernels.agent_lora.triton_lora import agent_lora_triton
from coars_kernels.branch_attention.triton_branch import BRANCH_TILES, branch_attention_triton
from coars_kernels.credit_policy_loss.triton_credit import credit_policy_loss_triton
from coars_kernels.linear_logprob.triton_fused import CONFIGS, fused_masses
from coars_kernels.linear_logprob.triton_rows import jacobian_rows, row_masses
from coars_kernels.paged_decode_attention.triton_paged import DECODE_TILES, PREFIX_TILES, paged_decode_triton
from coars_kernels.paged_prefill_attention.triton_prefill import PREFILL_TILES, paged_prefill_triton
from coars_kernels.sample_with_logprob.triton_sample import sample_with_logprob_triton

launched: list[str] = []


class Launcher:
    """Takes the place of Triton's launcher for one kernel."""

    def __init__(self, source, metadata):
        self.name = metadata.name

    def __call__(self, *arguments):
        launched.append(self.name)


class Utilities:
    """What Triton asks of a driver when it loads machine code."""

    def load_binary(self, name, code, shared_bytes, device):
        assert code.startswith(b"\x7fELF")
        return None, None, 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 * 1024}


class StandIn:
    """A driver of a GPU that is not there."""

    utils, launcher_cls = Utilities(), Launcher

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)


def launch_head(arch: int, num_rows: int) -> None:
    """Both designs of the head, student and teacher, with a gradient."""
    vocab_size, hidden_size = 1600, 64
    logits = torch.zeros(num_rows, vocab_size)
    target = torch.zeros(num_rows, dtype=torch.int64)
    weight = torch.zeros(vocab_size, hidden_size, dtype=torch.bfloat16)
    hidden = weight[:num_rows].clone()
    mass = torch.empty(num_rows, vocab_size, dtype=torch.bfloat16)
    row_masses(logits, target, mass_CV=None)
    rows = row_masses(logits, target, mass_CV=mass)
    product = torch.zeros(num_rows, hidden_size)
    jacobian_rows(product, weight, target, rows.others_C, rows.inverse_C, 1.0, torch.empty_like(product))
    config = CONFIGS[90 if arch >= 90 else 80, 2]
    fused_masses(hidden, hidden.clone(), weight, target, mass_CV=mass, config=config)
    fused_masses(hidden, None, weight, target, mass_CV=None, config=config)


def launch_credit(objective: str, *given: str) -> None:
    """The policy loss as the trainer calls it, with what is given."""
    tokens, turns = torch.zeros(40), torch.ones(4)
    teacher, old, reference = (tokens.clone() if name in given else None for name in ("teacher", "old", "kl"))
    credit_policy_loss_triton(
        tokens, teacher, tokens.clone(), turns, torch.tensor([0, 10, 20, 30, 40], dtype=torch.int32),
        turns.clone(), torch.zeros(4, dtype=torch.int8), old, reference,
        0.1, 1.0, "center" in given, objective, 0.2, 0.2, 3.0 if "dual" in given else None, 2.0,
        0.001 if "kl" in given else 0.0,
    )  # fmt: skip


def launch_paged(arch: int) -> None:
    """Decode with and without splits and groups, and prefill, at Qwen2.5-7B's heads and with pages of 256."""
    tables = (PREFIX_TILES, DECODE_TILES, PREFILL_TILES)
    prefix, decode, prefill = (tiles[90 if arch >= 90 else 80, 2, 128] for tiles in tables)
    q = torch.zeros(5, 28, 128, dtype=torch.bfloat16)
    pages = torch.zeros(2, 2, 256, 4, 128, dtype=torch.bfloat16)
    lengths, table = torch.ones(5, dtype=torch.int32), torch.zeros(5, 3, dtype=torch.int32)
    bounds, none = torch.arange(6, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    for splits, groups in (((0, 1), (None, None)), ((0, 4), (None, None)), ((2, 2), (bounds, none))):
        paged_decode_triton(q, *pages, table, lengths, *groups, 0.1, splits=splits, tiles=(prefix, decode))
    paged_prefill_triton(q, *pages, table, bounds, lengths, 0.1, tile=prefill)


def launch_branch(arch: int) -> None:
    """A teacher's branches at Qwen2.5-7B's heads."""
    q = torch.zeros(6, 28, 128, dtype=torch.bfloat16)
    own, trunk = torch.zeros(2, 6, 4, 128, dtype=q.dtype), torch.zeros(2, 40, 4, 128, dtype=q.dtype)
    bounds, starts, lengths = (torch.tensor(values).int() for values in ([0, 2, 6], [0, 20], [9, 12]))
    tile = BRANCH_TILES[90 if arch >= 90 else 80, 2, 128]
    branch_attention_triton(q, *own, *trunk, bounds, starts, lengths, 0.1, tile=tile)


def launch_decoding() -> None:
    """Sampling at Qwen2.5-7B's vocabulary, and adapters of the presets' ranks."""
    ids = torch.zeros(2, dtype=torch.int64)
    place = {"sequence_id": ids, "position": ids.clone()}
    for dtype, temperature in ((torch.float32, 1.0), (torch.float32, 0.0), (torch.bfloat16, 0.7)):
        sample_with_logprob_triton(torch.zeros(2, 152064, dtype=dtype), seed=1, temperature=temperature, **place)
    sample_with_logprob_triton(torch.zeros(2, 152064), seed=ids[0].clone(), **place)
    for rank in (16, 32):
        x, a = torch.zeros(5, 512, dtype=torch.bfloat16), torch.zeros(2, rank, 512, dtype=torch.bfloat16)
        agent_lora_triton(x, a, torch.zeros(2, 768, rank, dtype=x.dtype), torch.zeros(5, dtype=torch.int64), 2.0)


def main() -> None:
    """Launch everything and report."""
    arch = int(sys.argv[1])
    driver.set_active(StandIn(arch))
    start = time.perf_counter()
    if len(sys.argv) > 2:
        aot_library.install(sys.argv[2])
    for num_rows in (8, 7):
        launch_head(arch, num_rows)
    for objective in ("faithful", "clipped", "cispo", "gspo"):
        launch_credit(objective, "teacher")
        launch_credit(objective, "teacher", "center")
        launch_credit(objective, "teacher", "old", "kl")
    launch_credit("clipped")
    for given in combinations(("center", "old", "kl", "dual"), 2):
        launch_credit("clipped", "teacher", *given)
    launch_paged(arch)
    launch_branch(arch)
    launch_decoding()
    seconds = time.perf_counter() - start
    print(json.dumps({"launched": launched, "seconds": seconds, **aot_library.counts()}))


if __name__ == "__main__":
    main()
