"""Write `expected.h`: what the example's kernels must return, by the operations' references in float64.

    PYTHONPATH=kernels python kernels/aot/example/make_expected.py

Inputs are exact formulas that `main.cpp` has too. What is left out: inputs that a kernel treats apart (forbidden
tokens, NaN, ties); the operations' own tests have them.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from coars_kernels.credit_policy_loss.reference import credit_policy_loss_reference, metric_names

ROWS, VOCAB, STRIDE, TEMPERATURE = 5, 3001, 3008, 0.75
OFFSETS, WEIGHT, AGENT = (0, 270, 270, 300, 340), (0.25, 0.5, 0.0, 0.25), (0, 1, 0, 1)
TOKENS, TURNS = OFFSETS[-1], len(OFFSETS) - 1


def made(size: int, factor: int, limit: float, offset: float) -> Tensor:
    """The example's input: numbers in [-limit, limit) + offset, exact in fp32."""
    steps = (torch.arange(size) * factor % 1021 - 510).double() / 512.0
    return (steps * limit + offset).float().double()


def array(kind: str, name: str, values: Iterable[float]) -> str:
    """A C array in lines of at most six numbers."""
    texts = [repr(value) for value in values]
    lines = [", ".join(texts[start : start + 6]) for start in range(0, len(texts), 6)]
    return f"static const {kind} {name}[] = {{\n    " + ",\n    ".join(lines) + "};\n"


def head_rows() -> str:
    """Log-probabilities, shares of the other tokens, and a moment of their probabilities."""
    logits = made(ROWS * VOCAB, 389, 8.0, 0.0).view(ROWS, VOCAB)
    target = (torch.arange(ROWS) * 1201 + 5) % VOCAB
    logp = torch.log_softmax(logits / TEMPERATURE, dim=1)
    others = logp.exp().scatter(1, target[:, None], 0.0)
    moment = (others * (torch.arange(VOCAB) % 7)).sum(1)
    sizes = f"enum {{ HEAD_ROWS = {ROWS}, HEAD_VOCAB = {VOCAB}, HEAD_STRIDE = {STRIDE} }};\n"
    results = {"LOGP": logp.gather(1, target[:, None])[:, 0], "SHARE": others.sum(1), "MOMENT": moment}
    return sizes + "".join(array("double", f"EXPECTED_{name}", values.tolist()) for name, values in results.items())


def credit() -> str:
    """Loss, gradient and metrics of the clipped objective with everything asked for."""
    logp, teacher, anchor, sampler, frozen = (made(TOKENS, factor, 1.5, -2.0) for factor in (37, 53, 41, 43, 47))
    turn_agent = torch.tensor(AGENT, dtype=torch.int8)
    loss, metrics = credit_policy_loss_reference(
        logp.requires_grad_(), teacher, sampler, made(TURNS, 331, 1.0, 0.0), torch.tensor(OFFSETS),
        turn_weight=torch.tensor(WEIGHT, dtype=torch.float64), turn_agent=turn_agent,
        credit_weight=0.25, credit_clip=1.0, credit_center=True,
        objective="clipped", clip_low=0.25, clip_high=0.25, dual_clip=3.0,
        old_logp=anchor, importance_cap=2.0, reference_logp=frozen, kl_weight=0.0625,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, logp)
    names = metric_names(turn_agent)
    sizes = f"enum {{ CREDIT_TURNS = {TURNS}, CREDIT_TOKENS = {TOKENS}, CREDIT_METRICS = {len(names)} }};\n"
    return (
        sizes
        + array("int", "CREDIT_OFFSETS", OFFSETS)
        + array("float", "CREDIT_WEIGHT", WEIGHT)
        + array("signed char", "CREDIT_AGENT", AGENT)
        + f"static const double EXPECTED_LOSS = {float(loss.detach())!r};\n"
        + array("double", "EXPECTED_METRICS", [float(metrics[name].detach()) for name in names])
        + array("double", "EXPECTED_GRADIENT", gradient.tolist())
    )


def text() -> str:
    """The whole of `expected.h`."""
    heading = "// Written by make_expected.py, from the references in float64.\n#pragma once\n\n"
    return heading + head_rows() + "\n" + credit()


if __name__ == "__main__":
    Path(__file__).with_name("expected.h").write_text(text())
