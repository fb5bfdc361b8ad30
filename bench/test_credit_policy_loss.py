"""The policy loss alone, [R] log-probs to loss and gradient: against eager torch and its compilation.

    python -m pytest bench/test_credit_policy_loss.py

The floor is memory traffic: three fp32 inputs read and one gradient written once per token, at the bandwidth of a copy
in the same run. All compute the same clipped loss with the same credit; on a CPU ours is plain torch too. Loss and
gradient are checked here, the metrics in the tests. Left out: the other objectives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench import rivals
from bench.harness import Case, Result, Variant
from bench.presets import Preset
from coars_kernels import __version__, credit_policy_loss
from coars_kernels.credit_policy_loss.reference import credit_policy_loss_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TURN = 64
SIZES = {"smoke": (2**14,), "cpu": (2**14, 2**17, 2**20), "h100": (2**14, 2**17, 2**20)}


@dataclass
class Tokens:
    """Per-token values of packed turns."""

    logp: Tensor
    teacher: Tensor
    behaviour: Tensor
    reward: Tensor
    offsets: Tensor


def make_tokens(rows: int) -> Callable[[int], Tokens]:
    def make(seed: int) -> Tokens:
        generator = torch.Generator(DEVICE).manual_seed(seed)

        def normal(size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=DEVICE)

        logp = -normal(rows).abs() * 3
        near = [(logp + scale * normal(rows)).clamp(max=0) for scale in (0.3, 0.05)]
        offsets = torch.arange(0, rows + 1, TURN, device=DEVICE)
        return Tokens(logp.requires_grad_(), near[0].detach(), near[1].detach(), normal(rows // TURN), offsets)

    return make


def loss_run(function: Callable[..., tuple[Tensor, dict[str, Tensor]]]) -> Callable[[Tokens], Result]:
    """Loss and its gradient."""

    def run(case: Tokens) -> Result:
        loss, _ = function(case.logp, case.teacher, case.behaviour, case.reward, case.offsets)
        return {"loss": loss.detach(), "grad": torch.autograd.grad(loss, case.logp)[0]}

    return run


def padded_eager(case: Tokens, *, metrics: bool) -> Result:
    """As trainers write it: [M, T] padded tensors (here all turns have one length). The metrics are those that ours
    returns, from the tensors that are there."""
    shape = (case.reward.shape[0], TURN)
    logp, teacher, behaviour = (x.view(shape) for x in (case.logp, case.teacher, case.behaviour))
    raw = teacher - logp.detach()
    credit = raw.clamp(-1.0, 1.0)
    advantage = case.reward[:, None] + 0.1 * credit
    log_ratio = logp - behaviour
    ratio = torch.exp(log_ratio)
    term = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    loss = -(term.sum(1) / TURN).mean()
    found = {"loss": loss.detach(), "grad": torch.autograd.grad(loss, case.logp)[0]}
    if metrics:
        with torch.no_grad():
            _padded_metrics(raw, credit, advantage, log_ratio, ratio)
    return found


def _padded_metrics(
    raw: Tensor, credit: Tensor, advantage: Tensor, log_ratio: Tensor, ratio: Tensor
) -> tuple[Tensor, ...]:
    clipped = torch.where(advantage > 0, ratio > 1.2, (ratio < 0.8) & (advantage < 0))
    columns = (clipped.float(), torch.expm1(log_ratio) - log_ratio, ratio, advantage, credit, credit.abs())
    cut = (raw.abs() > 1.0).float()
    return (*(column.mean() for column in (*columns, cut)), advantage.std(correction=0))


def expected(case: Tokens, _: Result) -> dict[str, tuple[Tensor | None, Tensor]]:
    logp = case.logp.detach().double().requires_grad_()
    others = (case.teacher.double(), case.behaviour.double(), case.reward.double())
    loss, _ = credit_policy_loss_reference(logp, *others, case.offsets)
    return {"loss": (None, loss.detach()), "grad": (None, torch.autograd.grad(loss, logp)[0])}


def cases(preset: Preset) -> list[Case]:
    found = []
    for rows in SIZES[preset.name]:
        absent = "" if preset.compile_everywhere else "left out here: compiling takes longer than the preset allows"
        variants = [
            Variant("credit_policy_loss", loss_run(credit_policy_loss), "ours", f"coars_kernels {__version__}"),
            Variant("eager, packed, with metrics", loss_run(credit_policy_loss_reference)),
            Variant("eager, padded, with metrics", partial(padded_eager, metrics=True)),
            Variant("eager, padded, no metrics", partial(padded_eager, metrics=False)),
            Variant(
                "torch.compile, packed, with metrics",
                loss_run(lambda *values: rivals.compiled(credit_policy_loss_reference)(*values)),
                absent=absent,
            ),
        ]
        case = Case(
            op="credit_policy_loss", name="clipped, with credit", shape={"R": rows}, dtype=torch.float32, device=DEVICE,
            inputs=make_tokens(rows), variants=variants, expected=expected, num_bytes=4.0 * 4 * rows,
            rounds=3 * preset.rounds,
        )  # fmt: skip
        found.append(case)
    return found


def test_credit_policy_loss(case: Case, measured: Callable[[Case], object]) -> None:
    measured(case)
