"""The head of a CoARS step against its floor, three bare matrix products, and against what people use today.

    python -m pytest bench/test_head.py -s

Forward and backward of student log-probs, teacher log-probs, credit and clipped loss over R rows, with a frozen head.
Every variant's gradient is compared with float64 before it is timed. Ratios on a CPU; absolute times only on a GPU.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import interleaved, peak_bytes
from coars_kernels import credit_policy_loss, fused_credit_loss

CUDA = torch.cuda.is_available()
ROWS, HIDDEN, VOCAB = (16384, 3584, 152064) if CUDA else (2048, 512, 32000)
DTYPE = torch.bfloat16 if CUDA else torch.float32
TURN = 64
"""Tokens of a turn."""
ROUNDS = 20 if CUDA else 7


class Case:
    """Inputs of realistic scale: logits of a few nats, behaviour log-probs near the present ones."""

    def __init__(self, rows: int, hidden: int, vocab: int, dtype: torch.dtype, device: str):
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

        self.weight = normal(vocab, hidden).mul_(2.0 / hidden**0.5).to(dtype)
        self.student = normal(rows, hidden).to(dtype).requires_grad_()
        self.teacher = (self.student.detach() + 0.1 * normal(rows, hidden)).to(dtype)
        self.target = torch.randint(vocab, (rows,), generator=generator, device=device)
        self.offsets = torch.arange(0, rows + 1, TURN, device=device)
        self.reward = normal(rows // TURN)
        with torch.no_grad():
            self.behaviour = F.linear(self.student[:1].float(), self.weight.float()).new_full((rows,), 0.0)
            logp = fused_credit_loss(
                self.student, None, self.weight, self.target, self.behaviour, self.reward, self.offsets
            ).logp
            self.behaviour = logp + 0.05 * normal(rows)


def ours(case: Case) -> Tensor:
    """The fused op."""
    loss = fused_credit_loss(
        case.student, case.teacher, case.weight, case.target, case.behaviour, case.reward, case.offsets
    ).loss
    return torch.autograd.grad(loss, case.student)[0]


def eager(case: Case) -> Tensor:
    """Logits, log_softmax and gather, twice; the loss by the same op, so that the head alone differs."""

    def logp(hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, case.weight).float()
        return torch.log_softmax(logits, -1).gather(1, case.target[:, None])[:, 0]

    with torch.no_grad():
        teacher = logp(case.teacher)
    loss, _ = credit_policy_loss(logp(case.student), teacher, case.behaviour, case.reward, case.offsets)
    return torch.autograd.grad(loss, case.student)[0]


def cross_entropy(case: Case) -> Tensor:
    """Eager cross-entropy, as TRL and verl compute log-probs without their fused paths."""

    def logp(hidden: Tensor) -> Tensor:
        return -F.cross_entropy(F.linear(hidden, case.weight).float(), case.target, reduction="none")

    with torch.no_grad():
        teacher = logp(case.teacher)
    loss, _ = credit_policy_loss(logp(case.student), teacher, case.behaviour, case.reward, case.offsets)
    return torch.autograd.grad(loss, case.student)[0]


def floor(case: Case) -> Callable[[], None]:
    """Three bare products, each a plain `torch.mm`: student logits, teacher logits, gradient of the hidden states."""
    student = case.student.detach()

    def run() -> None:
        torch.mm(case.teacher, case.weight.T)
        torch.mm(torch.mm(student, case.weight.T), case.weight)

    return run


def check(variant: Callable[[Case], Tensor]) -> None:
    """A wrong result has no time: gradient against float64 on a small case."""
    case = Case(4 * TURN, 64, 997, DTYPE, "cuda" if CUDA else "cpu")
    exact = Case(4 * TURN, 64, 997, DTYPE, "cuda" if CUDA else "cpu")
    exact.student = case.student.detach().double().requires_grad_()
    exact.teacher, exact.weight = case.teacher.double(), case.weight.double()
    logits = exact.student @ exact.weight.T
    logp = torch.log_softmax(logits, -1).gather(1, case.target[:, None])[:, 0]
    teacher = torch.log_softmax(exact.teacher @ exact.weight.T, -1).gather(1, case.target[:, None])[:, 0]
    loss, _ = credit_policy_loss(logp, teacher, case.behaviour.double(), case.reward.double(), case.offsets)
    (expected,) = torch.autograd.grad(loss, exact.student)
    found = variant(case).double()
    error = float((found - expected).norm() / expected.norm())
    assert error < (1e-2 if DTYPE == torch.bfloat16 else 1e-5), error


VARIANTS: dict[str, Callable[[Case], Tensor]] = {
    "fused_credit_loss": ours,
    "eager log_softmax": eager,
    "eager cross_entropy": cross_entropy,
}


def test_head_against_its_floor(record_property: Callable[[str, object], None]) -> None:
    for variant in VARIANTS.values():
        check(variant)
    case = Case(ROWS, HIDDEN, VOCAB, DTYPE, "cuda" if CUDA else "cpu")
    bare = floor(case)
    calls: dict[str, Callable[[], object]] = {"three bare mm": bare}
    for name, variant in VARIANTS.items():
        try:
            variant(case)
        except torch.cuda.OutOfMemoryError:
            continue
        calls[name] = lambda variant=variant: variant(case)
    timings = interleaved(calls, rounds=ROUNDS)
    del bare
    memory = {name: peak_bytes(call) for name, call in calls.items() if name != "three bare mm"}
    base = timings["three bare mm"].median
    machine = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} threads, {platform.machine()} CPU"
    lines = [f"R={ROWS} H={HIDDEN} V={VOCAB} {DTYPE}, torch {torch.__version__}, {machine}, {ROUNDS} rounds"]
    for name, timing in timings.items():
        ratio = f"{timing.median / base:5.2f}x ({timing.low / base:.2f} to {timing.high / base:.2f})"
        extra = f"  {memory[name] / 2**20:8.0f} MiB" if name in memory else ""
        absolute = f"  {1e3 * timing.median:8.1f} ms" if CUDA else ""
        lines.append(f"{name:22s} {ratio}{absolute}{extra}")
    print("\n" + "\n".join(lines))
    record_property("head", json.dumps({name: timing.median / base for name, timing in timings.items()}))
    Path(".benchmarks").mkdir(exist_ok=True)
    assert memory["fused_credit_loss"] < memory["eager log_softmax"] / 5
    if timings["fused_credit_loss"].median / base > 1.10:
        pytest.fail(f"{timings['fused_credit_loss'].median / base:.3f} times the floor, more than 1.10")
