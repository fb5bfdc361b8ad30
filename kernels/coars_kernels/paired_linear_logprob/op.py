"""`paired_linear_logprob`: the public function. The sweep is `linear_logprob`'s, with two rows per token."""

from torch import Tensor

from coars_kernels.checks import require_device, require_dtype, require_shape
from coars_kernels.linear_logprob.autograd import head_logprob
from coars_kernels.linear_logprob.op import check_head_inputs


def paired_linear_logprob(
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
    """Log-probabilities of the same targets under the student's and the teacher's hidden states (Eq. 10), in nats.

    Values are those of two calls of `linear_logprob`, to the last bit on one path with one chunk size. No gradient
    reaches `teacher`, nor `weight` through the teacher.

    Args:
        student: [R, H] fp32, bf16 or fp16 hidden states with gradient.
        teacher: [R, H], same dtype: hidden states that predict the same targets, in the same order.
        weight: [V, H], the head in the same dtype.
        target: [R] int64, token ids in [0, V). The range is checked on CPU only.
        bias: [V] floating, or None.
        temperature: positive float, or a [R] floating tensor.
        chunk_rows, path: as in `linear_logprob`.

    Returns:
        (logp, teacher_logp), both [R] fp32; the second never requires grad.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range; the message begins with its name.
    """
    check_head_inputs(student, "student", weight, target, bias, temperature, chunk_rows, path)
    require_shape(teacher, "teacher", tuple(student.shape))
    require_dtype(teacher, "teacher", (student.dtype,))
    require_device(teacher, "teacher", student, "student")
    logp, teacher_logp, _ = head_logprob(student, teacher, weight, bias, target, temperature, chunk_rows, path)
    assert teacher_logp is not None
    return logp, teacher_logp
