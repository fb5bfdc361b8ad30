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
        self._backend = type(backend).from_str(backend.to_str())
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.special_ids = frozenset(
            i for i, token in self._backend.get_added_tokens_decoder().items() if token.special
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; no special token is added or read."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True)


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
        headers = {role: (start, *codec.encode(f"{role}\n")) for role in roles}
        if "<think>" in vocab and "</think>" in vocab:  # Qwen3's own way to say "answer without thinking first"
            blank = codec.encode("\n\n")
            headers["assistant"] += (vocab["<think>"], *blank, vocab["</think>"], *blank)
        name, bos, closing = "chatml", (), (end, *newline)
    elif "<|start_header_id|>" in vocab and "<|eot_id|>" in vocab:
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
    control = codec.special_ids | {closing[0]}
    return TokenTemplate(name=name, bos=bos, headers=headers, end=closing, control=frozenset(control))  # type: ignore[arg-type]
