"""Sampling a token and its log-prob from logits: against what generation loops do.

    python -m pytest bench/test_sample_with_logprob.py

On a GPU ours is the Triton kernels, and the plain torch that a CPU takes stands beside them. The floor is memory
traffic: the logits read once, at the bandwidth of a copy in the same run. Rivals draw from the device's own generator,
so their tokens depend on the batch; each variant's log-probs are checked for its own tokens. Left out: filters (top-k,
top-p), which training must not use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import rivals
from bench.harness import Case, Result, Variant
from bench.presets import Preset
from coars_kernels import __version__, sample_with_logprob
from coars_kernels.sample_with_logprob.torch_sample import sample_with_logprob_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {
    "smoke": ((16, 4096),),
    "cpu": ((16, 32000), (64, 32000), (128, 32000), (64, 4000), (64, 8000)),
    "h100": ((1, 152064), (8, 152064), (64, 152064), (256, 152064)),
}


@dataclass
class Logits:
    logits: Tensor
    sequence: Tensor
    position: Tensor


def make_logits(batch: int, vocab: int, dtype: torch.dtype) -> Callable[[int], Logits]:
    def make(seed: int) -> Logits:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        logits = (3 * torch.randn(batch, vocab, generator=generator, device=DEVICE)).to(dtype)
        ids = torch.arange(batch, device=DEVICE)
        return Logits(logits, ids, ids + 100 * seed)

    return make


def ours(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Logits], Result]:
    def run(case: Logits) -> Result:
        token, logp = function(case.logits, seed=1, sequence_id=case.sequence, position=case.position)
        return {"logp": logp, "token": token}

    return run


@torch.no_grad()
def multinomial(case: Logits) -> Result:
    """softmax, multinomial, log_softmax, gather: as transformers' generate and most trainers."""
    logits = case.logits.float()
    token = torch.multinomial(torch.softmax(logits, -1), 1)
    return {"logp": torch.log_softmax(logits, -1).gather(1, token)[:, 0], "token": token[:, 0]}


def exponential_race(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Gumbel-max by an exponential race, as nano-vllm and vLLM draw; log-prob from log_softmax."""
    logp = torch.log_softmax(logits.float(), -1)
    token = (logp.exp() / torch.empty_like(logp).exponential_(1)).argmax(-1)
    return token, logp.gather(1, token[:, None])[:, 0]


@torch.no_grad()
def race(function: Callable[[Tensor], tuple[Tensor, Tensor]], case: Logits) -> Result:
    token, logp = function(case.logits)
    return {"logp": logp, "token": token}


@torch.no_grad()
def gumbel(case: Logits) -> Result:
    """Gumbel-max with explicit noise, cross-entropy for the log-prob."""
    logits = case.logits.float()
    token = (logits - torch.rand_like(logits).clamp_(min=1e-20).log_().neg_().log_()).argmax(-1)
    return {"logp": -F.cross_entropy(logits, token, reduction="none"), "token": token}


def expected(case: Logits, result: Result) -> dict[str, tuple[Tensor | None, Tensor]]:
    exact = torch.log_softmax(case.logits.double(), -1).gather(1, result["token"][:, None])[:, 0]
    return {"logp": (None, exact)}


def cases(preset: Preset) -> list[Case]:
    dtype = torch.float32
    absent = "" if preset.compile_everywhere else "left out here: compiling takes longer than the preset allows"
    found = []
    for batch, vocab in SIZES[preset.name]:
        variants = [
            Variant("sample_with_logprob", ours(sample_with_logprob), "ours", f"coars_kernels {__version__}"),
            Variant("multinomial and log_softmax", multinomial),
            Variant("exponential race and log_softmax", lambda case: race(exponential_race, case)),
            Variant("Gumbel noise and cross_entropy", gumbel),
            Variant(
                "torch.compile, exponential race",
                lambda case: race(rivals.compiled(exponential_race), case),
                absent=absent,
            ),
        ]
        if DEVICE == "cuda":
            plain = ours(sample_with_logprob_torch)
            variants.insert(1, Variant("the same in plain torch", plain, "ours", f"coars_kernels {__version__}"))
        case = Case(
            op="sample_with_logprob", name="one token a row", shape={"B": batch, "V": vocab}, dtype=dtype,
            device=DEVICE, inputs=make_logits(batch, vocab, dtype), variants=variants, expected=expected,
            by_result=True, num_bytes=1.0 * dtype.itemsize * batch * vocab, rounds=3 * preset.rounds,
        )  # fmt: skip
        found.append(case)
    return found


def test_sample_with_logprob(case: Case, measured: Callable[[Case], object]) -> None:
    measured(case)
