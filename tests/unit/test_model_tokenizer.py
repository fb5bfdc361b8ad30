"""Tokenizers trained on the spot, and moving a model to one."""

from __future__ import annotations

import torch

from coars_fast.game.template import TextCodec, make_template
from coars_fast.model.decoder import Decoder, DecoderConfig
from coars_fast.model.tokenizer import train_tokenizer, transplant

TEXTS = [" Grimheist Club", " Toy Story (1995)", "Reason: likes calm space.\nItem: 3. Toy Story (1995)"] * 20


def small(vocab_size: int, tied: bool) -> Decoder:
    config = DecoderConfig(
        family="qwen3", vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2,
        num_kv_heads=1, head_dim=8, tie_word_embeddings=tied,
    )  # fmt: skip
    return Decoder(config, generator=torch.Generator().manual_seed(0))


def test_any_text_survives_the_round_trip() -> None:
    codec = TextCodec(train_tokenizer(TEXTS, 300))
    for text in ("Grimheist Club", 'naïve café, 東京\n\t"quoted" <|im_end|>', " two  spaces "):
        assert codec.decode(codec.encode(text)) == text


def test_the_template_is_chatml() -> None:
    codec = TextCodec(train_tokenizer(TEXTS, 300))
    template = make_template(codec)
    assert template.name == "chatml" and template.end_of_turn == codec.vocab["<|im_end|>"]


def test_a_transplanted_token_is_the_mean_of_what_spelled_it() -> None:
    old, new = train_tokenizer([" Grimheist Club"] * 20, 275), train_tokenizer(TEXTS, 330)
    for tied in (True, False):
        decoder = small(len(old), tied)
        before, head = decoder.model.embed_tokens.weight.clone(), decoder.head_weight.clone()
        transplant(decoder, old, new)
        assert decoder.config.vocab_size == len(new) == decoder.head_weight.shape[0]
        assert decoder.model.embed_tokens.weight.shape == (len(new), 16)
        for token in ("<|im_start|>", "ĠStory", "ĠClub"):
            at = new.get_vocab()[token]
            if token in old.get_vocab():
                spelled = [old.get_vocab()[token]]
            else:  # none of its pairs occurs in the old tokenizer's texts, so single bytes spell it
                spelled = [old.get_vocab()[c] for c in token]
            assert torch.allclose(decoder.model.embed_tokens.weight[at], before[spelled].mean(0), atol=1e-6)
            assert torch.allclose(decoder.head_weight[at], head[spelled].mean(0), atol=1e-6)


def test_titles_become_tokens_with_the_space_before_them_and_nothing_is_lost() -> None:
    titles = ["Toy Story (1995)", "Heat", "Heat 2", "<|im_end|>", "naïve café"]
    codec = TextCodec(train_tokenizer(TEXTS, 300, titles[:3] + titles[4:]))
    assert len(codec.encode(" Toy Story (1995)")) == len(codec.encode(" Heat 2")) == 1
    for text in (
        "Item: Toy Story (1995)\nItem: Heat",
        "Preheating; Heater\n Heat 2",
        "Toy Story (1995)",
        " <|im_end|>",
    ):
        assert codec.decode(codec.encode(text)) == text
        assert not set(codec.encode(text)) & make_template(codec).control


def test_a_transplanted_title_is_random_and_reproducible() -> None:
    old, new = train_tokenizer(TEXTS, 300), train_tokenizer(TEXTS, 300, ["Toy Story (1995)", "Heat"])
    one, two = small(len(old), True), small(len(old), True)
    transplant(one, old, new)
    transplant(two, old, new)
    row = new.get_vocab()[" Heat"]
    assert torch.equal(one.head_weight[row], two.head_weight[row])
    assert 0.3 < (one.head_weight[row].std() / one.head_weight.std()).item() < 3
