"""What `paired_linear_logprob` means: two calls of `linear_logprob`'s reference, the teacher's without gradient."""

import torch
from torch import Tensor

from coars_kernels.linear_logprob.reference import linear_logprob_reference


def paired_linear_logprob_reference(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    chunk_rows: int | None = None,
    path: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(logp, teacher_logp); the signature of `paired_linear_logprob`. `chunk_rows` and `path` are ignored."""
    del chunk_rows, path
    logp = linear_logprob_reference(student, weight, target, bias=bias, temperature=temperature)
    with torch.no_grad():
        teacher_logp = linear_logprob_reference(teacher, weight, target, bias=bias, temperature=temperature)
    assert isinstance(logp, Tensor) and isinstance(teacher_logp, Tensor)
    return logp, teacher_logp
