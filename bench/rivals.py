"""What other people use, by name and version, as variants of the cases that each fits.

A rival that cannot run here stays in the table: `absent` with the reason (not installed, needs a GPU, does another
thing). Importing one never fails the run. `pip install -e '.[bench]'` brings those that run anywhere, `.[bench-gpu]`
the ones for GPUs.

Head rivals compute log-probs [R] from (hidden [R, H], weight [V, H], target [R]); `HEAD` lists them, and every head
case builds its variants from the list, so that all cases show the same names.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import FULL, SIXTEEN_BIT_LOGITS
from coars_kernels.linear_logprob.sweep import choose_chunk_rows

Logprob = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [R, H], weight [V, H], target [R]) -> log-probs [R], differentiable."""
MeanLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The same arguments -> mean negative log-prob."""
TRL_CHUNK = 32768
"""Vocabulary entries per tile: what TRL's trainers pass."""


@dataclass(frozen=True)
class Rival:
    """Something that computes (parts of) a head.

    Args:
        name: shown in tables.
        package: distribution whose version is shown.
        load: imports it and returns the function; called once, on first use.
        needs_gpu: it has no CPU path.
        compiles: it goes through `torch.compile`.
        precision: what its results are held to.
    """

    name: str
    package: str
    load: Callable[[], Logprob]
    needs_gpu: bool = False
    compiles: bool = False
    precision: str = FULL

    @property
    def version(self) -> str:
        """Name and version of the distribution."""
        try:
            return f"{self.package} {importlib.metadata.version(self.package)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{self.package}, not installed"

    def missing(self, *, compile_here: bool = True) -> str:
        """Why it cannot run here; empty if it can."""
        if self.needs_gpu and not torch.cuda.is_available():
            return "needs a CUDA device"
        if self.compiles and not compile_here:
            return "left out here: compiling takes longer than the preset allows"
        return _loaded(self)[1]

    def function(self) -> Logprob:
        """What it computes with; only where `missing` is empty."""
        function = _loaded(self)[0]
        assert function is not None
        return function


@cache
def _loaded(rival: Rival) -> tuple[Logprob | None, str]:
    try:
        return rival.load(), ""
    except ImportError as error:
        top = (error.name or "").split(".")[0]
        extra = "bench-gpu" if rival.needs_gpu else "bench"
        return (
            None,
            f"not installed: no module {top}; pip install -e '.[{extra}]'" if top else f"import failed: {error}",
        )
    # A rival's import may fail in any way on a machine that it was not made for; the run goes on without it.
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        return None, f"import failed: {type(error).__name__}: {text[0][:120]}"


# ------------------------------------------------------------------------------------------------------------- loading


def eager_log_softmax(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Logits, log_softmax in fp32, gather."""
    logits = F.linear(hidden, weight).float()
    return torch.log_softmax(logits, -1).gather(1, target[:, None])[:, 0]


def eager_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Logits and cross-entropy, as TRL and verl compute log-probs without their fused paths."""
    return -F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="none")


def eager_mean(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Logits and mean cross-entropy."""
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` of a function, once for all cases; shapes may change."""
    return torch.compile(function, dynamic=None)


def _torch_linear_cross_entropy(reduction: str, *, large_chunks: bool) -> Callable[[], Logprob]:
    """With the chunks that torch chooses, some dozens of rows, or with those that we take."""

    def load() -> Logprob:
        make_options = torch.nn.LinearCrossEntropyOptions  # not before torch 2.13

        def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            rows = {"batch_chunk_size": choose_chunk_rows(weight)} if large_chunks else {}
            options = make_options(**rows)
            return F.linear_cross_entropy(hidden, weight, target, reduction=reduction, options=options).float()

        return (lambda *inputs: -loss(*inputs)) if reduction == "none" else loss

    return load


def _trl() -> Logprob:
    importlib.import_module("trl.trainer.utils")  # its backward pass imports it
    function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return function.apply(hidden, weight, None, target, 1.0, TRL_CHUNK, None, 1.0, ())[0]

    return logprob


def _cut_cross_entropy(implementation: str) -> Callable[[], Logprob]:
    def load() -> Logprob:
        function = importlib.import_module("cut_cross_entropy").linear_cross_entropy

        def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            return -function(hidden, weight, target, reduction="none", impl=implementation)

        return logprob

    return load


def _quack() -> Logprob:
    function = importlib.import_module("quack.linear_cross_entropy").linear_cross_entropy_func
    return lambda hidden, weight, target: -function(hidden, weight, None, target, reduction="none").float()


def _quack_mean() -> MeanLoss:
    function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda hidden, weight, target: function(hidden, weight, target, reduction="mean")


def _liger_mean() -> MeanLoss:
    function = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return lambda hidden, weight, target: function(hidden, weight, target, reduction="mean")


def _fla_mean() -> MeanLoss:
    function = importlib.import_module("fla.modules.fused_linear_cross_entropy").fused_linear_cross_entropy_loss
    return lambda hidden, weight, target: function(hidden, target, weight)


HEAD: Sequence[Rival] = (
    Rival("eager log_softmax", "torch", lambda: eager_log_softmax, precision=SIXTEEN_BIT_LOGITS),
    Rival("eager cross_entropy", "torch", lambda: eager_cross_entropy, precision=SIXTEEN_BIT_LOGITS),
    Rival(
        "torch.compile", "torch", lambda: compiled(eager_log_softmax), compiles=True, precision=SIXTEEN_BIT_LOGITS
    ),
    Rival(
        "torch linear_cross_entropy", "torch", _torch_linear_cross_entropy("none", large_chunks=False),
        precision=SIXTEEN_BIT_LOGITS,
    ),
    Rival(
        "torch linear_cross_entropy, larger chunks", "torch", _torch_linear_cross_entropy("none", large_chunks=True),
        precision=SIXTEEN_BIT_LOGITS,
    ),
    Rival("TRL chunked log-prob", "trl", _trl, precision=SIXTEEN_BIT_LOGITS),
    Rival(
        "cut-cross-entropy", "cut-cross-entropy", _cut_cross_entropy("cce"), needs_gpu=True,
        precision=SIXTEEN_BIT_LOGITS,
    ),
    Rival(
        "cut-cross-entropy, its torch.compile", "cut-cross-entropy", _cut_cross_entropy("torch_compile"), compiles=True,
        precision=SIXTEEN_BIT_LOGITS,
    ),
    Rival("quack cross_entropy", "quack-kernels", _quack, needs_gpu=True, precision=SIXTEEN_BIT_LOGITS),
)  # fmt: skip
"""Per-token log-probs, so any per-token loss."""

MEAN: Sequence[Rival] = (
    Rival("eager cross_entropy", "torch", lambda: eager_mean, precision=SIXTEEN_BIT_LOGITS),
    Rival("torch.compile", "torch", lambda: compiled(eager_mean), compiles=True, precision=SIXTEEN_BIT_LOGITS),
    Rival(
        "torch linear_cross_entropy", "torch", _torch_linear_cross_entropy("mean", large_chunks=False),
        precision=SIXTEEN_BIT_LOGITS,
    ),
    Rival(
        "torch linear_cross_entropy, larger chunks", "torch", _torch_linear_cross_entropy("mean", large_chunks=True),
        precision=SIXTEEN_BIT_LOGITS,
    ),
    Rival(
        "Liger fused linear cross-entropy", "liger-kernel", _liger_mean, needs_gpu=True,
        precision=SIXTEEN_BIT_LOGITS,
    ),
    Rival(
        "quack chunked linear_cross_entropy", "quack-kernels", _quack_mean, needs_gpu=True,
        precision=SIXTEEN_BIT_LOGITS,
    ),
    Rival(
        "flash-linear-attention fused linear cross-entropy", "flash-linear-attention", _fla_mean,
        needs_gpu=True, precision=SIXTEEN_BIT_LOGITS,
    ),
)  # fmt: skip
"""Mean cross-entropy only: their gradients are made in the forward pass for a loss that is that mean."""


def _liger_grpo(*, turns: int, compiled: bool) -> Callable[[], Callable[..., Tensor]]:
    def load() -> Callable[..., Tensor]:
        loss = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
        made = loss(beta=0.0, compiled=compiled, use_ref_model=False, chunk_size=turns, loss_type="grpo")

        def grpo(hidden: Tensor, weight: Tensor, target: Tensor, behaviour_logp: Tensor, reward: Tensor) -> Tensor:
            """Turns of one length are the rows of its batch, [M, T]."""
            num_turns = reward.shape[0]
            mask = torch.ones(num_turns, target.shape[0] // num_turns, device=hidden.device)
            found = made(
                hidden.view(num_turns, -1, hidden.shape[1]),
                weight,
                target.view(num_turns, -1),
                mask,
                reward,
                old_per_token_logps=behaviour_logp.view(num_turns, -1),
            )
            return found[0]

        return grpo

    return load


LIGER_GRPO: Sequence[Rival] = (
    Rival(
        "Liger fused linear GRPO", "liger-kernel", _liger_grpo(turns=1, compiled=False), precision=SIXTEEN_BIT_LOGITS
    ),
    Rival(
        "Liger fused linear GRPO, 8 turns a chunk", "liger-kernel", _liger_grpo(turns=8, compiled=False),
        precision=SIXTEEN_BIT_LOGITS,
    ),
    Rival(
        "Liger fused linear GRPO, its torch.compile", "liger-kernel", _liger_grpo(turns=1, compiled=True),
        compiles=True, precision=SIXTEEN_BIT_LOGITS,
    ),
)  # fmt: skip
"""Sequence advantages only, so they fit a case without a teacher whose turns have one length. One turn a chunk is its
default, and so is its own compilation."""


def _liger_jsd() -> Callable[..., Tensor]:
    loss = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
    made = loss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False)

    def divergence(student: Tensor, teacher: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return made(student, weight, teacher, weight, target)

    return divergence


def eager_jensen_shannon(student: Tensor, teacher: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Both logits, then the mean divergence."""
    del target
    log_p, log_t = (torch.log_softmax(F.linear(hidden, weight).float(), -1) for hidden in (student, teacher))
    log_m = torch.logaddexp(log_p, log_t) - math.log(2.0)
    return (log_p.exp() * (log_p - log_m) + log_t.exp() * (log_t - log_m)).sum(-1).mean() / 2


MEAN_DIVERGENCE: Sequence[Rival] = (
    Rival("eager, full logits", "torch", lambda: eager_jensen_shannon, precision=SIXTEEN_BIT_LOGITS),
    Rival(
        "torch.compile", "torch", lambda: compiled(eager_jensen_shannon), compiles=True, precision=SIXTEEN_BIT_LOGITS
    ),
    Rival("Liger fused linear JSD", "liger-kernel", _liger_jsd, precision=SIXTEEN_BIT_LOGITS),
)
"""Mean Jensen-Shannon divergence of student and teacher, (student, teacher, weight, target) -> scalar."""
