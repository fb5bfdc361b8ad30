"""Which tensors the Triton kernels serve, and how large their GPU is. Triton is never imported before such a tensor
comes along."""

import importlib.util
from functools import cache

import torch
from torch import Tensor

INSTALLED = importlib.util.find_spec("triton") is not None
"""A constant: torch 2.11 cannot compile a function that looks for a module."""


def has_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels can run on `tensor`: it is on a CUDA device and Triton is installed (as it is with torch's
    CUDA wheels for Linux). Elsewhere the plain-torch path runs."""
    return tensor.is_cuda and INSTALLED


@cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 3 in the interpreter, so that a program there sees several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
