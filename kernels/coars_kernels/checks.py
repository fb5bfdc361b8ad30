"""Input checks shared by the operations: every failure is a `ValueError` that begins with the argument's name.

Shapes, dtypes and devices are always checked. Values (indices in range, offsets that ascend, rewards that are numbers)
are checked on CPU, where looking at them is cheap; on a GPU it would stall the stream, so there it is done inside
`checked_values()` only. Under `torch.compile` it would break the graph, and is never done.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_CHECK_GPU_VALUES: ContextVar[bool] = ContextVar("check_gpu_values", default=False)


@contextmanager
def checked_values() -> Iterator[None]:
    """Check values on GPUs too, for debugging: each call of an operation then waits for the device.

    Example:
        with coars_kernels.checked_values():
            logp = coars_kernels.linear_logprob(hidden, weight, target)  # a target out of range is a ValueError
    """
    token = _CHECK_GPU_VALUES.set(True)
    try:
        yield
    finally:
        _CHECK_GPU_VALUES.reset(token)


INDEX_DTYPES = (torch.int32, torch.int64)
MATRIX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def require(condition: bool, argument: str, message: str) -> None:
    """Raise `ValueError("<argument>: <message>")` unless `condition` holds."""
    if not condition:
        raise ValueError(f"{argument}: {message}")


def values_are_visible(tensor: Tensor) -> bool:
    """Whether to look at `tensor`'s values (see the module docstring)."""
    return not torch.compiler.is_compiling() and (tensor.device.type == "cpu" or _CHECK_GPU_VALUES.get())


def require_shape(tensor: Tensor, argument: str, shape: tuple[int, ...]) -> None:
    """Raise unless `tensor` has exactly this shape."""
    require(tuple(tensor.shape) == shape, argument, f"expected shape {list(shape)}, got {list(tensor.shape)}")


def require_dtype(tensor: Tensor, argument: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise unless `tensor`'s dtype is one of `dtypes`."""
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{argument}: expected dtype {names}, got {tensor.dtype}")


def require_device(tensor: Tensor, argument: str, other: Tensor, other_name: str) -> None:
    """Raise unless both tensors live on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{argument}: on {tensor.device}, but {other_name} is on {other.device}")


def require_range(tensor: Tensor, argument: str, low: int, high: int) -> None:
    """Raise if a value lies outside [low, high); looks at values where that is cheap."""
    if tensor.numel() and values_are_visible(tensor):
        smallest, largest = (int(value) for value in torch.aminmax(tensor))
        inside = low <= smallest and largest < high
        require(inside, argument, f"values must lie in [{low}, {high}), got {smallest}..{largest}")
