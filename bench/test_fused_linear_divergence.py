"""Divergence over the whole vocabulary, forward and backward: against full logits of both, as it is usually written.

    python -m pytest bench/test_fused_linear_divergence.py

The floor is three bare `torch.mm`: logits of student and teacher, and the gradient's product with the head. Left out:
operations that return one mean for a whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import rivals
from bench.harness import SIXTEEN_BIT_LOGITS, Case, Result, Variant
from bench.presets import Preset
from coars_kernels import __version__, fused_linear_divergence
from coars_kernels.fused_linear_divergence.reference import KINDS, fused_linear_divergence_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"smoke": (128, 96, 2000), "cpu": (1024, 512, 32000), "h100": (4096, 3584, 152064)}
"""Rows, hidden size, vocabulary."""


@dataclass
class Rows:
    """Hidden states of both, the head, and what the loss gives each row."""

    student: Tensor
    teacher: Tensor
    weight: Tensor
    upstream: Tensor


def make_rows(rows: int, size: int, vocab: int, dtype: torch.dtype) -> Callable[[int], Rows]:
    def make(seed: int) -> Rows:
        generator = torch.Generator(DEVICE).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=DEVICE)

        student = normal(rows, size)
        teacher = student + 0.3 * normal(rows, size)
        weight = normal(vocab, size).mul_(2.0 * size**-0.5)
        return Rows(student.to(dtype).requires_grad_(), teacher.to(dtype), weight.to(dtype), normal(rows).abs())

    return make


Divergence = Callable[..., Tensor]


def run_of(function: Divergence, kind: str) -> Callable[[Rows], Result]:
    """Values and the gradient in the student."""

    def run(x: Rows) -> Result:
        value = function(x.student, x.teacher, x.weight, kind=kind)
        (gradient,) = torch.autograd.grad(value, x.student, x.upstream.to(value.dtype))
        return {"value": value.detach(), "grad": gradient}

    return run


def eager(student: Tensor, teacher: Tensor, weight: Tensor, *, kind: str) -> Tensor:
    """Logits in the inputs' dtype, as a model's head returns them, then fp32."""
    log_p, log_t = (torch.log_softmax((h @ weight.T).float(), -1) for h in (student, teacher))
    if kind == "forward_kl":
        return (log_t.exp() * (log_t - log_p)).sum(-1)
    if kind == "reverse_kl":
        return (log_p.exp() * (log_p - log_t)).sum(-1)
    log_m = torch.logaddexp(log_p, log_t) - 0.6931471805599453
    return ((log_p.exp() * (log_p - log_m)) + (log_t.exp() * (log_t - log_m))).sum(-1) / 2


def floor(x: Rows) -> Callable[[], None]:
    student, weight = x.student.detach(), x.weight

    def run() -> None:
        logits = torch.mm(student, weight.T)
        torch.mm(x.teacher, weight.T)
        torch.mm(logits, weight)

    return run


def expected(kind: str) -> Callable[[Rows, Result], dict[str, tuple[Tensor | None, Tensor]]]:
    def compute(x: Rows, _: Result) -> dict[str, tuple[Tensor | None, Tensor]]:
        student = x.student.detach().double().requires_grad_()
        exact = Rows(student, x.teacher.double(), x.weight.double(), x.upstream.double())
        found = run_of(fused_linear_divergence_reference, kind)(exact)
        return {name: (None, value) for name, value in found.items()}

    return compute


def cases(preset: Preset) -> list[Case]:
    rows, size, vocab = SIZES[preset.name]
    dtype = getattr(torch, preset.dtype)
    found = []
    for kind in KINDS:
        variants = [
            Variant("fused_linear_divergence", run_of(fused_linear_divergence, kind), "ours",
                    f"coars_kernels {__version__}"),
            Variant("eager, full logits", run_of(eager, kind), precision=SIXTEEN_BIT_LOGITS),
            Variant(
                "torch.compile", run_of(lambda *x, **k: rivals.compiled(eager)(*x, **k), kind),
                precision=SIXTEEN_BIT_LOGITS,
                absent="" if preset.compile_everywhere else "left out here: compiling takes longer than allowed",
            ),
        ]  # fmt: skip
        case = Case(
            op="fused_linear_divergence", name=kind, shape={"R": rows, "H": size, "V": vocab}, dtype=dtype,
            device=DEVICE, inputs=make_rows(rows, size, vocab, dtype), variants=variants, expected=expected(kind),
            floor=floor, floor_name="three bare mm", flops=6.0 * rows * size * vocab,
        )  # fmt: skip
        found.append(case)
    return found


def test_fused_linear_divergence(case: Case, measured: Callable[[Case], object]) -> None:
    measured(case)
