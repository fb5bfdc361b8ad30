"""One matrix on a CPU, multiplied again and again by few rows.

A product with few rows spends much of its time on laying the matrix out for the processor. oneDNN can keep a large one
laid out: on the machine of docs/rollout.md 1.2 to 1.6 times as fast as `torch.mm` at 64 rows, and no slower at
thousands. For a small one the call itself costs more than that.
"""

from __future__ import annotations

import torch
from torch import Tensor

PACK_FROM = 2**18
"""Elements of a matrix from which it is kept laid out."""
ROWS = 64
"""For so many rows."""


class Product:
    """x @ weight.T for float32 on a CPU.

    Args:
        weight: [O, in].
    """

    def __init__(self, weight: Tensor):
        self._packed = None
        if weight.numel() >= PACK_FROM and torch.backends.mkldnn.is_available():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        else:
            self._plain = weight.T

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, in] -> [N, O]."""
        if self._packed is None:
            return torch.mm(x, self._plain)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")

    def into(self, out: Tensor, x: Tensor) -> None:
        """Into out [N, O]."""
        if self._packed is None:
            torch.mm(x, self._plain, out=out)
        else:
            out.copy_(self(x))

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """Add to out [N, O]."""
        if self._packed is None:
            out.addmm_(x, self._plain)
        else:
            out.add_(self(x))
