"""`linear_logprob`: the public function, its checks, and the sweep over the head behind it."""

from typing import Literal, overload

import torch
from torch import Tensor

from coars_kernels.checks import (
    MATRIX_DTYPES,
    require,
    require_device,
    require_dtype,
    require_range,
    require_shape,
    values_are_visible,
)
from coars_kernels.dispatch import has_triton
from coars_kernels.linear_logprob.autograd import head_logprob
from coars_kernels.linear_logprob.sweep import PATHS


def check_head_inputs(
    hidden: Tensor,
    hidden_name: str,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    chunk_rows: int | None,
    path: str,
) -> None:
    """The checks that every operation on the head shares; raises `ValueError` naming the argument."""
    require(hidden.dim() == 2, hidden_name, f"expected [R, H], got shape {list(hidden.shape)}")
    require_dtype(hidden, hidden_name, MATRIX_DTYPES)
    num_rows, hidden_size = hidden.shape
    require(weight.dim() == 2, "weight", f"expected [V, H], got shape {list(weight.shape)}")
    require(weight.shape[0] > 0, "weight", "the vocabulary is empty")
    require(weight.shape[1] == hidden_size, "weight", f"expected [V, {hidden_size}], got {list(weight.shape)}")
    require_dtype(weight, "weight", (hidden.dtype,))
    require_shape(target, "target", (num_rows,))
    require_dtype(target, "target", (torch.int64,))
    require_range(target, "target", 0, weight.shape[0])
    if bias is not None:
        require_shape(bias, "bias", (weight.shape[0],))
        require(bias.is_floating_point(), "bias", f"expected a floating dtype, got {bias.dtype}")
        require_device(bias, "bias", hidden, hidden_name)
    require_device(weight, "weight", hidden, hidden_name)
    if has_triton(weight):
        require(weight.stride(1) == 1, "weight", "its rows must be contiguous; call .contiguous() once")
    require_device(target, "target", hidden, hidden_name)
    if isinstance(temperature, Tensor):
        require_shape(temperature, "temperature", (num_rows,))
        require(temperature.is_floating_point(), "temperature", f"expected a floating dtype, got {temperature.dtype}")
        require(not temperature.requires_grad, "temperature", "is not differentiable; detach it")
        require_device(temperature, "temperature", hidden, hidden_name)
        positive = not values_are_visible(temperature) or bool((temperature > 0).all())
        require(positive, "temperature", "every value must be above 0")
    else:
        require(0.0 < temperature < float("inf"), "temperature", f"must be positive and finite, got {temperature}")
    require(chunk_rows is None or chunk_rows >= 1, "chunk_rows", f"must be at least 1, got {chunk_rows}")
    require(path in PATHS, "path", f"expected one of {', '.join(PATHS)}, got {path!r}")
    if path == "fused":
        require(has_triton(weight), "path", f"fused needs Triton and a CUDA device, weight is on {weight.device}")


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    return_entropy: Literal[False] = False,
    chunk_rows: int | None = None,
    path: str = "auto",
) -> Tensor: ...


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    return_entropy: Literal[True],
    chunk_rows: int | None = None,
    path: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    chunk_rows: int | None = None,
    path: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target token under softmax((hidden @ weight.T + bias) / temperature), in nats.

    Full logits [R, V] are never stored (probabilities are on a CPU, for a trainable head, where they fit into 64 MiB).
    Differentiable in `hidden`, and in `weight` and `bias` where they require grad. With a frozen head the backward pass
    is one multiplication, whatever the loss (design, section 5).

    Args:
        hidden: [R, H] fp32, bf16 or fp16: the hidden states that predict the targets, after the final norm. R may be 0.
        weight: [V, H], the head in `hidden`'s dtype. No padded vocabulary rows, or a `bias` of -inf on them.
        target: [R] int64, token ids in [0, V). The range is checked on CPU only.
        bias: [V] floating, or None; -inf forbids a token.
        temperature: positive float, or a [R] floating tensor, one value per row (no gradient).
        return_entropy: also return the entropy of each row's distribution.
        chunk_rows: rows whose logits exist at one time; by default `sweep.default_chunk_rows`.
        path: on a CUDA device `library` (library product and row kernel), `fused` (one Triton product that keeps no
            logits; needs Triton), or `auto`, the one that was measured to be faster there. A CPU has one path.

    Returns:
        logp [R] fp32 (-inf for a forbidden target), or (logp, entropy), entropy [R] fp32 in nats. The entropy is a
        value without gradient: backpropagating through it raises `RuntimeError`; detach it before logging or storing.
        It costs a second chunk buffer.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range; the message begins with its name.
    """
    check_head_inputs(hidden, "hidden", weight, target, bias, temperature, chunk_rows, path)
    logp, _, entropy = head_logprob(hidden, None, weight, bias, target, temperature, chunk_rows, path, return_entropy)
    return logp if entropy is None else (logp, entropy)
