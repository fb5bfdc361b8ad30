"""What `linear_logprob` means, in plain torch with full [R, V] logits: the specification, for tests and for reading."""

import torch
from torch import Tensor


def linear_logprob_reference(
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
    """Log-softmax of `(hidden @ weight.T + bias) / temperature` at `target`; the signature of `linear_logprob`.

    16-bit inputs are widened to fp32 first; float64 stays float64, for use as the yardstick. `chunk_rows` and `path`
    are ignored.
    """
    del chunk_rows, path
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits_RV = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits_RV = logits_RV + bias.to(dtype)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype)[:, None]
    log_softmax_RV = torch.log_softmax(logits_RV / temperature, dim=-1)
    logp_R = log_softmax_RV.gather(1, target[:, None]).squeeze(1)
    if not return_entropy:
        return logp_R
    detached_RV = log_softmax_RV.detach()
    entropy_R = -torch.where(detached_RV.isneginf(), 0.0, detached_RV.exp() * detached_RV).sum(-1)
    return logp_R, entropy_R
