"""What a decoder is, as data: read from config.json through the family's table, and written back without losing a key.

A value that changes what transformers computes is honoured or refused by name; nothing is ignored in silence. Left
out: attention dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from chronicals.errors import UserError
from chronicals.models.families import FAMILIES, Family
from chronicals.models.quantization import NF4, quantization_of
from chronicals.models.rope import RopeConfig, rope_from_hf, rope_to_hf

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
    quantization: NF4 | None = None  # of the checkpoint
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
            rope=rope_from_hf(data, family, head_dim),
            windows=_windows(data, family),
            qkv_bias=bias(family.qkv_bias),
            o_bias=bias(family.o_bias),
            mlp_bias=bias(family.mlp_bias),
            qk_norm=family.qk_norm,
            tie_word_embeddings=bool(get("tie_word_embeddings")),
            initializer_range=get("initializer_range"),
            quantization=quantization_of(data),
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
            out |= rope_to_hf(self.rope)
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
        ("pruned_heads", None, "use the unpruned checkpoint"),
    ):
        value = data.get(key)
        if value and value != neutral:
            raise UserError(f"config.json: {key} {value!r} is not supported", mend)


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
