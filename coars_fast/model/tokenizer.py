"""Byte-level BPE tokenizers trained on the spot: `tiny_base`'s own, and one for a catalogue's text.

They use ChatML's special tokens, so small models go through the same token template as Qwen's. `transplant` gives a
model a new tokenizer: a new token starts as the mean of the old tokens that spell it (fast vocabulary transfer, arXiv
2402.09977).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

if TYPE_CHECKING:
    from coars_fast.model.decoder import Decoder

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def train_tokenizer(texts: Iterable[str], vocab_size: int, titles: Sequence[str] = ()) -> Any:
    """Train a byte-level BPE tokenizer (any text can be encoded) and wrap it for transformers.

    Args:
        texts: what to learn merges from; deterministic for the same texts in the same order.
        vocab_size: entries learned from the texts, of which 256 are bytes and three are special.
        titles: each becomes one more token, with the space before it.

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
    tokenizer.add_tokens([AddedToken(f" {title}", normalized=False) for title in titles])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@torch.no_grad()
def transplant(decoder: Decoder, old: Any, new: Any, *, seed: int = 0) -> None:
    """Replace the embedding (and head) for the tokenizer `new`, in place.

    Tokens that both have keep their vectors. A learned token of `new` becomes the mean of the vectors of the `old`
    tokens that spell it; an added one (a whole title) a random vector of usual size: means of many are all alike.

    Args:
        decoder: a model whose embedding belongs to `old`.
        old, new: fast tokenizers.
        seed: of the random vectors.
    """
    old_vocab, added = old.get_vocab(), new.get_added_vocab()
    model = old.backend_tokenizer.model  # tokenizes text that is already in byte-level characters
    rows: list[list[int]] = []
    for token, _ in sorted(new.get_vocab().items(), key=lambda pair: pair[1]):
        if token in old_vocab:
            rows.append([old_vocab[token]])
        else:
            rows.append([] if token in added else [piece.id for piece in model.tokenize(token)])
    modules: list[nn.Embedding | nn.Linear] = [decoder.model.embed_tokens]
    if decoder.lm_head is not None:
        modules.append(decoder.lm_head)
    generator = torch.Generator().manual_seed(seed)
    for module in modules:
        weight = module.weight.float().cpu()
        made = torch.randn(len(rows), weight.shape[1], generator=generator) * weight.std()
        for row, ids in enumerate(rows):
            if ids:
                made[row] = weight[torch.tensor(ids)].mean(0)
        module.weight = nn.Parameter(made.to(module.weight))
        if isinstance(module, nn.Embedding):
            module.num_embeddings = len(rows)
        else:
            module.out_features = len(rows)
    decoder.config = replace(decoder.config, vocab_size=len(rows))
