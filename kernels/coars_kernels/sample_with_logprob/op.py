"""`sample_with_logprob`: the public function and its checks."""

import torch
from torch import Tensor

from coars_kernels.checks import INDEX_DTYPES, MATRIX_DTYPES, require, require_device, require_dtype, require_shape
from coars_kernels.sample_with_logprob.torch_sample import sample_with_logprob_torch


@torch.no_grad()
def sample_with_logprob(
    logits: Tensor, *, seed: int, sequence_id: Tensor, position: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Sample one token per row and return it with its exact log-probability, in nats.

    The noise is a pure function of (seed, sequence_id, position, vocabulary index): a sequence draws the same tokens
    whatever shares its batch, and an interrupted rollout resumes with the same draws (design, section 5).

    Args:
        logits: [B, V] fp32, bf16 or fp16; -inf forbids a token. Each row needs at least one finite logit.
        seed: any int; its low 64 bits count.
        sequence_id: [B] int64 (or int32): a number of its own for each sequence, over the whole run.
        position: [B] int64 (or int32): index of the sampled token in its sequence; the low 32 bits count.
        temperature: 0 takes the most likely token (the first of equals); above 0 divides the logits.

    Returns:
        token [B] int64, and logp [B] fp32: its log-probability under softmax(logits / temperature), computed in fp32;
        for temperature 0, under softmax(logits).

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range; the message begins with its name.
    """
    require(logits.dim() == 2, "logits", f"expected [B, V], got shape {list(logits.shape)}")
    require(logits.shape[1] > 0, "logits", "the vocabulary is empty")
    require_dtype(logits, "logits", MATRIX_DTYPES)
    for argument, tensor in (("sequence_id", sequence_id), ("position", position)):
        require_shape(tensor, argument, (logits.shape[0],))
        require_dtype(tensor, argument, INDEX_DTYPES)
        require_device(tensor, argument, logits, "logits")
    require(0.0 <= temperature < float("inf"), "temperature", f"must be finite and at least 0, got {temperature}")
    return sample_with_logprob_torch(
        logits, seed=seed, sequence_id=sequence_id.long(), position=position.long(), temperature=float(temperature)
    )
