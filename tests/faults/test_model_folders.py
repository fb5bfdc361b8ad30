"""Model folders that are broken, foreign or unsafe: each is refused with the file, the field, and what was expected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coars_fast.errors import MissingModelError, ModelError
from coars_fast.model.attention import PackedAttention
from coars_fast.model.decoder import DecoderConfig
from coars_fast.model.load import load_decoder, load_tokenizer
from coars_fast.model.lora import adapter_state, add_adapters, load_peft, save_peft
from tests.model_checkpoints import write_checkpoint


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(folder: Path, pattern: str, error: type[ModelError] = ModelError) -> None:
    with pytest.raises(error, match=f"(?s){pattern}") as caught:
        load_decoder(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"model_type": "gpt2"}, "config.json.*model_type 'gpt2'.*llama, qwen2, qwen3"),
        ({"model_type": None}, "model_type None"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'yarn'.*llama3"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_kv_heads: 3|num_key_value_heads"),
        ({"num_hidden_layers": 0}, "num_layers|num_hidden_layers"),
        ({"hidden_size": "large"}, "hidden_size"),
        ({"head_dim": 7}, "head_dim.*7"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_that_is_not_supported(changes: dict[str, Any], pattern: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3")
    edit_json(tmp_path / "config.json", **changes)
    refused(tmp_path, pattern)


def test_a_config_object_of_another_architecture() -> None:
    import transformers

    with pytest.raises(ModelError, match="mistral.*llama, qwen2, qwen3"):
        DecoderConfig.from_hf(transformers.MistralConfig())


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff"])
def test_config_that_is_not_json(text: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(tmp_path, "config.json.*JSON")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    (tmp_path / name).unlink()
    refused(tmp_path, name, MissingModelError)


def test_pickled_weights_are_never_loaded(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    refused(tmp_path, "must be safetensors, found pytorch_model.bin.*save_pretrained")


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_weights(keep: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(tmp_path, "model.safetensors: damaged")


def test_missing_tensor(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3")
    name = "model.layers.1.self_attn.k_norm.weight"
    edit_tensors(tmp_path / "model.safetensors", lambda tensors: tensors.pop(name))
    refused(tmp_path, f"{name} is missing")


def test_misshapen_tensor(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3")
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(tmp_path / "model.safetensors", lambda tensors: tensors.update({name: torch.zeros(48, 31)}))
    refused(tmp_path, rf"model.safetensors.*{name}.*\[48, 31\].*\[48, 32\]")


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "x"])
def test_unexpected_tensor(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3")
    edit_tensors(tmp_path / "model.safetensors", lambda tensors: tensors.update({name: torch.zeros(48)}))
    refused(tmp_path, f"unexpected tensor {name}")


def test_integer_weights(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3")
    name = "model.norm.weight"
    edit_tensors(tmp_path / "model.safetensors", lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    refused(tmp_path, f"{name} is torch.int8")


def test_rotary_buffers_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(tmp_path / "model.safetensors", lambda tensors: tensors.update({name: torch.zeros(4)}))
    load_decoder(tmp_path)


def test_head_beside_a_tied_embedding(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", tied=True)
    path, name = tmp_path / "model.safetensors", "lm_head.weight"
    edit_tensors(path, lambda tensors: tensors.update({name: tensors["model.embed_tokens.weight"].clone()}))
    assert load_decoder(tmp_path).lm_head is None
    edit_tensors(path, lambda tensors: tensors[name].add_(1.0))
    refused(tmp_path, "lm_head.weight differs.*tie_word_embeddings")


def test_head_that_should_be_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", tied=True)
    edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    refused(tmp_path, "lm_head.weight is missing")


def test_shards_that_do_not_keep_the_indexs_word(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    name, shard = next(iter(good["weight_map"].items()))
    for wrong in (f"../{tmp_path.name}/{shard}", "weights.bin", 3):
        edit_json(index, weight_map={**good["weight_map"], name: wrong})
        refused(tmp_path, f"index.json: tensor {name} is in")
    edit_json(index, weight_map={**good["weight_map"], "y": shard})
    refused(tmp_path, f"{shard}: tensor y is missing")
    edit_json(index, weight_map=None)
    refused(tmp_path, "weight_map")
    index.write_text(json.dumps(good))
    (tmp_path / shard).unlink()
    refused(tmp_path, f"{shard}: no such file", MissingModelError)


def test_folder_without_tokenizer_and_with_a_broken_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_a_file_is_no_model_folder(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    with pytest.raises(ModelError, match="a file; a model is a folder"):
        load_decoder(tmp_path / "model.safetensors")


# --------------------------------------------------------------------------------------------------------- PEFT folders


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 8}, "r is 8, expected 4"),
        ({"lora_alpha": 16}, "lora_alpha is 16, expected 8"),
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "v_proj"]}, "target_modules is .'q_proj', 'v_proj'.*down_proj"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules holds lm_head"),
        ({"target_modules": ["model.embed_tokens"]}, "target_modules holds embed_tokens"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_peft_folder_of_another_kind(changes: dict[str, Any], pattern: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", "qwen3")
    decoder = load_decoder(tmp_path / "base")
    add_adapters(decoder, rank=4, alpha=8.0)
    save_peft(decoder, 0, tmp_path / "adapter", "base")
    edit_json(tmp_path / "adapter" / "adapter_config.json", **changes)
    with pytest.raises(ModelError, match=f"adapter_config.json: {pattern}"):
        load_peft(decoder, 0, tmp_path / "adapter")


def test_peft_tensors_that_do_not_fit(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", "qwen3")
    decoder = load_decoder(tmp_path / "base")
    add_adapters(decoder, rank=4, alpha=8.0)
    folder, before = tmp_path / "adapter", adapter_state(decoder, 0)
    path = folder / "adapter_model.safetensors"
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    head = "base_model.model.lm_head.lora_A.weight"
    faults: list[tuple[str, dict[str, Any]]] = [
        (f"{name} is missing", {name: None}),
        (rf"{name} has shape \[4, 47\], expected \[4, 48\]", {name: torch.zeros(4, 47)}),
        (f"{name} holds values that are not finite", {name: torch.full((4, 48), float("nan"))}),
        ("unexpected tensor z", {"z": torch.zeros(1)}),
        (f"{head}: an adapter on the head", {head: torch.zeros(4, 32)}),
    ]
    for pattern, changes in faults:
        save_peft(decoder, 0, folder, "base")
        tensors = {**load_file(path), **changes}
        save_file({key: value for key, value in tensors.items() if value is not None}, path)
        with pytest.raises(ModelError, match=f"adapter_model.safetensors: .*{pattern}"):
            load_peft(decoder, 0, folder)
    assert all(torch.equal(value, before[key]) for key, value in adapter_state(decoder, 0).items())
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ModelError, match="damaged"):
        load_peft(decoder, 0, folder)
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        load_peft(decoder, 0, folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(MissingModelError, match="adapter_model.safetensors: no such file"):
        load_peft(decoder, 0, folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(MissingModelError, match="adapter_config.json"):
        load_peft(decoder, 0, folder)


def test_a_failed_save_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "base", "qwen3")
    decoder = load_decoder(tmp_path / "base")
    add_adapters(decoder, rank=4, alpha=8.0)
    folder = tmp_path / "adapter"
    save_peft(decoder, 0, folder, "base")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        decoder.get_parameter("model.layers.0.mlp.up_proj.lora_b.0").fill_(1.0)

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_peft(decoder, 0, folder, "base")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_token_ids_outside_the_vocabulary_raise(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    with pytest.raises(IndexError):
        bounds = torch.tensor([0, 1], dtype=torch.int32)
        load_decoder(tmp_path)(torch.tensor([61]), torch.tensor([0]), PackedAttention(bounds))
