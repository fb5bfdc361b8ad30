"""Tokenizers of small models: `tiny_base`'s own, trained on the spot, and one with a catalogue's titles as tokens.

The trained one is a byte-level BPE with ChatML's special tokens, so small models go through the same token template as
Qwen's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from coars_fast.errors import ConfigError

if TYPE_CHECKING:
    from coars_fast.model.decoder import Decoder

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer (any text can be encoded) and wrap it for transformers.

    Args:
        texts: what to learn merges from; deterministic for the same texts in the same order.
        vocab_size: entries, of which 256 are bytes and three are special.

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
def add_titles(decoder: Decoder, tokenizer: Any, titles: Sequence[str], vectors: Tensor, like: Sequence[str]) -> Any:
    """Give a small model one more token for every title (with the space before it), in place.

    A new token starts among the tokens `like`, which the model already knows how to find and copy: the items' vectors,
    centred and of one length, are laid along the principal directions of `like`, as far from their mean as they are on
    average. Items that are alike thus look alike from the first step, and what the model does with the words that it
    knows it does with titles too. From random vectors neither was learned in an hour (docs/log.md).

    Args:
        decoder: the model; its embedding (and head, where they are not tied) grows.
        tokenizer: its fast tokenizer, left as it is.
        titles: I titles, all different.
        vectors: [I, D] of the items, for example SASRec's; at least two differ.
        like: words that the model names items with, one token each after a space.

    Returns:
        The tokenizer with the titles.

    Raises:
        ConfigError: a word of `like` is not one token, or a title already is.
    """
    rows = []
    for word in like:
        ids = tokenizer.encode(f" {word}", add_special_tokens=False)
        if len(ids) != 1:
            raise ConfigError(
                f"model.tokenizer: 'catalogue' needs a model that has a token for {word!r}, such as the shipped one or "
                "one made by python -m coars_fast.pretrain; other models read titles as they are: use own"
            )
        rows += ids
    grown = _copy(tokenizer)
    grown.add_tokens([AddedToken(f" {title}", normalized=False) for title in titles])
    if len(grown) != len(tokenizer) + len(titles):
        raise ConfigError("model.tokenizer: this model has titles as tokens already (a warm-started base); use own")
    centred = vectors.detach().float() - vectors.detach().float().mean(0)
    for module in _vocabulary_modules(decoder):
        weight = module.weight.float().cpu()
        known = weight[torch.tensor(rows)]
        mean = known.mean(0)
        directions = torch.linalg.svd(known - mean, full_matrices=False).Vh
        unit = nn.functional.normalize(_fewer_dimensions(centred, len(directions)), dim=1)
        distance = (known - mean).norm(dim=1).mean()
        placed = mean + distance * (unit @ directions[: unit.shape[1]])
        _set_vocabulary(module, torch.cat([weight[: len(tokenizer)], placed]).to(module.weight))
    decoder.config = replace(decoder.config, vocab_size=len(grown))
    return grown


def _fewer_dimensions(centred: Tensor, size: int) -> Tensor:
    """Centred vectors as they are, or along their `size` main directions where they have more dimensions."""
    if centred.shape[1] <= size:
        return centred
    return centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:size].T


def _copy(tokenizer: Any) -> Any:
    """Another tokenizer of the same content."""
    return type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
    )


def _vocabulary_modules(decoder: Decoder) -> list[nn.Embedding | nn.Linear]:
    """The embedding, and the head where it has weights of its own."""
    return [decoder.model.embed_tokens, *([decoder.lm_head] if decoder.lm_head is not None else [])]


def _set_vocabulary(module: nn.Embedding | nn.Linear, weight: Tensor) -> None:
    module.weight = nn.Parameter(weight)
    if isinstance(module, nn.Embedding):
        module.num_embeddings = len(weight)
    else:
        module.out_features = len(weight)
