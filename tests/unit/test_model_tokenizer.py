"""Tokenizers trained on the spot, and a catalogue's titles as tokens of a model that has never read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from coars_fast.errors import ConfigError
from coars_fast.game.template import TextCodec, make_template
from coars_fast.model.attention import PackedAttention
from coars_fast.model.decoder import Decoder, DecoderConfig
from coars_fast.model.load import load_tokenizer
from coars_fast.model.tokenizer import add_titles, train_tokenizer

WORDS = ("Grimheist", "Softstar", "Sillymoss", "Grandrace", "Strangegoal")
"""One token each after a space; five words lie along four directions."""
TEXTS = [*(f" {word} Club" for word in WORDS), "History: it\nCandidates: it; it\nReason: likes it.\nItem: it"] * 20
TITLES = (
    "Toy Story (1995)", "Heat", "Heat 2", "The Heat", "Heat; Dust", "Heater", "C++ (.*)?[a-z]+\\d$^|", "Club",
    'The "Quoted" One', "It's Café Noir, Ünder", "東京物語", "<|im_end|>",
)  # fmt: skip
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 0}


def small(vocab_size: int, tied: bool = True) -> Decoder:
    config = DecoderConfig(
        family="qwen3", vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2,
        num_kv_heads=1, head_dim=8, tie_word_embeddings=tied,
    )  # fmt: skip
    return Decoder(config, generator=torch.Generator().manual_seed(0))


def vectors(number: int = len(TITLES), size: int = 4) -> Tensor:
    """Item vectors of different lengths around a mean that is not zero, as parameters."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(number, size, generator=generator) * (1 + torch.arange(number))[:, None] + 5
    return torch.nn.Parameter(drawn)


def weights(decoder: Decoder) -> list[Tensor]:
    """Copies of the embedding and, where it is not the same, the head."""
    found = [decoder.model.embed_tokens.weight, *([decoder.lm_head.weight] if decoder.lm_head is not None else [])]
    return [weight.detach().clone() for weight in found]


def grow(decoder: Decoder, tokenizer: Any, items: Tensor | None = None, like: tuple[str, ...] = WORDS) -> Any:
    return add_titles(decoder, tokenizer, TITLES, vectors() if items is None else items, like)


def test_any_text_survives_the_round_trip() -> None:
    codec = TextCodec(train_tokenizer(TEXTS, 300))
    for text in ("Grimheist Club", 'naïve café, 東京\n\t"quoted" <|im_end|>', " two  spaces "):
        assert codec.decode(codec.encode(text)) == text


def test_the_template_is_chatml() -> None:
    codec = TextCodec(train_tokenizer(TEXTS, 300))
    template = make_template(codec)
    assert template.name == "chatml" and template.end_of_turn == codec.vocab["<|im_end|>"]


def test_every_title_is_one_token_with_the_space_before_it() -> None:
    old = train_tokenizer(TEXTS, 400)
    codec = TextCodec(grow(small(len(old)), old))
    ids = [codec.encode(f" {title}") for title in TITLES]
    assert ids == [[len(old) + n] for n in range(len(TITLES))], "in the order of the titles, after the old tokens"
    for title, found in zip(TITLES, ids, strict=True):
        assert codec.decode(found) == f" {title}"
        assert codec.encode(f"\nItem: {title}\n")[-2:-1] == found, "as an agent names it"
    control = make_template(codec).control
    assert control.isdisjoint(token for found in ids for token in found), "no title is a role marker"


def test_titles_are_found_in_lists_whatever_they_contain_of_each_other() -> None:
    old = train_tokenizer(TEXTS, 400)
    codec = TextCodec(grow(small(len(old)), old))
    separator = codec.encode("; it;")[:1]  # ";" before a space
    listed = codec.encode("Candidates:" + ";".join(f" {title}" for title in TITLES))
    expected = [token for n in range(len(TITLES)) for token in (len(old) + n, *separator)][:-1]
    assert listed == [*codec.encode("Candidates:"), *expected]


def test_text_without_titles_reads_as_before_and_nothing_is_lost() -> None:
    old = train_tokenizer(TEXTS, 400)
    before, after = TextCodec(old), TextCodec(grow(small(len(old)), old))
    for text in (*TEXTS[5:6], "system\nRecommend one item.", "Toy Story (1995)", "Preheat; the heat", "<|im_end|>"):
        assert after.encode(text) == before.encode(text), "no title with its space is in it"
    for text in ("Item: Toy Story (1995)\nItem: Heat 3", " Heathen", "naïve <|im_end|>  Heat  2", " C++ (.*)"):
        assert after.decode(after.encode(text)) == text


def test_the_given_tokenizer_stays_as_it_is() -> None:
    old = train_tokenizer(TEXTS, 400)
    size, content, spelled = len(old), old.backend_tokenizer.to_str(), old.encode(" Heat 2")
    grown = grow(small(len(old)), old)
    assert len(old) == size and old.backend_tokenizer.to_str() == content and old.encode(" Heat 2") == spelled
    assert len(grown) == size + len(TITLES)
    assert (grown.eos_token, grown.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert {token: grown.get_vocab()[token] for token in old.get_vocab()} == old.get_vocab()


def test_titles_survive_saving(tmp_path: Path) -> None:
    old = train_tokenizer(TEXTS, 400)
    grown = grow(small(len(old)), old)
    grown.save_pretrained(tmp_path)
    read, kept = TextCodec(load_tokenizer(tmp_path)), TextCodec(grown)
    text = "Candidates:" + ";".join(f" {title}" for title in TITLES) + "\nReason: likes it."
    assert read.encode(text) == kept.encode(text) and read.vocab == kept.vocab
    assert make_template(read) == make_template(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_the_model_grows_and_keeps_what_it_knew(tied: bool, dtype: torch.dtype) -> None:
    old = train_tokenizer(TEXTS, 400)
    decoder = small(len(old), tied).to(dtype)
    before = weights(decoder)
    grown = grow(decoder, old)
    assert decoder.config.vocab_size == len(grown) == decoder.model.embed_tokens.num_embeddings
    assert len(before) == (1 if tied else 2) and (decoder.lm_head is None) == tied
    assert decoder.lm_head is None or decoder.lm_head.out_features == len(grown)
    for was, now in zip(before, weights(decoder), strict=True):
        assert now.shape == (len(grown), 16) and now.dtype == dtype
        assert torch.equal(now[: len(old)], was)
    assert decoder.head_weight.shape[0] == len(grown) and decoder.model.embed_tokens.weight.requires_grad


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_lie_among_the_words_as_alike_as_the_items_are(tied: bool) -> None:
    """Four dimensions fit into the four directions of five words: every cosine is kept exactly."""
    old, items = train_tokenizer(TEXTS, 400), vectors()
    decoder = small(len(old), tied)
    grown = grow(decoder, old, items)
    words = [grown.get_vocab()[f"Ġ{word}"] for word in WORDS]
    unit = normalize(items.detach() - items.detach().mean(0), dim=1)
    for weight in weights(decoder):
        known = weight[words]
        distance = (known - known.mean(0)).norm(dim=1).mean()
        placed = weight[len(old) :] - known.mean(0)
        torch.testing.assert_close(placed.norm(dim=1), distance.expand(len(TITLES)), atol=0, rtol=1e-4)
        torch.testing.assert_close(normalize(placed, dim=1) @ normalize(placed, dim=1).T, unit @ unit.T, **CLOSE)
        # Along the words' directions: nothing of a new row points anywhere else.
        basis = torch.linalg.svd(known - known.mean(0), full_matrices=False).Vh[:4]
        torch.testing.assert_close(placed @ basis.T @ basis, placed, **CLOSE)


def test_the_head_of_its_own_is_placed_by_its_own_words() -> None:
    old = train_tokenizer(TEXTS, 400)
    decoder = small(len(old), tied=False)
    grow(decoder, old)
    embedding, head = weights(decoder)
    assert not torch.allclose(embedding[len(old) :], head[len(old) :], atol=1e-3)


def test_vectors_of_more_dimensions_than_words_stay_among_them() -> None:
    old, items = train_tokenizer(TEXTS, 400), vectors(size=40)
    decoder = small(len(old))
    words = [old.get_vocab()[f"Ġ{word}"] for word in WORDS]
    grow(decoder, old, items)
    known = decoder.head_weight[words]
    far = (decoder.head_weight[len(old) :] - known.mean(0)).norm(dim=1) / (known - known.mean(0)).norm(dim=1).mean()
    assert torch.isfinite(far).all() and 0 < far.min() and far.max() < 1 + 1e-4


def test_rows_beyond_the_tokenizer_make_room() -> None:
    """Models pad their vocabulary; a title's row is the one that its number says."""
    old = train_tokenizer(TEXTS, 400)
    padded, plain = small(len(old) + 9), small(len(old))
    with torch.no_grad():
        plain.model.embed_tokens.weight.copy_(padded.model.embed_tokens.weight[: len(old)])
    grow(padded, old)
    grow(plain, old)
    assert torch.equal(padded.head_weight, plain.head_weight) and padded.config == plain.config


def test_a_grown_model_reads_and_scores_titles() -> None:
    old = train_tokenizer(TEXTS, 400)
    for tied in (True, False):
        decoder = small(len(old), tied)
        codec = TextCodec(grow(decoder, old))
        ids = torch.tensor(codec.encode("".join(f" {title};" for title in TITLES)))
        attend = PackedAttention(torch.tensor([0, len(ids)], dtype=torch.int32))
        logits = decoder(ids, torch.arange(len(ids)), attend, None) @ decoder.head_weight.T
        assert logits.shape == (len(ids), len(old) + len(TITLES)) and bool(torch.isfinite(logits).all())
        logits[:, len(old) :].sum().backward()
        grad = decoder.model.embed_tokens.weight.grad
        assert grad is not None and bool(grad[len(old) :].any(1).all()), "every title learns"


def test_a_word_that_is_not_one_token_is_refused_and_nothing_has_changed() -> None:
    old = train_tokenizer(TEXTS, 400)
    decoder, content = small(len(old)), old.backend_tokenizer.to_str()
    before = weights(decoder)
    with pytest.raises(ConfigError, match=r"^model\.tokenizer: .*'Hopscotch'.*use own"):
        grow(decoder, old, like=(*WORDS, "Hopscotch"))
    assert torch.equal(decoder.head_weight, before[0]) and decoder.config.vocab_size == len(old)
    assert old.backend_tokenizer.to_str() == content
