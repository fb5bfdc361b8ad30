"""Byte-level BPE tokenizers trained on the spot: `tiny_base`'s own, and one for a catalogue's text.

They use ChatML's special tokens, so small models go through the same token template as Qwen's. `transplant` gives a
model a new tokenizer: each new token starts as the mean of the old tokens that spell it (fast vocabulary transfer,
arXiv 2402.09977).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

if TYPE_CHECKING:
    from coars_fast.model.decoder import Decoder

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer (any text can be encoded) and wrap it for transformers.

    Args:
        texts: what to learn merges from; deterministic for the same texts in the same order.
        vocab_size: entries in all, of which 256 are bytes and three are special.

    Returns:
        A `transformers.PreTrainedTokenizerFast` with `<|im_end|>` as end of sequence.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@torch.no_grad()
def transplant(decoder: Decoder, old: Any, new: Any) -> None:
    """Replace the embedding (and head) for the tokenizer `new`, in place.

    Args:
        decoder: a model whose embedding belongs to `old`.
        old, new: fast tokenizers; special tokens of the same name keep their vectors, every other token of `new`
            becomes the mean of the vectors of the `old` tokens that spell its text.
    """
    old_vocab = old.get_vocab()
    model = old.backend_tokenizer.model  # tokenizes text that is already in byte-level characters
    rows = []
    for token, _ in sorted(new.get_vocab().items(), key=lambda pair: pair[1]):
        ids = [old_vocab[token]] if token in old_vocab else [t.id for t in model.tokenize(token)]
        rows.append(ids or [0])
    modules: list[nn.Embedding | nn.Linear] = [decoder.model.embed_tokens]
    if decoder.lm_head is not None:
        modules.append(decoder.lm_head)
    for module in modules:
        weight = torch.stack([module.weight[torch.tensor(ids)].float().mean(0) for ids in rows])
        module.weight = nn.Parameter(weight.to(module.weight.dtype))
        if isinstance(module, nn.Embedding):
            module.num_embeddings = len(rows)
        else:
            module.out_features = len(rows)
    decoder.config = replace(decoder.config, vocab_size=len(rows))
