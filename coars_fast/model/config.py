"""What a decoder's checkpoint says about its shape, read from transformers' config and checked.

Left out, each with an error that names the field: sliding windows, rotary scalings other than linear and llama3,
partial rotation, activations other than SiLU, quantised weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from coars_fast.errors import ModelError

__all__ = ["FAMILIES", "DecoderConfig", "RopeScaling"]

Family = Literal["llama", "qwen2", "qwen3"]
FAMILIES: tuple[str, ...] = get_args(Family)


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the rotary frequencies are stretched beyond the trained length."""

    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a Llama, Qwen2 or Qwen3 decoder."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    attention_bias: bool = False
    """Biases on the q, k and v projections; Llama and Qwen3 then also have one on the output projection."""
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ModelError(f"family: {self.family!r} is not one of {', '.join(FAMILIES)}")
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers")
        for name in (*sizes, "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name}: {getattr(self, name)} is not a positive number")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(f"num_kv_heads: {self.num_kv_heads} does not divide the {self.num_heads} query heads")
        if self.head_dim % 2:
            raise ModelError(f"head_dim: {self.head_dim} is odd; rotary embedding needs pairs")

    @property
    def output_bias(self) -> bool:
        """Whether the attention's output projection has a bias (never in Qwen2)."""
        return self.attention_bias and self.family != "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head (Qwen3)."""
        return self.family == "qwen3"

    @classmethod
    def from_hf(cls, config: Any, *, source: str = "config") -> DecoderConfig:
        """From a transformers config object, or the dict in a config.json (old and new spelling of the rotary fields).

        Args:
            config: a `PretrainedConfig` or a mapping; fields that a mapping leaves out take transformers' defaults.
            source: the file to name in errors.

        Raises:
            ModelError: an architecture or a field that this decoder does not support; names `source` and the field.
        """
        raw = dict(config) if isinstance(config, Mapping) else config.to_dict()
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise ModelError(f"{source}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
        full = _with_defaults(raw, source)
        _refuse_unsupported(full, source)
        theta, scaling = _rope(full, source)
        heads = full["num_attention_heads"]
        try:
            return cls(
                family=family,
                vocab_size=full["vocab_size"],
                hidden_size=full["hidden_size"],
                intermediate_size=full["intermediate_size"],
                num_layers=full["num_hidden_layers"],
                num_heads=heads,
                num_kv_heads=full.get("num_key_value_heads") or heads,
                head_dim=full.get("head_dim") or full["hidden_size"] // heads,
                rms_norm_eps=full["rms_norm_eps"],
                rope_theta=theta,
                rope_scaling=scaling,
                attention_bias=family == "qwen2" or bool(full.get("attention_bias")),
                mlp_bias=bool(full.get("mlp_bias")),
                tie_word_embeddings=bool(full.get("tie_word_embeddings")),
                max_position_embeddings=full["max_position_embeddings"],
            )
        except ModelError as error:
            raise ModelError(f"{source}: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """The fields of a stock config.json that `transformers.AutoModelForCausalLM` loads."""
        rope: dict[str, Any] = {"rope_theta": self.rope_theta, "rope_type": self.rope_scaling.kind}
        if self.rope_scaling.kind != "default":
            rope["factor"] = self.rope_scaling.factor
        if self.rope_scaling.kind == "llama3":
            for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
                rope[name] = getattr(self.rope_scaling, name)
        fields: dict[str, Any] = {
            "architectures": [{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[self.family] + "ForCausalLM"],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": rope,
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": self.max_position_embeddings,
            "attention_dropout": 0.0,
            "use_cache": True,
        }
        if self.family != "qwen2":
            fields["attention_bias"] = self.attention_bias
        if self.family == "llama":
            fields["mlp_bias"] = self.mlp_bias
        else:
            fields["use_sliding_window"] = False
        return fields


def _with_defaults(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """The config as transformers completes it, so that a field left out means the same here and there."""
    from transformers import AutoConfig  # imported late: seconds, and only needed where a model is read

    rest = {name: value for name, value in raw.items() if name not in ("model_type", "transformers_version")}
    kind = _rope_fields(raw).get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):  # before transformers complains in its own words
        raise ModelError(f"{source}: rope_type {kind!r} is not supported; supported are default, linear, llama3")
    try:
        return AutoConfig.for_model(raw["model_type"], **rest).to_dict()
    except Exception as error:  # its validators raise many types; the message names the field
        raise ModelError(f"{source}: transformers rejects this configuration: {error}") from error


def _rope_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary fields under one spelling; before transformers 5 they were `rope_scaling` and `rope_theta`."""
    fields = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    fields.setdefault("rope_type", fields.get("type", "default"))
    if "rope_theta" not in fields and config.get("rope_theta") is not None:
        fields["rope_theta"] = config["rope_theta"]
    return fields


def _rope(config: Mapping[str, Any], source: str) -> tuple[float, RopeScaling]:
    fields = _rope_fields(config)
    if fields.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"{source}: partial_rotary_factor {fields['partial_rotary_factor']} is not supported; 1.0 is")
    theta, kind = float(fields.get("rope_theta", 10000.0)), fields["rope_type"]
    if kind == "default":
        return theta, RopeScaling()
    needed = ["factor"] + (["low_freq_factor", "high_freq_factor"] if kind == "llama3" else [])
    for name in needed:
        if not isinstance(fields.get(name), int | float):
            raise ModelError(f"{source}: rope_type {kind!r} needs the number {name}, found {fields.get(name)!r}")
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=float(fields["factor"]))
    original = fields.get("original_max_position_embeddings") or config["max_position_embeddings"]
    return theta, RopeScaling(
        kind="llama3",
        factor=float(fields["factor"]),
        low_freq_factor=float(fields["low_freq_factor"]),
        high_freq_factor=float(fields["high_freq_factor"]),
        original_max_position_embeddings=int(original),
    )


def _refuse_unsupported(config: Mapping[str, Any], source: str) -> None:
    """Fields that change the arithmetic and that this decoder would otherwise ignore in silence."""
    layer_types = config.get("layer_types") or []
    if config.get("use_sliding_window") or any(kind != "full_attention" for kind in layer_types):
        found = "use_sliding_window" if config.get("use_sliding_window") else f"layer_types {sorted(set(layer_types))}"
        raise ModelError(f"{source}: {found}: sliding-window attention is not supported; only full attention is")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ModelError(f"{source}: hidden_act {config['hidden_act']!r} is not supported; silu is")
    if config.get("quantization_config"):
        raise ModelError(f"{source}: quantization_config: quantised weights are not supported; use the original model")
