"""`sample_with_logprob`: the public function, its checks, and the one operator behind it.

`coars_kernels::sample_with_logprob` is the Triton kernels of `triton_sample.py` on a GPU; elsewhere, and where Triton
is not installed, `torch_sample.py`. Both draw the reference's noise. No gradients.
"""

import torch
from torch import Tensor

from coars_kernels.checks import INDEX_DTYPES, MATRIX_DTYPES, require, require_device, require_dtype, require_shape
from coars_kernels.dispatch import has_triton
from coars_kernels.sample_with_logprob.torch_sample import sample_with_logprob_torch


@torch.library.custom_op("coars_kernels::sample_with_logprob", mutates_args=())
def _sample(
    logits: Tensor, sequence_id: Tensor, position: Tensor, seed: int, seed_tensor: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    run = sample_with_logprob_torch
    if has_triton(logits):
        from coars_kernels.sample_with_logprob.triton_sample import sample_with_logprob_triton as run
    any_seed = seed if seed_tensor is None else seed_tensor
    return run(logits, seed=any_seed, sequence_id=sequence_id, position=position, temperature=temperature)


@_sample.register_fake
def _(logits: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits), dtype=torch.int64), logits.new_empty(len(logits), dtype=torch.float32)


@torch.no_grad()
def sample_with_logprob(
    logits: Tensor, *, seed: int | Tensor, sequence_id: Tensor, position: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Sample one token per row and return it with its exact log-probability, in nats.

    The noise is a pure function of (seed, sequence_id, position, vocabulary index): a sequence draws the same tokens
    whatever shares its batch, and an interrupted rollout resumes with the same draws (design, section 5). On a GPU two
    launches, which nothing waits for: a CUDA graph of them follows logits, ids, positions, and a seed that is a tensor.

    Args:
        logits: [B, V] fp32, bf16 or fp16; -inf forbids a token. Each row needs at least one finite logit.
        seed: any int, of which the low 64 bits count; or one int64 on the logits' device, shape [] or [1].
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
    seed_tensor = seed if isinstance(seed, Tensor) else None
    if seed_tensor is not None:
        require(seed_tensor.shape in ((), (1,)), "seed", f"expected one number, got shape {list(seed_tensor.shape)}")
        require_dtype(seed_tensor, "seed", (torch.int64,))
        require_device(seed_tensor, "seed", logits, "logits")
    # an operator's integers have 64 bits and a sign
    number = 0 if isinstance(seed, Tensor) else ((seed & 2**64 - 1) ^ 2**63) - 2**63
    return _sample(logits, sequence_id, position, number, seed_tensor, float(temperature))
