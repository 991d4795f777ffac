"""What a decoder is, as data: read from config.json through the family's table, and written back without losing a key.

A value that changes what transformers computes is honoured or refused by name; nothing is ignored in silence. Left
out: rope scalings yarn and longrope (refused), dynamic (its frequencies follow the longest sequence of a batch, so
packed documents would change each other), quantised checkpoints, attention dropout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from chronicals.errors import UserError
from chronicals.models.families import FAMILIES, Family

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
# fields that config.json calls as we do
_SAME_NAMES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
)
_ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary frequencies: `theta` and a scaling. Factors that the scaling does not use are None."""

    type: str = "default"
    theta: float = 10000.0
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def inv_freq(self, head_dim: int) -> Tensor:
        """(head_dim / 2,) float32 on the CPU, radians per position, rounded as transformers rounds them.

        Scalings: linear divides all by `factor` (position interpolation, Chen et al. 2023); llama3 divides
        wavelengths longer than `original / low_freq_factor` by `factor`, keeps those shorter than `original /
        high_freq_factor`, and blends between.
        """
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        plain = 1.0 / (self.theta**exponents)
        if self.type == "default":
            return plain
        assert self.factor is not None
        if self.type == "linear":
            return plain / self.factor
        low, high, original = self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings
        assert low is not None
        assert high is not None
        assert original is not None
        turns = original / (2 * math.pi / plain)
        blend = (turns - low) / (high - low)
        blended = (1 - blend) * plain / self.factor + blend * plain
        scaled = torch.where(turns < low, plain / self.factor, blended)
        return torch.where(turns > high, plain, scaled)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder by data. Sizes are in elements; `windows[i]` is the number of keys that layer i's queries see, None
    for all.

    `source` is the config.json this was read from; `to_hf` keeps its keys.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    activation: str
    rope: RopeConfig
    windows: tuple[int | None, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    initializer_range: float
    source: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Reads the content of a config.json.

        Raises:
            UserError: an unsupported family, a missing size, or a value that this decoder does not honour.
        """
        family = _family(data)
        _refuse_unsupported(data)
        get = _reader(data, family)
        hidden, heads = _size(data, "hidden_size"), _size(data, "num_attention_heads")
        key_value_heads = get("num_key_value_heads") or heads
        if heads % key_value_heads:
            raise UserError(
                f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {key_value_heads}"
            )
        head_dim = get("head_dim") or hidden // heads
        if head_dim % 2:
            raise UserError(f"config.json: head_dim {head_dim} is odd, rotary embedding turns pairs")
        activation = get("hidden_act")
        if activation not in _ACTIVATIONS:
            raise UserError(
                f"config.json: hidden_act {activation!r} is not supported",
                f"use a model with one of {', '.join(_ACTIVATIONS)}",
            )

        def bias(switch: bool | str) -> bool:
            return bool(get(switch)) if isinstance(switch, str) else switch

        return cls(
            family=family.model_type,
            vocab_size=_size(data, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_size(data, "intermediate_size"),
            num_hidden_layers=_size(data, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            head_dim=head_dim,
            rms_norm_eps=get("rms_norm_eps"),
            activation=_ACTIVATIONS[activation],
            rope=_rope(data, get("rope_theta")),
            windows=_windows(data, family),
            qkv_bias=bias(family.qkv_bias),
            o_bias=bias(family.o_bias),
            mlp_bias=bias(family.mlp_bias),
            qk_norm=family.qk_norm,
            tie_word_embeddings=bool(get("tie_word_embeddings")),
            initializer_range=get("initializer_range"),
            source=dict(data),
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of a config.json that transformers 4 and 5 read; what `source` says already stays as it is."""
        family = FAMILIES[self.family]
        before = ModelConfig.from_hf(self.source) if self.source else None

        def changed(name: str) -> bool:
            return before is None or getattr(before, name) != getattr(self, name)

        out = dict(self.source) | {"architectures": [family.architecture], "model_type": family.model_type}
        out |= {name: getattr(self, name) for name in _SAME_NAMES if changed(name)}
        for name, switch in (("qkv_bias", family.qkv_bias), ("o_bias", family.o_bias), ("mlp_bias", family.mlp_bias)):
            if isinstance(switch, str) and changed(name):
                out[switch] = getattr(self, name)
        if changed("activation"):
            out["hidden_act"] = _ACTIVATION_NAMES[self.activation]
        if changed("rope"):
            out |= _rope_to_hf(self.rope)
        if changed("windows"):
            out |= _windows_to_hf(self.windows, family)
        return out


def _family(data: Mapping[str, Any]) -> Family:
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"config.json: model_type {model_type!r} is not supported", f"use a model of one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def _reader(data: Mapping[str, Any], family: Family) -> Any:
    """key -> its value, or what transformers assumes where config.json leaves it out."""
    return lambda key: data[key] if data.get(key) is not None else family.defaults.get(key)


def _size(data: Mapping[str, Any], key: str) -> int:
    value = data.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(
            f"config.json: {key} is {value!r}, not a positive integer", "take config.json from the model's repository"
        )
    return value


def _refuse_unsupported(data: Mapping[str, Any]) -> None:
    for key, neutral, mend in (
        ("attention_dropout", 0, "set it to 0.0 in config.json"),
        ("partial_rotary_factor", 1, "use a model whose whole head is rotated"),
        ("quantization_config", None, "use the checkpoint in 16 or 32 bits"),
        ("pruned_heads", None, "use the unpruned checkpoint"),
    ):
        value = data.get(key)
        if value and value != neutral:
            raise UserError(f"config.json: {key} {value!r} is not supported", mend)


def _rope(data: Mapping[str, Any], theta: float) -> RopeConfig:
    """Rope of either spelling: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
    # where both stand, transformers 5 lets rope_scaling win
    scaling = data.get("rope_scaling") or data.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "dynamic":
        raise UserError(
            "config.json: rope scaling 'dynamic' is not supported: its frequencies follow the longest sequence of a "
            "batch, so packed documents would change each other",
            "use 'linear' or 'llama3', or remove it from config.json to train within the original length",
        )
    if kind not in _ROPE_KEYS:
        raise UserError(f"config.json: rope scaling {kind!r} is not supported", f"use one of {', '.join(_ROPE_KEYS)}")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_KEYS["llama3"]}
    if unknown := sorted(set(scaling) - known):
        raise UserError(f"config.json: rope parameter {unknown[0]!r} is not supported", "remove it from config.json")
    if scaling.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError(
            f"config.json: partial_rotary_factor {scaling['partial_rotary_factor']!r} is not supported",
            "use a model whose whole head is rotated",
        )
    values = {key: scaling.get(key) for key in _ROPE_KEYS[kind]}
    if kind == "llama3" and values["original_max_position_embeddings"] is None:
        values["original_max_position_embeddings"] = data.get("max_position_embeddings")
    if missing := [key for key, value in values.items() if value is None]:
        raise UserError(
            f"config.json: rope scaling {kind!r} lacks {missing[0]!r}", "take config.json from the model's repository"
        )
    return RopeConfig(type=kind, theta=float(scaling.get("rope_theta") or theta), **values)


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    scaling = {"rope_type": rope.type} | {key: getattr(rope, key) for key in _ROPE_KEYS[rope.type]}
    return {
        "rope_parameters": scaling | {"rope_theta": rope.theta},
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.type == "default" else scaling,
    }


def _windows(data: Mapping[str, Any], family: Family) -> tuple[int | None, ...]:
    """Each layer's window, as transformers derives them."""
    layers = _size(data, "num_hidden_layers")
    window = data.get("sliding_window", family.defaults.get("sliding_window"))
    types = data.get("layer_types")
    match family.windows:
        case "none":
            window, derived = None, ["full_attention"] * layers
        case "all":
            derived = ["full_attention" if window is None else "sliding_attention"] * layers
        case "layer_types":
            window = window if data.get("use_sliding_window") else None
            first = data.get("max_window_layers", family.defaults["max_window_layers"])
            derived = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    if types is not None and family.windows != "layer_types" and list(types) != derived:
        raise UserError(
            f"config.json: layer_types is not supported for {family.model_type}, whose layers are all alike",
            "remove it from config.json",
        )
    types = derived if types is None else types
    if len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
        raise UserError(
            f"config.json: layer_types {types!r} is not supported",
            f"give full_attention or sliding_attention for each of the {layers} layers",
        )
    if window is None and "sliding_attention" in types:
        raise UserError(
            "config.json: layer_types has sliding_attention but there is no window",
            "set sliding_window and use_sliding_window",
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _windows_to_hf(windows: tuple[int | None, ...], family: Family) -> dict[str, Any]:
    sizes = {window for window in windows if window is not None}
    assert len(sizes) <= 1, f"one config.json holds one window size, not {sorted(sizes)}"
    window = sizes.pop() if sizes else None
    match family.windows:
        case "none":
            assert window is None, f"{family.model_type} has no sliding window"
            return {}
        case "all":
            assert len(set(windows)) == 1, f"all layers of {family.model_type} share one window"
            return {"sliding_window": window}
        case "layer_types":
            types = ["full_attention" if window is None else "sliding_attention" for window in windows]
            return {"use_sliding_window": window is not None, "sliding_window": window, "layer_types": types}
