"""Which tensors the Triton kernels serve. Triton is never imported before such a tensor comes along."""

import importlib.util
from functools import cache

from torch import Tensor


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def has_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels can run on `tensor`: it is on a CUDA device and Triton is installed (as it is with torch's
    CUDA wheels for Linux). Elsewhere the plain-torch path runs."""
    return tensor.is_cuda and _installed()
