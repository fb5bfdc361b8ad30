"""The head of a CoARS step against its floor of bare matrix products, and against what people use today.

    python -m pytest bench/test_head.py --preset cpu

Forward and backward together: per-token log-probs under a per-token loss (frozen and trainable head), mean
cross-entropy, student and teacher (`paired_linear_logprob`), the mean divergence between both
(`fused_linear_divergence`; its own file has one value a row), and the whole head with credit and clipped loss
(`fused_credit_loss`), with sweeps over rows and vocabulary. Rivals that only give log-probs take our
`credit_policy_loss` after them, so that the head alone differs. Every result is compared with float64 at full size, on
the rows of a few turns. Left out: entropy, bias and temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import rivals
from bench.harness import Case, Result, Variant
from bench.presets import Preset
from coars_kernels import (
    __version__,
    credit_policy_loss,
    fused_credit_loss,
    fused_linear_divergence,
    linear_logprob,
    paired_linear_logprob,
)
from coars_kernels.credit_policy_loss.reference import credit_policy_loss_reference
from coars_kernels.linear_logprob.reference import linear_logprob_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TURN = 64
"""Tokens of a turn."""
SIZES = {"smoke": (256, 64, 4096), "cpu": (2048, 512, 32000), "h100": (16384, 3584, 152064)}
"""Rows, hidden size, vocabulary."""
KIND_SIZES = SIZES | {"cpu": (512, 256, 8000)}
"""Of the kinds of call other than the whole head, and where the sweeps end: a CPU is slow."""
SWEEP = {"smoke": (), "cpu": (4, 2), "h100": (8, 4, 2)}
"""Rows and vocabulary are each divided by these."""
OURS = f"coars_kernels {__version__}"


@dataclass
class Head:
    """Inputs of realistic scale: logits of a few nats, behaviour log-probs near the present ones."""

    weight: Tensor
    student: Tensor
    teacher: Tensor
    target: Tensor
    offsets: Tensor
    reward: Tensor
    behaviour: Tensor
    upstream: Tensor
    """Gradient of a loss with respect to each log-prob."""


def make_head(rows: int, hidden: int, vocab: int, dtype: torch.dtype, *, trainable: bool) -> Callable[[int], Head]:
    """seed -> inputs."""

    def make(seed: int) -> Head:
        generator = torch.Generator(DEVICE).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=DEVICE)

        weight = normal(vocab, hidden).mul_(2.0 / hidden**0.5).to(dtype).requires_grad_(trainable)
        student = normal(rows, hidden).to(dtype)
        teacher = (student + 0.1 * normal(rows, hidden)).to(dtype)
        target = torch.randint(vocab, (rows,), generator=generator, device=DEVICE)
        offsets = torch.arange(0, rows + 1, TURN, device=DEVICE)
        with torch.no_grad():
            behaviour = linear_logprob(student, weight, target) + 0.05 * normal(rows)
        reward = normal(rows // TURN)
        upstream = normal(rows) / rows
        return Head(weight, student.requires_grad_(), teacher, target, offsets, reward, behaviour, upstream)

    return make


def checked_rows(case: Head) -> Tensor:
    """Rows of the first, a middle and the last turn: each row's result depends on its own turn only."""
    turns = sorted({0, case.reward.shape[0] // 2, case.reward.shape[0] - 1})
    return torch.cat([torch.arange(turn * TURN, (turn + 1) * TURN, device=DEVICE) for turn in turns])


def gradients(loss: Tensor, case: Head) -> dict[str, Tensor]:
    """Of the hidden states, and of the head where it is trained."""
    wanted = {"grad_hidden": case.student} | ({"grad_weight": case.weight} if case.weight.requires_grad else {})
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


# -------------------------------------------------------------------------------------------------- what is computed


def logprob_run(logprob: rivals.Logprob) -> Callable[[Head], Result]:
    """Log-probs under an arbitrary per-token loss."""

    def run(case: Head) -> Result:
        logp = logprob(case.student, case.weight, case.target)
        return {"logp": logp.detach()} | gradients((logp * case.upstream).sum(), case)

    return run


def mean_run(mean_loss: rivals.MeanLoss) -> Callable[[Head], Result]:
    """Mean cross-entropy."""
    return lambda case: gradients(mean_loss(case.student, case.weight, case.target), case)


def paired_run(logprob: rivals.Logprob) -> Callable[[Head], Result]:
    """Student with gradient, then teacher without."""

    def run(case: Head) -> Result:
        with torch.no_grad():
            teacher = logprob(case.teacher, case.weight, case.target)
        logp = logprob(case.student, case.weight, case.target)
        return {"logp": logp.detach(), "logp_teacher": teacher} | gradients((logp * case.upstream).sum(), case)

    return run


def credit_run(logprob: rivals.Logprob) -> Callable[[Head], Result]:
    """Student, teacher, credit and clipped loss."""

    def run(case: Head) -> Result:
        with torch.no_grad():
            teacher = logprob(case.teacher, case.weight, case.target)
        logp = logprob(case.student, case.weight, case.target)
        return gradients(credit_policy_loss(logp, teacher, case.behaviour, case.reward, case.offsets)[0], case)

    return run


def clipped_run(logprob: rivals.Logprob) -> Callable[[Head], Result]:
    """Student and clipped loss, no teacher."""

    def run(case: Head) -> Result:
        logp = logprob(case.student, case.weight, case.target)
        return gradients(credit_policy_loss(logp, None, case.behaviour, case.reward, case.offsets)[0], case)

    return run


def ours_paired(case: Head) -> Result:
    logp, teacher = paired_linear_logprob(case.student, case.teacher, case.weight, case.target)
    return {"logp": logp.detach(), "logp_teacher": teacher} | gradients((logp * case.upstream).sum(), case)


def ours_fused(teacher: bool) -> Callable[[Head], Result]:
    def run(case: Head) -> Result:
        other = case.teacher if teacher else None
        found = fused_credit_loss(
            case.student, other, case.weight, case.target, case.behaviour, case.reward, case.offsets
        )
        return gradients(found.loss, case)

    return run


def grpo_run(loss: Callable[..., Tensor]) -> Callable[[Head], Result]:
    """Student and clipped loss of a rival that has both in one."""
    return lambda case: gradients(loss(case.student, case.weight, case.target, case.behaviour, case.reward), case)


def divergence_run(divergence: Callable[..., Tensor]) -> Callable[[Head], Result]:
    """Mean divergence of student and teacher."""
    return lambda case: gradients(divergence(case.student, case.teacher, case.weight, case.target), case)


def ours_divergence(student: Tensor, teacher: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    del target
    return fused_linear_divergence(student, teacher, weight, kind="js").mean()


# ------------------------------------------------------------------------------------------------------ what is right

Expected = dict[str, tuple[Tensor | None, Tensor]]


def exact_logp(case: Head, hidden: Tensor, rows: Tensor, *, grad: bool) -> tuple[Tensor, Tensor]:
    """Hidden states and log-probs of some rows, in float64."""
    chosen = hidden.detach()[rows].double().requires_grad_(grad)
    logp = linear_logprob_reference(chosen, case.weight.detach().double(), case.target[rows])
    assert isinstance(logp, Tensor)
    return chosen, logp


def expected_logprob(mean: bool, teacher: bool) -> Callable[[Head, Result], Expected]:
    """Log-probs, their gradient under `upstream` (or under the mean), and a few rows of the head's gradient."""

    def expected(case: Head, _: Result) -> Expected:
        rows, num_rows = checked_rows(case), case.target.shape[0]
        upstream = torch.full_like(case.upstream, -1.0 / num_rows) if mean else case.upstream
        chosen, logp = exact_logp(case, case.student, rows, grad=True)
        (gradient,) = torch.autograd.grad((logp * upstream[rows].double()).sum(), chosen)
        found: Expected = {"grad_hidden": (rows, gradient)}
        if not mean:
            found["logp"] = (rows, logp.detach())
        if teacher:
            found["logp_teacher"] = (rows, exact_logp(case, case.teacher, rows, grad=False)[1])
        if case.weight.requires_grad:
            tokens = torch.unique(torch.cat([case.target[:8], torch.arange(8, device=DEVICE)]))
            found["grad_weight"] = (tokens, exact_weight_gradient(case, upstream, tokens))
        return found

    return expected


def expected_divergence(case: Head, _: Result) -> Expected:
    """Gradient of the mean Jensen-Shannon divergence on the checked rows, in float64."""
    rows, weight = checked_rows(case), case.weight.detach().double()
    chosen = case.student.detach()[rows].double().requires_grad_()
    student, teacher = (torch.softmax(hidden @ weight.T, -1) for hidden in (chosen, case.teacher[rows].double()))
    middle = (student + teacher) / 2
    total = sum((p * (p / middle).log()).sum() for p in (student, teacher)) / 2
    (gradient,) = torch.autograd.grad(total / case.target.shape[0], chosen)
    return {"grad_hidden": (rows, gradient)}


def exact_weight_gradient(case: Head, upstream: Tensor, tokens: Tensor) -> Tensor:
    """Rows `tokens` of the head's gradient in float64, over all rows of the batch, 256 at a time."""
    weight = case.weight.detach().double()
    total = torch.zeros(tokens.shape[0], weight.shape[1], dtype=torch.float64, device=DEVICE)
    for first in range(0, case.target.shape[0], 256):
        part = slice(first, first + 256)
        hidden = case.student.detach()[part].double()
        logits = hidden @ weight.T
        mass = torch.exp(logits[:, tokens] - logits.logsumexp(-1, keepdim=True))
        hit = (case.target[part, None] == tokens).double()
        total += ((hit - mass) * upstream[part, None].double()).T @ hidden
    return total


def expected_credit(teacher: bool) -> Callable[[Head, Result], Expected]:
    """Gradient of the loss on the checked turns: each turn's part of the loss stands alone."""

    def expected(case: Head, _: Result) -> Expected:
        rows = checked_rows(case)
        turns = rows[::TURN] // TURN
        chosen, logp = exact_logp(case, case.student, rows, grad=True)
        other = exact_logp(case, case.teacher, rows, grad=False)[1] if teacher else None
        loss, _ = credit_policy_loss_reference(
            logp,
            other,
            case.behaviour[rows].double(),
            case.reward[turns].double(),
            case.offsets[: len(turns) + 1],
            turn_weight=torch.full((len(turns),), 1.0 / case.reward.shape[0], dtype=torch.float64, device=DEVICE),
        )
        return {"grad_hidden": (rows, torch.autograd.grad(loss, chosen)[0])}

    return expected


# ------------------------------------------------------------------------------------------------------------- cases


def products(count: int) -> Callable[[Head], Callable[[], None]]:
    """Bare `torch.mm`: logits; gradient of the hidden states; the teacher's logits or the head's gradient; both."""

    def floor(case: Head) -> Callable[[], None]:
        student, teacher, weight = case.student.detach(), case.teacher, case.weight.detach()

        def run() -> None:
            logits = torch.mm(student, weight.T)
            torch.mm(logits, weight)
            if count == 3 and case.weight.requires_grad:
                torch.mm(logits.T, student)
            del logits
            if count == 3 and not case.weight.requires_grad:
                torch.mm(teacher, weight.T)

        return run

    return floor


def rival_variants(
    found: Sequence[rivals.Rival],
    run: Callable[[Callable[..., Tensor]], Callable[[Head], Result]],
    *,
    compile_here: bool,
) -> list[Variant]:
    """Rivals in one kind of call, absent ones too."""
    variants = []
    for rival in found:
        absent = rival.missing(compile_here=compile_here)
        function = (lambda case: {}) if absent else run(rival.function())
        variants.append(Variant(rival.name, function, "rival", rival.version, rival.precision, absent))
    return variants


def head_variants(run: Callable[[rivals.Logprob], Callable[[Head], Result]], *, compile_here: bool) -> list[Variant]:
    """Every rival that gives log-probs, in one kind of call."""
    return rival_variants(rivals.HEAD, run, compile_here=compile_here)


def _case(name: str, op: str, preset: Preset, size: tuple[int, int, int], **fields) -> Case:
    rows, hidden, vocab = size
    count, trainable = fields.pop("count"), fields.pop("trainable", False)
    dtype = getattr(torch, preset.dtype)
    return Case(
        op=op,
        name=name,
        shape={"R": rows, "H": hidden, "V": vocab},
        dtype=dtype,
        device=DEVICE,
        inputs=make_head(rows, hidden, vocab, dtype, trainable=trainable),
        floor=products(count),
        floor_name=f"{('two', 'three')[count - 2]} bare mm",
        flops=2.0 * count * rows * hidden * vocab,
        **fields,
    )


def _ours(run: Callable[[Head], Result], name: str) -> Variant:
    return Variant(name, run, "ours", OURS)


def _mean_variants(everywhere: bool) -> list[Variant]:
    ours = _ours(mean_run(lambda *inputs: -linear_logprob(*inputs).mean()), "linear_logprob, mean")
    return [ours, *rival_variants(rivals.MEAN, mean_run, compile_here=everywhere)]


def _divergence_variants(everywhere: bool) -> list[Variant]:
    ours = _ours(divergence_run(ours_divergence), "fused_linear_divergence, mean")
    return [ours, *rival_variants(rivals.MEAN_DIVERGENCE, divergence_run, compile_here=everywhere)]


def _grpo_variants(everywhere: bool) -> list[Variant]:
    return [
        _ours(ours_fused(teacher=False), "fused_credit_loss"),
        *head_variants(clipped_run, compile_here=everywhere),
        *rival_variants(rivals.LIGER_GRPO, grpo_run, compile_here=everywhere),
    ]


def cases(preset: Preset) -> list[Case]:
    """The kinds of call at the main size, then the sweeps of the whole head."""
    size, main = KIND_SIZES[preset.name], SIZES[preset.name]
    everywhere = preset.name == "h100"  # on a CPU the compiler's time is spent on one kind of call
    ours = [_ours(logprob_run(linear_logprob), "linear_logprob")]
    paired = [_ours(ours_paired, "paired_linear_logprob"), *head_variants(paired_run, compile_here=everywhere)]
    found = [
        _case(
            "frozen head", "linear_logprob", preset, size, count=2, expected=expected_logprob(False, False),
            variants=ours + head_variants(logprob_run, compile_here=True),
        ),
        _case(
            "trainable head", "linear_logprob", preset, size, count=3, trainable=True,
            expected=expected_logprob(False, False),
            variants=ours + head_variants(logprob_run, compile_here=everywhere),
        ),
        _case(
            "mean cross-entropy, frozen head", "linear_logprob", preset, size, count=2,
            expected=expected_logprob(True, False), variants=_mean_variants(everywhere),
        ),
        _case(
            "student and teacher, frozen head", "paired_linear_logprob", preset, size, count=3,
            expected=expected_logprob(False, True), variants=paired,
        ),
        _case(
            "mean Jensen-Shannon, frozen head", "fused_linear_divergence", preset, size, count=3,
            expected=expected_divergence, variants=_divergence_variants(everywhere),
        ),
        _case(
            "no teacher, frozen head", "fused_credit_loss", preset, size, count=2, expected=expected_credit(False),
            variants=_grpo_variants(everywhere),
        ),
    ]  # fmt: skip
    rows, hidden, vocab = size
    sizes = dict.fromkeys([size])  # each once, in order; the longest last
    for part in SWEEP[preset.name]:
        sizes |= dict.fromkeys([(rows // part, hidden, vocab), (rows, hidden, vocab // part)])
    for one in sizes | {main: None}:
        variants = [_ours(ours_fused(teacher=True), "fused_credit_loss")]
        variants += head_variants(credit_run, compile_here=everywhere and one == main)
        found.append(
            _case(
                "credit and clipped loss, frozen head", "fused_credit_loss", preset, one, count=3,
                expected=expected_credit(True), variants=variants, rounds=3 if preset.name == "cpu" else None,
            )
        )  # fmt: skip
    return found


def test_head(case: Case, measured: Callable[[Case], object]) -> None:
    measured(case)
