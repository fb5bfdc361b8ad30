"""What the tests of `coars_fast.game` share: small tokenizers of every template family, a task, written replies."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from coars_fast.config import GameConfig
from coars_fast.data.records import Task
from coars_fast.game.episode import Episode, Reply
from coars_fast.game.template import TextCodec, TokenTemplate, make_template

TITLES = ("Alpha", "Beta", "Gamma", "Delta", "Omega")
TASK = Task(
    user=0, history=(0, 1), target=3, candidates=(2, 3, 4), peer_counts=(1, 4, 0), num_peers=5, peer_similarity=0.5
)
TEXTS = [
    "Reason: calm and about space.\nItem: Delta",
    "Reason: I like it.\nAction: click\nScore: 0.90\n\nHistory: Alpha; Beta\nCandidates: Gamma; Delta",
    "system\nRecommend one item.\n\nuser\n\nassistant\n",
]
# How the families cut text before BPE (their published tokenizer.json).
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
SPECIAL = {
    "chatml": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "chatml-not-special": ("<|endoftext|>",),
    "qwen3": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "plain": ("<s>", "</s>"),
}
NOT_SPECIAL = {
    "chatml-not-special": ("<|im_start|>", "<|im_end|>"),  # as some fine-tunings add them
    "qwen3": ("<think>", "</think>"),  # as Qwen3 declares them
}
ENDS = {"llama3": "<|eot_id|>", "plain": "</s>"}
FAMILIES = tuple(SPECIAL)


@lru_cache
def family_tokenizer(family: str) -> Any:
    """A byte-level BPE with the special tokens and the word pattern of a family."""
    from transformers import PreTrainedTokenizerFast

    words = LLAMA3_WORDS if family == "llama3" else QWEN_WORDS
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Split(Regex(words), behavior="isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(SPECIAL[family]),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in NOT_SPECIAL.get(family, ())])
    names = {"eos_token": ENDS.get(family, "<|im_end|>")}
    if family in ("llama3", "plain"):
        names["bos_token"] = SPECIAL[family][0]
    # Declaring an eos token would make it special.
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({} if family == "chatml-not-special" else names))


@lru_cache
def family(name: str) -> tuple[TextCodec, TokenTemplate]:
    """Codec and template of a family."""
    codec = TextCodec(family_tokenizer(name))
    return codec, make_template(codec)


def an_episode(
    game: GameConfig, *, task: Task = TASK, titles: tuple[str, ...] = TITLES, of_family: str = "chatml"
) -> Episode:
    return Episode(task, titles, *family(of_family), game)


def spelled(codec: TextCodec, text: str) -> list[int]:
    """Text one character at a time: never the tokens that `encode` would choose, as a sampled reply may be."""
    return [token for character in text for token in codec.encode(character)]


def say(episode: Episode, text: str, *, ended: bool = True) -> Reply:
    """A reply that spells `text`, closed by the end of turn or cut before it; log-prob n is -n / 8."""
    ids = (*spelled(episode.codec, text), *([episode.template.end_of_turn] if ended else []))
    return Reply(ids, tuple(-n / 8 for n in range(len(ids))))


def recommend(item: str) -> str:
    """A recommender's reply; `item` as the prompts name one: "Delta" in brief, "2. Delta" in full."""
    return f"Reason: try it.\nItem: {item}"


def judge(action: str, score: str) -> str:
    return f"Reason: so it is.\nAction: {action}\nScore: {score}"
