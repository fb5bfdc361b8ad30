"""Tokenizers that cannot serve, and replies that no sampler may hand in."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from coars_fast.config import GameConfig
from coars_fast.errors import ModelError
from coars_fast.game.episode import Reply
from coars_fast.game.template import TextCodec, make_template
from tests.game_pieces import FAMILIES, an_episode, family_tokenizer


def bare_tokenizer(*special: str, **names: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["Reason: so.\nItem: 1. Up"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def test_a_tokenizer_without_a_token_that_could_end_a_message_is_refused() -> None:
    with pytest.raises(ModelError, match=r"<\|im_end\|>.*eos token"):
        make_template(TextCodec(bare_tokenizer()))


def test_a_tokenizer_without_its_fast_form_is_refused_by_name() -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(ModelError, match="ByT5Tokenizer.*tokenizer.json"):
        TextCodec(ByT5Tokenizer())


@pytest.mark.parametrize(
    "special",
    [
        ("<|start_header_id|>", "<|eot_id|>"),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ("<|im_start|>",),
        ("<|im_end|>",),
    ],
)
def test_a_family_s_marks_in_part_fall_back_to_plain_headers(special: tuple[str, ...]) -> None:
    codec = TextCodec(bare_tokenizer(*special, "</s>", eos_token="</s>"))
    template = make_template(codec)
    assert template.name == "plain" and template.end == (codec.vocab["</s>"],)
    assert template.bos == ()
    assert {codec.vocab[mark] for mark in special} <= template.control


def test_a_codec_leaves_the_tokenizer_as_it_was() -> None:
    tokenizer = bare_tokenizer("<|im_start|>", "<|im_end|>", eos_token="<|im_end|>")
    tokenizer.backend_tokenizer.enable_truncation(4)
    before = tokenizer.backend_tokenizer.to_str()
    codec = TextCodec(tokenizer)
    assert len(codec.encode("a much longer text than four tokens")) > 4
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer.encode("<|im_end|>") == [codec.vocab["<|im_end|>"]]


@pytest.mark.parametrize("of_family", FAMILIES)
def test_a_control_token_inside_a_reply_is_refused(of_family: str) -> None:
    family_tokenizer(of_family)
    episode = an_episode(GameConfig(max_turns=2), of_family=of_family)
    before = [list(view.tokens) for view in episode.views]
    word, end = episode.codec.encode("a")[0], episode.template.end_of_turn
    for control in episode.template.control:
        with pytest.raises(AssertionError, match="control"):
            episode.receive(Reply((word, control, word, end), (0.0,) * 4))
    assert [view.tokens for view in episode.views] == before and not episode.turns


def test_a_reply_without_tokens_or_with_other_log_probs_is_refused() -> None:
    episode = an_episode(GameConfig(max_turns=2))
    for reply in (Reply((), ()), Reply((5, 6), (0.0,))):
        with pytest.raises(AssertionError):
            episode.receive(reply)


def test_a_finished_episode_takes_no_reply() -> None:
    episode = an_episode(GameConfig(max_turns=1))
    end = episode.template.end_of_turn
    episode.receive(Reply((end,), (0.0,)))
    assert episode.waiting is None
    with pytest.raises(AssertionError, match="over"):
        episode.receive(Reply((end,), (0.0,)))
