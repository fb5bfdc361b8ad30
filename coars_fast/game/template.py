"""Token templates: how messages become append-only token sequences.

A message reaches the partner as token ids between fixed role headers and is never decoded and encoded again. Chat
templates in Jinja may rewrite the past (drop earlier reasoning, for instance), so the headers are spelled here, one
template per family of special tokens, and a test holds each to what the family's own chat template writes.

Text of titles and prompts is encoded with special tokens switched off: a title that spells a role marker stays text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from coars_fast.errors import ModelError

Role = Literal["system", "user", "assistant"]
ROLE_MARKS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
THINK_MARKS = ("<think>", "</think>")


class TextCodec:
    """Text <-> token ids of a Hugging Face fast tokenizer, with special tokens never read from text.

    Args:
        tokenizer: a `transformers` fast tokenizer.
    """

    def __init__(self, tokenizer: Any):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(f"tokenizer {type(tokenizer).__name__}: a fast tokenizer (tokenizer.json) is needed")
        self.tokenizer = tokenizer
        self._decoder = backend
        self._encoder = type(backend).from_str(backend.to_str())
        self._encoder.encode_special_tokens = True
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self.vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        # Some tokenizers do not call their own marks special (Qwen3's <think>, ChatML added by a fine-tuning), and then
        # the switch above would not keep them out of text.
        marks = {*ROLE_MARKS, *THINK_MARKS, tokenizer.eos_token}
        self._encoder.add_special_tokens([token for token in added.values() if token.content in marks])

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; no special token is added or read."""
        return self._encoder.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return self._decoder.decode(list(ids), skip_special_tokens=True)


@dataclass(frozen=True, kw_only=True)
class TokenTemplate:
    """Role headers as token ids. `bos + header(role) + message + end + header(role) + ...`"""

    name: str
    bos: tuple[int, ...]
    headers: dict[Role, tuple[int, ...]]
    end: tuple[int, ...]
    """Closes a message; `end[0]` is the token with which an agent ends its reply."""
    control: frozenset[int]
    """Tokens that a reply must not hold: the first one sampled ends the reply."""

    @property
    def end_of_turn(self) -> int:
        return self.end[0]

    def message(self, role: Role, ids: Iterable[int]) -> list[int]:
        """A whole message: header, ids, end."""
        return [*self.headers[role], *ids, *self.end]


def make_template(codec: TextCodec) -> TokenTemplate:
    """The template that fits a tokenizer's special tokens: ChatML (Qwen), Llama 3, or plain text headers.

    Raises:
        ModelError: the tokenizer has no token that could end a message.
    """
    vocab, roles = codec.vocab, ("system", "user", "assistant")
    if "<|im_start|>" in vocab and "<|im_end|>" in vocab:
        start, end, newline = vocab["<|im_start|>"], vocab["<|im_end|>"], codec.encode("\n")
        headers: dict[str, tuple[int, ...]] = {role: (start, *codec.encode(f"{role}\n")) for role in roles}
        if "<think>" in vocab and "</think>" in vocab:  # Qwen3's own way to say "answer without thinking first"
            blank = codec.encode("\n\n")
            headers["assistant"] += (vocab["<think>"], *blank, vocab["</think>"], *blank)
        name, bos, closing = "chatml", (), (end, *newline)
    elif {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} <= vocab.keys():
        start, stop = vocab["<|start_header_id|>"], vocab["<|end_header_id|>"]
        headers = {role: (start, *codec.encode(role), stop, *codec.encode("\n\n")) for role in roles}
        name, bos, closing = "llama3", (vocab["<|begin_of_text|>"],), (vocab["<|eot_id|>"],)
    else:
        eos = codec.tokenizer.eos_token_id
        if eos is None:
            raise ModelError("tokenizer: no <|im_end|>, <|eot_id|> or eos token that could end a message")
        first = codec.tokenizer.bos_token_id
        headers = {role: tuple(codec.encode(f"\n### {role.capitalize()}\n")) for role in roles}
        name, bos, closing = "plain", () if first is None else (first,), (eos,)
    control = codec.special_ids | {closing[0]} | {vocab[mark] for mark in ROLE_MARKS if mark in vocab}
    return TokenTemplate(name=name, bos=bos, headers=headers, end=closing, control=frozenset(control))  # type: ignore[arg-type]
