"""Every operation that has Triton kernels, called once at small odd sizes: what a memory checker can watch.

    python -m bench.acceptance.small_calls

Sizes are no multiples of any tile, so that masks are at work. Results are only asked to be finite: that they are right
is the tests' matter. Add a call with every kernel that is added. On a CPU the plain-torch paths run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from coars_kernels import (
    PrefixGroups,
    agent_lora,
    branch_attention,
    credit_policy_loss,
    fused_credit_loss,
    linear_logprob,
    paged_decode_attention,
    paged_prefill_attention,
    sample_with_logprob,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, VOCAB, HIDDEN = 70, 1003, 100
Call = Callable[[], Tensor]


def head(path: str, dtype: torch.dtype) -> Call:
    """Student and teacher, loss and gradient."""

    def call() -> Tensor:
        weight = torch.randn(VOCAB, HIDDEN, device=DEVICE).to(dtype)
        student, teacher = (torch.randn(ROWS, HIDDEN, device=DEVICE).to(dtype) / HIDDEN**0.5 for _ in range(2))
        target = torch.randint(VOCAB, (ROWS,), device=DEVICE)
        behaviour = linear_logprob(student, weight, target, path=path)
        offsets = torch.tensor([0, 1, 30, 30, ROWS], device=DEVICE)
        student.requires_grad_()
        found = fused_credit_loss(
            student, teacher, weight, target, behaviour, torch.randn(4, device=DEVICE), offsets, path=path
        )
        found.loss.backward()
        assert student.grad is not None
        return student.grad

    return call


def head_with_entropy(path: str) -> Call:
    """Bias, entropy and a temperature for every row."""

    def call() -> Tensor:
        weight = torch.randn(VOCAB, HIDDEN, device=DEVICE)
        hidden = torch.randn(ROWS, HIDDEN, device=DEVICE, requires_grad=True)
        found = linear_logprob(
            hidden, weight, torch.randint(VOCAB, (ROWS,), device=DEVICE), bias=torch.randn(VOCAB, device=DEVICE),
            temperature=torch.rand(ROWS, device=DEVICE) + 0.5, return_entropy=True, path=path,
        )  # fmt: skip
        logp, entropy = found
        logp.sum().backward()
        assert hidden.grad is not None
        return hidden.grad.sum() + entropy.sum()

    return call


def loss(objective: str) -> Call:
    """Turns of many lengths, one of no tokens."""

    def call() -> Tensor:
        lengths = torch.tensor([0, 1, 300, 257, 3], device=DEVICE)
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        count = 561
        logp = -torch.rand(count, device=DEVICE)
        teacher, behaviour = (logp + 0.1 * torch.randn(count, device=DEVICE) for _ in range(2))
        logp.requires_grad_()
        found, _ = credit_policy_loss(
            logp, teacher, behaviour, torch.randn(5, device=DEVICE), offsets, objective=objective, credit_center=True
        )
        found.backward()
        assert logp.grad is not None
        return logp.grad

    return call


def paged(dtype: torch.dtype, *, prefill: bool, grouped: bool = False) -> Call:
    """Rows of no, few and many keys in pages of 16; a needed page beyond the first belongs to one row alone."""

    def call() -> Tensor:
        lengths = torch.tensor([70, 100, 0, 33], dtype=torch.int32, device=DEVICE)
        table = torch.arange(28, dtype=torch.int32, device=DEVICE).view(4, 7)
        table[:2, 0] = 0
        k_pages, v_pages = (torch.randn(28, 16, 2, 40, device=DEVICE).to(dtype) for _ in range(2))
        if prefill:
            bounds = torch.tensor([0, 5, 70, 70, 71], dtype=torch.int32, device=DEVICE)
            q = torch.randn(71, 6, 40, device=DEVICE).to(dtype)
            return paged_prefill_attention(q, k_pages, v_pages, table, bounds, lengths)
        offsets = torch.tensor([0, 2, 4], dtype=torch.int32, device=DEVICE)
        groups = PrefixGroups(offsets, torch.tensor([16, 0], dtype=torch.int32, device=DEVICE)) if grouped else None
        q = torch.randn(4, 6, 40, device=DEVICE).to(dtype)
        return paged_decode_attention(q, k_pages, v_pages, table, lengths, prefix_groups=groups)

    return call


def branches(dtype: torch.dtype) -> Call:
    """Branches of many, one and no tokens, one of them without a trunk."""

    def call() -> Tensor:
        q = torch.randn(71, 6, 40, device=DEVICE).to(dtype)
        own, trunk = (torch.randn(2, rows, 2, 40, device=DEVICE).to(dtype) for rows in (71, 133))
        numbers = ([0, 70, 70, 71], [0, 0, 100], [99, 133, 0])
        return branch_attention(q, *own, *trunk, *(torch.tensor(n, device=DEVICE).int() for n in numbers))

    return call


def sample(dtype: torch.dtype, temperature: float) -> Call:
    """A last slab that is nearly empty."""

    def call() -> Tensor:
        logits, ids = torch.randn(7, 3 * 1024 + 1, device=DEVICE).to(dtype), torch.arange(7, device=DEVICE)
        token, logp = sample_with_logprob(logits, seed=1, sequence_id=ids, position=ids, temperature=temperature)
        return logp + token

    return call


def adapters(dtype: torch.dtype) -> Call:
    """Rows of two agents and of none."""

    def call() -> Tensor:
        x, a, b = torch.randn(37, 301, device=DEVICE), torch.randn(2, 5, 301), torch.randn(2, 203, 5)
        ids = torch.arange(37, device=DEVICE) % 3 - 1
        with torch.no_grad():
            return agent_lora(x.to(dtype), a.to(DEVICE, dtype), b.to(DEVICE, dtype), ids, 2.0)

    return call


def calls() -> dict[str, Call]:
    """By name."""
    paths = ("library", "fused") if DEVICE == "cuda" else ("auto",)
    dtypes = (torch.bfloat16, torch.float32)
    found = {f"head, {path}, {dtype}": head(path, dtype) for path in paths for dtype in dtypes}
    found |= {f"head with entropy, {path}": head_with_entropy(path) for path in paths}
    found |= {f"loss, {objective}": loss(objective) for objective in ("faithful", "clipped", "cispo", "gspo")}
    for dtype in dtypes:
        found |= {f"paged {what}, {dtype}": paged(dtype, prefill=what == "prefill") for what in ("decode", "prefill")}
        found[f"paged decode with groups, {dtype}"] = paged(dtype, prefill=False, grouped=True)
        found[f"branches, {dtype}"] = branches(dtype)
        found |= {f"sample, {dtype}, temperature {heat}": sample(dtype, heat) for heat in (0.0, 0.7)}
        found[f"adapters of few rows, {dtype}"] = adapters(dtype)
    return found


def main() -> None:
    torch.manual_seed(0)
    for name, call in calls().items():
        found = call()
        finite = bool(torch.isfinite(found).all())  # waits for the GPU
        assert finite, f"{name}: not finite"
        print(f"called: {name}", flush=True)


if __name__ == "__main__":
    main()
