"""`--model.path`: checkpoints of all three families, written by transformers, go through a whole step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from coars_fast import train
from coars_fast.pretrain import lexicon_texts
from tests import tiny
from tests.model_checkpoints import write_checkpoint

LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def llama3_tokenizer() -> Any:
    """A small byte-level BPE with Llama 3's special tokens."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(LLAMA3), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lexicon_texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eot_id|>", bos_token="<|begin_of_text|>")


def run(folder: Path, out: Path, capsys: pytest.CaptureFixture[str], **changes: Any) -> str:
    train.main(tiny.arguments(out=out, model__path=folder, train__num_steps=1, data__num_eval_users=2, **changes))
    record = json.loads((out / "metrics.jsonl").read_text().splitlines()[1])
    assert record["kind"] == "train" and record["grad_norm_rec"] > 0
    if "train__minibatches" not in changes:  # a later minibatch is scored after the first one's update
        assert record["logp_difference_max"] < 1e-4
    return capsys.readouterr().out


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True), ("qwen3", True)])
def test_a_checkpoint_of_each_family_is_trained(
    family: str, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = llama3_tokenizer() if family == "llama" else tiny.tokenizer()
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    # A vocabulary larger than the tokenizer's, as released checkpoints have.
    size = {"vocab_size": len(tokenizer) + 9, "max_position_embeddings": 1024}
    write_checkpoint(folder, family, tied=tied, **size)
    printed = run(folder, tmp_path / "run", capsys)
    assert f"{family} model" in printed
    assert ("llama3 template" if family == "llama" else "chatml template") in printed


def test_the_prompts_for_models_that_never_saw_the_format_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = tiny.random_decoder(adapters=False, max_position_embeddings=4096)
    run(tiny.write_model(tmp_path / "model", decoder), tmp_path / "run", capsys, game__prompts="full")


@pytest.mark.parametrize("objective", ["faithful", "gspo"])
def test_objectives_run_as_they_are_and_in_minibatches(
    objective: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.write_model(tmp_path / "model", tiny.taught_decoder(adapters=False))
    extra = {} if objective == "faithful" else {"train__minibatches": 2, "loss__kl_weight": "0.01"}
    run(folder, tmp_path / "run", capsys, objective=objective, **extra)


def test_one_agent_can_be_frozen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file

    folder = tiny.write_model(tmp_path / "model", tiny.taught_decoder(adapters=False))
    run(folder, tmp_path / "run", capsys, train__train_user=False)
    state = load_file(tmp_path / "run" / "adapters" / "user" / "adapter_model.safetensors")
    assert not any(bool(value.any()) for key, value in state.items() if "lora_B" in key)


def test_a_warm_start_of_the_adapters_alone_leaves_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.write_model(tmp_path / "model", tiny.taught_decoder(adapters=False))
    printed = run(folder, tmp_path / "run", capsys, warm_start=True, sft__trainable="adapters")
    assert "warm start 2/2" in printed
    assert not (tmp_path / "run" / "base").exists()
