"""One LoRA adapter per agent on a frozen base, both in the same forward pass, in PEFT's file format.

    y = W x + (alpha / rank) * B_g A_g x        g = agent_ids[row], none where it is -1

Every adapted projection has two views of one memory: a buffer stacked over agents, which forward passes without
gradients read as it is (no copies while decoding, and a captured CUDA graph sees every update), and one parameter per
agent and factor, a row of the buffer, so that optimizers, gradient norms and learning rates are per agent without
further care. A forward pass with gradients stacks the parameters, one copy of a few megabytes.

Left out on purpose: dropout, DoRA, rank-stabilised scaling, adapters on embeddings or on the head (the fused losses
read the frozen head and would ignore them).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coars_fast.errors import ConfigError, ModelError
from coars_fast.model.decoder import Decoder, Projection
from coars_fast.model.files import open_safetensors, read_json, write_json, write_safetensors
from coars_kernels import AgentRows, agent_lora

__all__ = [
    "TARGETS",
    "LoraLinear",
    "adapter_parameters",
    "adapter_state",
    "add_adapters",
    "load_adapter_state",
    "load_peft",
    "save_peft",
]

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections that can carry an adapter, by their last name."""

_PREFIX = "base_model.model."


class LoraLinear(Projection):
    """A frozen projection with one low-rank update per agent; takes over the weight and bias of `base`.

    Parameters `lora_a.<agent>` [rank, in] and `lora_b.<agent>` [out, rank] are fp32 masters, cast to the activations'
    dtype in use. A starts as PEFT's does (Kaiming-uniform), B at zero, so that a new adapter changes nothing.
    """

    def __init__(
        self, base: Projection, *, rank: int, alpha: float, num_adapters: int, generator: torch.Generator | None = None
    ) -> None:
        nn.Module.__init__(self)  # not Linear's, which would allocate a second weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.scale = rank, alpha / rank
        first = torch.empty(num_adapters, rank, base.in_features)
        for factor in first:  # drawn on the CPU: the same on every device
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=generator)
        device = base.weight.device
        self.stacked_a: Tensor
        self.stacked_b: Tensor
        self.register_buffer("stacked_a", first.to(device), persistent=False)
        second = torch.zeros(num_adapters, base.out_features, rank, device=device)
        self.register_buffer("stacked_b", second, persistent=False)
        self.lora_a = nn.ParameterList([nn.Parameter(factor) for factor in self.stacked_a])
        self.lora_b = nn.ParameterList([nn.Parameter(factor) for factor in self.stacked_b])
        self.register_load_state_dict_post_hook(lambda module, _: module._share_memory())

    @torch.no_grad()
    def _share_memory(self) -> None:
        """Make the parameters views of the stacked buffers again; the parameters' values count."""
        for stacked, factors in ((self.stacked_a, self.lora_a), (self.stacked_b, self.lora_b)):
            for row, factor in zip(stacked, factors, strict=True):
                if factor.data_ptr() != row.data_ptr():
                    row.copy_(factor)
                    factor.data = row

    def _apply(self, fn: Any, recurse: bool = True) -> LoraLinear:
        super()._apply(fn, recurse)
        self._share_memory()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:  # deepcopy takes this way
        super().__setstate__(state)
        self._share_memory()

    def forward(self, x: Tensor, agent_ids: Tensor | AgentRows | None = None) -> Tensor:
        """x [N, in] -> [N, out]; `agent_ids` [N], or prepared (as a decoder with adapters does), or None for the base
        alone."""
        out = F.linear(x, self.weight, self.bias)
        if agent_ids is None:
            return out
        if torch.is_grad_enabled():
            a, b = torch.stack(list(self.lora_a)), torch.stack(list(self.lora_b))
        else:
            a, b = self.stacked_a, self.stacked_b
        return out + agent_lora(x, a.to(x.dtype), b.to(x.dtype), agent_ids, self.scale)


def add_adapters(
    decoder: Decoder,
    *,
    rank: int,
    alpha: float,
    num_adapters: int = 2,
    targets: tuple[str, ...] = TARGETS,
    seed: int = 0,
) -> None:
    """Freeze the decoder and give each of its `targets` projections `num_adapters` fresh adapters, in place.

    Args:
        decoder: all its present parameters stop requiring gradients.
        rank: of the update.
        alpha: the update is scaled by alpha / rank.
        num_adapters: how many agents there are.
        targets: names out of `TARGETS`.
        seed: of the random initial A; the global random state is not touched.

    Raises:
        ConfigError: rank, alpha, num_adapters or targets out of range, or the decoder has adapters already.
    """
    if rank < 1:
        raise ConfigError(f"rank: {rank} is not a positive number")
    if not alpha > 0:
        raise ConfigError(f"alpha: {alpha} is not a positive number")
    if num_adapters < 1:
        raise ConfigError(f"num_adapters: {num_adapters} is not a positive number")
    unknown = [name for name in targets if name not in TARGETS]
    if unknown or not targets:
        raise ConfigError(f"targets: {unknown or 'none given'}; choose from {', '.join(TARGETS)}")
    if _lora_layers(decoder):
        raise ConfigError("decoder: it has adapters already")
    decoder.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for path, module in list(decoder.named_modules()):
        parent, _, name = path.rpartition(".")
        if isinstance(module, Projection) and name in targets:
            adapted = LoraLinear(module, rank=rank, alpha=alpha, num_adapters=num_adapters, generator=generator)
            setattr(decoder.get_submodule(parent), name, adapted)
    decoder.register_forward_pre_hook(partial(_prepare_agents, num_adapters), with_kwargs=True)


def _prepare_agents(
    num_adapters: int, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a forward pass of the decoder: `agent_ids`, its fourth argument, from which every projection would make
    the same mask, becomes `AgentRows`, which makes it once."""
    if len(args) > 3 and isinstance(args[3], Tensor):
        args = (*args[:3], AgentRows(args[3], num_adapters), *args[4:])
    elif isinstance(kwargs.get("agent_ids"), Tensor):
        kwargs = kwargs | {"agent_ids": AgentRows(kwargs["agent_ids"], num_adapters)}
    return args, kwargs


def _lora_layers(decoder: Decoder) -> dict[str, LoraLinear]:
    return {path: module for path, module in decoder.named_modules() if isinstance(module, LoraLinear)}


def _layers_of(decoder: Decoder, agent: int) -> dict[str, LoraLinear]:
    """The adapted projections by path.

    Raises:
        ConfigError: there are none, or none of this number.
    """
    layers = _lora_layers(decoder)
    count = len(next(iter(layers.values())).lora_a) if layers else 0
    if not 0 <= agent < count:
        raise ConfigError(f"agent: {agent} has no adapter; the decoder has {count}")
    return layers


def adapter_parameters(decoder: Decoder, agent: int) -> dict[str, nn.Parameter]:
    """The trainable parameters of one agent, by their name in the decoder: what an optimizer's group takes.

    Raises:
        ConfigError: the decoder has no adapter of this number.
    """
    named: dict[str, nn.Parameter] = {}
    for path, layer in _layers_of(decoder, agent).items():
        named[f"{path}.lora_a.{agent}"] = layer.lora_a[agent]
        named[f"{path}.lora_b.{agent}"] = layer.lora_b[agent]
    return named


def adapter_state(decoder: Decoder, agent: int) -> dict[str, Tensor]:
    """A copy of one agent's adapter under PEFT's keys, fp32 on the CPU.

    Raises:
        ConfigError: the decoder has no adapter of this number.
    """
    state: dict[str, Tensor] = {}
    for path, layer in _layers_of(decoder, agent).items():
        state[f"{_PREFIX}{path}.lora_A.weight"] = layer.lora_a[agent].detach().cpu().clone()
        state[f"{_PREFIX}{path}.lora_B.weight"] = layer.lora_b[agent].detach().cpu().clone()
    return state


@torch.no_grad()
def load_adapter_state(decoder: Decoder, agent: int, state: Mapping[str, Tensor], *, source: str = "state") -> None:
    """Overwrite one agent's adapter; nothing changes if anything is wrong.

    Args:
        decoder, agent: as for `adapter_state`.
        state: tensors of any float dtype and device under PEFT's keys.
        source: the file to name in errors.

    Raises:
        ConfigError: the decoder has no adapter of this number.
        ModelError: missing, unexpected or misshapen tensors, or ones on the embeddings or the head.
    """
    targets: dict[str, nn.Parameter] = {}
    for path, layer in _layers_of(decoder, agent).items():
        targets[f"{_PREFIX}{path}.lora_A.weight"] = layer.lora_a[agent]
        targets[f"{_PREFIX}{path}.lora_B.weight"] = layer.lora_b[agent]
    for key in state:
        if "lm_head" in key or "embed_tokens" in key:
            raise ModelError(f"{source}: tensor {key}: an adapter on the head or the embeddings is not supported")
        if key not in targets:
            raise ModelError(f"{source}: unexpected tensor {key}; the decoder has no such adapter")
    for key, target in targets.items():
        if key not in state:
            raise ModelError(f"{source}: tensor {key} is missing")
        found, expected = list(state[key].shape), list(target.shape)
        if found != expected:
            raise ModelError(f"{source}: tensor {key} has shape {found}, expected {expected}")
        if not bool(torch.isfinite(state[key]).all()):
            raise ModelError(f"{source}: tensor {key} holds values that are not finite")
    for key, target in targets.items():
        target.copy_(state[key])


def save_peft(decoder: Decoder, agent: int, folder: str | Path, base_model_name: str) -> None:
    """Write one agent's adapter as a PEFT folder that `peft.PeftModel.from_pretrained` loads.

    Args:
        decoder, agent: as for `adapter_state`.
        folder: made if need be; its two files are each written beside and renamed.
        base_model_name: the path or hub id of the frozen base, recorded in adapter_config.json.

    Raises:
        ConfigError: the decoder has no adapter of this number.
    """
    layers = _layers_of(decoder, agent)
    first = next(iter(layers.values()))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    alpha = first.scale * first.rank
    config = {
        "base_model_name_or_path": base_model_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": first.rank,
        "target_modules": _leaf_names(layers),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    write_safetensors(folder / "adapter_model.safetensors", adapter_state(decoder, agent))
    write_json(folder / "adapter_config.json", config)


def load_peft(decoder: Decoder, agent: int, folder: str | Path) -> None:
    """Read a PEFT folder into one agent's adapter, which must have its rank, scale and targets.

    Raises:
        ConfigError: the decoder has no adapter of this number.
        MissingModelError: the folder lacks adapter_config.json or adapter_model.safetensors.
        ModelError: another rank, alpha or set of targets, a variant of LoRA that this decoder lacks, or wrong tensors;
            names the file, the field, found and expected.
    """
    folder = Path(folder)
    layers = _layers_of(decoder, agent)
    config_file, weight_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    _check_peft_config(read_json(config_file), layers, config_file)
    if not weight_file.is_file() and (folder / "adapter_model.bin").is_file():
        raise ModelError(f"{folder}: adapter_model.bin is a pickle and is never loaded; safetensors are")
    with open_safetensors(weight_file) as handle:
        state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    load_adapter_state(decoder, agent, state, source=str(weight_file))


def _leaf_names(layers: Mapping[str, LoraLinear]) -> list[str]:
    present = {path.rpartition(".")[2] for path in layers}
    return [name for name in TARGETS if name in present]


def _check_peft_config(config: Mapping[str, Any], layers: Mapping[str, LoraLinear], source: Path) -> None:
    """Everything in adapter_config.json that changes the arithmetic must be what the decoder does."""
    first = next(iter(layers.values()))

    def refuse(field: str, expected: Any) -> None:
        raise ModelError(f"{source}: {field} is {config.get(field)!r}, expected {expected!r}")

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "LORA")
    if config.get("r") != first.rank:
        refuse("r", first.rank)
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or not math.isclose(alpha, first.scale * first.rank, rel_tol=1e-6):
        refuse("lora_alpha", first.scale * first.rank)
    if config.get("bias", "none") != "none":
        refuse("bias", "none")
    variants = ("use_dora", "use_rslora", "use_qalora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern")
    for field in (*variants, "modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication"):
        if config.get(field):
            raise ModelError(f"{source}: {field} is {config[field]!r}, which is not supported; expected none")
    targets = config.get("target_modules")
    if isinstance(targets, list):
        found = {str(name).rpartition(".")[2] for name in targets}
        for name in ("lm_head", "embed_tokens"):
            if name in found:
                raise ModelError(f"{source}: target_modules holds {name}; an adapter there is not supported")
        if found != set(_leaf_names(layers)):
            refuse("target_modules", _leaf_names(layers))
