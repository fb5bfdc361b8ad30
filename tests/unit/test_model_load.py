"""Where a model's name leads, what is downloaded, random weights, and saving."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

from coars_fast.errors import MissingModelError
from coars_fast.model.decoder import Decoder, DecoderConfig
from coars_fast.model.load import load_decoder, load_tokenizer, resolve_folder, save_decoder
from coars_fast.model.lora import add_adapters
from tests.model_checkpoints import write_checkpoint

CONFIG = DecoderConfig(
    family="qwen3",
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)


def write_tokenizer(folder: Path) -> None:
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "hello": 1, "world": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)


def test_hub_download_asks_for_no_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, "qwen3")
    write_tokenizer(tmp_path)
    asked: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load_decoder("owner/tiny")
    assert load_tokenizer("owner/tiny")("hello world").input_ids == [1, 2]
    weights, text = asked
    assert weights["name"] == text["name"] == "owner/tiny"

    def wanted(request: dict[str, Any], name: str) -> bool:
        allowed = any(fnmatch.fnmatch(name, pattern) for pattern in request["allow_patterns"])
        return allowed and not any(fnmatch.fnmatch(name, pattern) for pattern in request["ignore_patterns"])

    for name in ("config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "model-00001-of-2.safetensors"):
        assert wanted(weights, name), name
    for name in ("pytorch_model.bin", "modeling_x.py", "x.pt", "training_args.bin", "original/params.json", "x.pkl"):
        assert not wanted(weights, name) and not wanted(text, name), name
    assert not wanted(text, "model.safetensors")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere_at_all", "a/b/c", "..", "win\\path"])
def test_what_looks_like_a_path_never_asks_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    if name == "..":
        assert resolve_folder(name) == Path("..")
        return
    with pytest.raises(MissingModelError, match="no such folder"):
        resolve_folder(name)


def test_hub_failure_tells_both_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **_: Any) -> str:
        raise OSError("no network today")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(MissingModelError, match="neither a folder.*runs/model.*no network today"):
        load_decoder("runs/model")
    with pytest.raises(FileNotFoundError):
        load_tokenizer("runs/model")


def test_random_weights_follow_the_generator() -> None:
    one, same = (Decoder(CONFIG, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert float(one.head_weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert bool((one.layers[0].input_layernorm.weight == 1).all())
    assert one.head_weight is not one.model.embed_tokens.weight


def test_saving_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    decoder = Decoder(CONFIG)
    save_decoder(decoder, tmp_path / "new" / "folder")
    with torch.no_grad():
        decoder.model.norm.weight.fill_(2.0)
    add_adapters(decoder, rank=2, alpha=2.0)
    save_decoder(decoder, tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    again = load_decoder(tmp_path / "new" / "folder")
    assert bool((again.model.norm.weight == 2).all()) and again.config == CONFIG


def test_weights_are_cast_and_own_their_memory(tmp_path: Path) -> None:
    save_decoder(Decoder(CONFIG), tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    decoder = load_decoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")  # a window into the file would now be gone
    assert all(bool(torch.isfinite(p).all()) and p.requires_grad for p in decoder.parameters())
