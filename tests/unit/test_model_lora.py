"""Two adapters on one frozen base: who gets which update, who gets a gradient, and one memory under two views."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from coars_fast.errors import ConfigError
from coars_fast.model.attention import PackedAttention
from coars_fast.model.decoder import Decoder, DecoderConfig
from coars_fast.model.lora import LoraLinear, adapter_parameters, adapter_state, add_adapters, load_adapter_state
from coars_kernels import AgentRows

CONFIG = DecoderConfig(
    family="qwen3",
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    tie_word_embeddings=True,
)
LENGTHS = (9, 6)
AGENTS = torch.tensor([0] * 9 + [1] * 6, dtype=torch.int8)


def fresh(*, noise: bool = False) -> Decoder:
    decoder = Decoder(CONFIG, generator=torch.Generator().manual_seed(0))
    add_adapters(decoder, rank=4, alpha=8.0, seed=1)
    if noise:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for agent in (0, 1):
                for parameter in adapter_parameters(decoder, agent).values():
                    parameter.normal_(0.0, 0.3, generator=generator)
    return decoder


def run(decoder: Decoder, agent_ids: torch.Tensor | None, *, by_name: bool = False) -> torch.Tensor:
    token_ids = torch.randint(0, 50, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
    position_ids = torch.cat([torch.arange(length) for length in LENGTHS])
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    if by_name:
        return decoder(token_ids, position_ids, PackedAttention(bounds), agent_ids=agent_ids)
    return decoder(token_ids, position_ids, PackedAttention(bounds), agent_ids)


def test_fresh_adapters_change_nothing() -> None:
    decoder = fresh()
    assert torch.equal(run(decoder, AGENTS), run(decoder, None))


def test_a_forward_pass_makes_one_mask_for_all_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[AgentRows] = []
    make = AgentRows.__init__

    def remembered(rows: AgentRows, *given: Any) -> None:
        make(rows, *given)
        made.append(rows)

    monkeypatch.setattr(AgentRows, "__init__", remembered)
    decoder = fresh(noise=True)
    by_place = run(decoder, AGENTS)
    by_name = run(copy.deepcopy(decoder), AGENTS, by_name=True)
    assert torch.equal(by_place, by_name) and len(made) == 2 and all(len(rows._masks) == 1 for rows in made)


def test_each_row_gets_its_own_agents_update_only() -> None:
    decoder = fresh(noise=True)
    with torch.no_grad():
        base, mixed = run(decoder, None), run(decoder, AGENTS)
        first, second = run(decoder, torch.zeros_like(AGENTS)), run(decoder, torch.ones_like(AGENTS))
        none = run(decoder, torch.full_like(AGENTS, -1))
        half = run(decoder, torch.where(AGENTS == 0, AGENTS, -torch.ones_like(AGENTS)))
    torch.testing.assert_close(mixed[:9], first[:9])
    torch.testing.assert_close(mixed[9:], second[9:])
    torch.testing.assert_close(none, base)
    torch.testing.assert_close(half, torch.cat([first[:9], base[9:]]))
    assert not torch.allclose(first, second, atol=1e-2)


def test_gradients_reach_the_own_adapter_and_nothing_else() -> None:
    decoder = fresh(noise=True)
    run(decoder, AGENTS)[:9].square().sum().backward()  # the first agent's sequence only
    assert all(p.grad is not None and bool(p.grad.any()) for p in adapter_parameters(decoder, 0).values())
    assert not any(bool(p.grad.any()) for p in adapter_parameters(decoder, 1).values() if p.grad is not None)
    trained = set(adapter_parameters(decoder, 0)) | set(adapter_parameters(decoder, 1))
    assert {name for name, p in decoder.named_parameters() if p.requires_grad} == trained
    assert all(p.grad is None for name, p in decoder.named_parameters() if name not in trained)


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_each_agent_has_its_own_learning_rate_and_decoding_sees_the_update(options: dict[str, Any]) -> None:
    decoder = fresh(noise=True)
    first, second = (list(adapter_parameters(decoder, agent).values()) for agent in (0, 1))
    groups = [{"params": first, "lr": 0.1}, {"params": second, "lr": 0.0}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, **options)
    with torch.no_grad():
        before = run(decoder, AGENTS)
    run(decoder, AGENTS).square().sum().backward()
    optimizer.step()
    with torch.no_grad():  # the stacked buffers
        after = run(decoder, AGENTS)
    torch.testing.assert_close(after, run(decoder, AGENTS).detach())  # the parameters
    assert (after - before)[:9].abs().max() > 1e-2
    assert torch.equal(after[9:], before[9:])


def test_copies_and_casts_keep_both_views_together() -> None:
    decoder = fresh(noise=True)
    for other in (copy.deepcopy(decoder), copy.deepcopy(decoder).to(torch.float64)):
        with torch.no_grad():
            for module in other.modules():
                if isinstance(module, LoraLinear):
                    module.lora_b[0].fill_(7.0)
                    assert bool((module.stacked_b[0] == 7.0).all())
    target = fresh()
    target.load_state_dict(decoder.state_dict())
    target.load_state_dict(decoder.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(run(target, AGENTS), run(decoder, AGENTS))


def test_state_round_trip_and_seed() -> None:
    decoder, other = fresh(noise=True), fresh()
    state = adapter_state(decoder, 1)
    load_adapter_state(other, 0, state)
    found = adapter_state(other, 0)
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight" in state
    expected = torch.rand(1, generator=torch.manual_seed(9))
    torch.manual_seed(9)
    same = adapter_state(fresh(), 0)
    assert all(torch.equal(value, same[key]) for key, value in adapter_state(fresh(), 0).items())
    assert torch.equal(torch.rand(1), expected)  # the global random state is left alone
    first, second = adapter_state(fresh(), 0), adapter_state(fresh(), 1)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert not torch.equal(first[key], second[key])


def test_checkpointed_layers_change_no_gradient() -> None:
    grads = []
    for checkpointing in (False, True):
        decoder = fresh(noise=True)
        decoder.gradient_checkpointing = checkpointing
        run(decoder, AGENTS).square().sum().backward()
        grads.append([p.grad for p in adapter_parameters(decoder, 0).values()])
    for one, other in zip(*grads, strict=True):
        assert one is not None and torch.equal(one, other)


def test_bfloat16_base_keeps_float32_masters() -> None:
    decoder = Decoder(CONFIG).to(torch.bfloat16)
    add_adapters(decoder, rank=2, alpha=2.0)
    assert all(p.dtype == torch.float32 for p in adapter_parameters(decoder, 0).values())
    hidden = run(decoder, AGENTS)
    hidden.float().sum().backward()
    assert hidden.dtype == torch.bfloat16
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in adapter_parameters(decoder, 0).values())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"num_adapters": 0}, "num_adapters"),
        ({"targets": ("q_proj", "lm_head")}, "lm_head"),
        ({"targets": ()}, "targets"),
    ],
)
def test_settings_out_of_range(options: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        add_adapters(Decoder(CONFIG), **{"rank": 2, "alpha": 2.0, **options})  # type: ignore[arg-type]


def test_adapters_are_added_once_and_counted() -> None:
    decoder = fresh()
    with pytest.raises(ConfigError, match="already"):
        add_adapters(decoder, rank=2, alpha=2.0)
    for agent in (-1, 2):
        with pytest.raises(ConfigError, match="agent"):
            adapter_state(decoder, agent)
    with pytest.raises(ConfigError, match="has 0"):
        adapter_parameters(Decoder(CONFIG), 0)
