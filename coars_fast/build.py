"""Configuration -> everything a run plays and trains with: data, SASRec, tokens, model, adapters, warm start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from coars_fast.cache import put_folder, warm_base_key
from coars_fast.config import Config
from coars_fast.data.load import load_dataset, notes
from coars_fast.data.playable import check_tasks
from coars_fast.data.records import Dataset, Task
from coars_fast.data.sasrec import SASRec, train_sasrec
from coars_fast.data.splits import Split, make_split
from coars_fast.data.tasks import TaskSource
from coars_fast.data.world import KINDS
from coars_fast.errors import ConfigError, ModelError, RunFolderError
from coars_fast.game.episode import Episode
from coars_fast.game.template import TextCodec, TokenTemplate, make_template
from coars_fast.model.attention import choose_backend
from coars_fast.model.decoder import Decoder
from coars_fast.model.load import load_decoder, load_tokenizer, save_decoder
from coars_fast.model.lora import add_adapters
from coars_fast.model.tokenizer import add_titles
from coars_fast.progress import Screen
from coars_fast.state.files import delete_folder
from coars_fast.warm_start import warm_start

TINY_BASE = Path(__file__).parent / "tiny_base"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run works with."""

    config: Config
    dataset: Dataset
    tasks: TaskSource
    codec: TextCodec
    template: TokenTemplate
    decoder: Decoder
    base: str
    """Path or hub id of the frozen base."""

    def episode(self, task: Task, memory: str = "") -> Episode:
        """A fresh conversation about a task; see :class:`Episode`."""
        titles, game = self.dataset.titles, self.config.game
        return Episode(task, titles, self.codec, self.template, game, memory=memory)


def build(
    config: Config, folder: Path, screen: Screen, *, adapters_follow: bool = False, only_read: bool = False
) -> Parts:
    """Load and prepare everything; what took long is kept in the run folder and read from it by a resumed run.

    Args:
        config: checked settings.
        folder: the run folder: `sasrec-*.safetensors`, and `base/` where the base model was changed.
        screen: shows progress.
        adapters_follow: adapters will be loaded from a checkpoint, so they need no warm start.
        only_read: SASRec and the base model must be in the folder: it may be another process's.

    Raises:
        RunFolderError: with `only_read`, they are not there.
    """
    device = _device(config)
    dataset = load_dataset(config)
    screen.say(
        f"{dataset.name}: {dataset.num_users:,} users, {dataset.num_items:,} items, "
        f"{sum(map(len, dataset.sequences)):,} interactions"
    )
    split = make_split(dataset, config.data)
    for note in (*notes(dataset), *check_tasks(dataset, split, config)):
        screen.say(f"note: {note}")
    tasks = TaskSource(dataset, config, _sasrec(config, dataset, split, folder, screen, only_read), split)
    changed = config.model.tokenizer == "catalogue" or (config.warm_start and config.sft.trainable == "all")
    own_base = folder / "base"
    if changed and not (own_base / "config.json").is_file():  # written last
        if only_read:
            raise RunFolderError(f"{own_base}: the run has not made its base model yet; try again when it plays")
        _make_base(config, tasks, own_base, device, screen)
    source = str(own_base) if changed else config.model.path or str(TINY_BASE)
    dtype = _dtype(config, device)
    decoder = load_decoder(source, dtype=dtype, device=device)
    backend, _ = choose_backend(device, dtype, config.model.attention)
    codec = TextCodec(load_tokenizer(source))
    _check_vocabulary(codec, decoder, source)
    template = make_template(codec)
    decoder.gradient_checkpointing = config.model.gradient_checkpointing
    add_adapters(decoder, rank=config.model.lora_rank, alpha=config.model.lora_alpha, seed=config.seed)
    if config.warm_start and config.sft.trainable == "adapters" and not adapters_follow:
        warm_start(decoder, tasks, _episodes(config, dataset, codec, template), config, screen)
    size = sum(p.numel() for name, p in decoder.named_parameters() if "lora_" not in name)
    screen.say(
        f"{decoder.config.family} model of {size:,} parameters from {source}, {device}, "
        f"{str(decoder.head_weight.dtype).removeprefix('torch.')}, {template.name} template, {backend} attention"
    )
    return Parts(
        config=config, dataset=dataset, tasks=tasks, codec=codec, template=template, decoder=decoder, base=source
    )


def _make_base(config: Config, tasks: TaskSource, folder: Path, device: torch.device, screen: Screen) -> None:
    """Fill `folder` with the base model of this run where it is not the given one: titles as tokens, and the warm start
    where that trains the base; or with what another run put into `sft.cache`."""
    source, dataset = config.model.path or str(TINY_BASE), tasks.maker.dataset
    decoder = load_decoder(source, dtype=torch.float32, device=device)  # what is trained in full
    tokenizer = load_tokenizer(source)
    if folder.exists():
        delete_folder(folder)  # half of it, from a run that was killed
    kept = None
    if config.sft.cache is not None:
        kept = Path(config.sft.cache) / f"base-{warm_base_key(config, dataset, tasks.split, decoder)}"
        if kept.is_dir():
            screen.say(f"warm-started base from {kept}")
            put_folder(kept, folder)
            return
    _check_vocabulary(TextCodec(tokenizer), decoder, source)
    if config.model.tokenizer == "catalogue":
        # A title that is part of a prompt ("It", "Note") would tear its words apart; such a one stays spelled out.
        texts = _prompt_texts(config)
        whole = [i for i, title in enumerate(dataset.titles) if not any(title in text for text in texts)]
        vectors = tasks.maker.sasrec.item_embedding.weight[whole]
        tokenizer = add_titles(decoder, tokenizer, [dataset.titles[i] for i in whole], vectors, like=list(KINDS))
    codec = TextCodec(tokenizer)
    _check_vocabulary(codec, decoder, source)
    decoder.gradient_checkpointing = config.model.gradient_checkpointing
    warm_start(decoder, tasks, _episodes(config, dataset, codec, make_template(codec)), config, screen)
    tokenizer.save_pretrained(folder)
    save_decoder(decoder, folder)
    if kept is not None:
        put_folder(folder, kept)


def _episodes(config: Config, dataset: Dataset, codec: TextCodec, template: TokenTemplate) -> Callable[[Task], Episode]:
    """Makes fresh conversations for the warm start."""
    return lambda task: Episode(task, dataset.titles, codec, template, config.game)


def _device(config: Config) -> torch.device:
    if config.model.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.model.device)
    except RuntimeError as error:
        raise ConfigError(f"model.device: {config.model.device!r} is no device; try auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device: cuda was asked for, but torch sees no GPU here; use auto or cpu")
    return device


def _dtype(config: Config, device: torch.device) -> torch.dtype:
    if config.model.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.model.dtype)


def _check_vocabulary(codec: TextCodec, decoder: Decoder, source: str) -> None:
    """Raise :class:`ModelError` if the tokenizer has a token for which the model has no embedding."""
    token, number = max(codec.vocab.items(), key=lambda entry: entry[1])
    if number >= decoder.config.vocab_size:
        raise ModelError(
            f"{source}: the tokenizer's token {token!r} is number {number}, but the model's vocab_size is "
            f"{decoder.config.vocab_size}; give a model whose embeddings were resized to its tokenizer"
        )


def _sasrec(config: Config, dataset: Dataset, split: Split, folder: Path, screen: Screen, only_read: bool) -> SASRec:
    """SASRec of this data set and these settings: from the run folder, from `sasrec.cache`, or trained."""
    settings = {name: value for name, value in asdict(config.sasrec).items() if name != "cache"}
    text = json.dumps([settings, dataset.num_items, split.train_sequences])
    path = folder / f"sasrec-{hashlib.sha256(text.encode()).hexdigest()[:12]}.safetensors"
    if path.is_file():
        return SASRec.load(path)
    if only_read:
        raise RunFolderError(
            f"{path}: no such file: the run has not trained SASRec yet, or {dataset.name} is not the data that it read"
        )
    shared = Path(config.sasrec.cache) / path.name if config.sasrec.cache else None
    if shared is not None and shared.is_file():
        screen.say(f"SASRec from {shared}")
        sasrec = SASRec.load(shared)
    else:
        with screen.bar("SASRec", config.sasrec.num_epochs) as advance:
            sasrec = train_sasrec(
                split.train_sequences,
                dataset.num_items,
                config.sasrec,
                seed=config.sasrec.seed,
                progress=lambda epoch, of, loss: advance(epoch, f"loss {loss:.3f}"),
            )
        if shared is not None:
            shared.parent.mkdir(parents=True, exist_ok=True)
            sasrec.save(shared)
    sasrec.save(path)
    return sasrec


def _prompt_texts(config: Config) -> list[str]:
    """All that an agent reads or writes beside titles."""
    from coars_fast.game.episode import peers_text
    from coars_fast.game.memory import MEMORY_TEXTS
    from coars_fast.game.prompts import (
        ACTIONS,
        OTHER_REFERENCES,
        PROMPTS,
        format_judgement,
        format_recommendation,
    )
    from coars_fast.warm_start import NOT_WANTED, WANTED, reason

    kind = config.game.prompts
    # Whatever the reference and the memory: runs that differ in these alone begin with the same base.
    sets = (PROMPTS[kind], OTHER_REFERENCES[kind], MEMORY_TEXTS[kind])
    prompts = [str(text) for texts in sets for text in vars(texts).values()]
    replies = [format_judgement(words, action, 0.5) for words in (WANTED, NOT_WANTED) for action in ACTIONS]
    peers = [peers_text(count, config.data.num_peers, config.game) for count in range(config.data.num_peers + 1)]
    return [*prompts, *replies, *peers, format_recommendation(reason(""), "")]
