"""One literal table per model family: what its checkpoints and its config.json are called, and what transformers
builds into it.

A family says everything in which it differs; `ModelConfig` reads config.json through it and `hf.py` reads checkpoints
through it. Keys that transformers itself does not read for a family (leftovers of training scripts) are kept on save
and otherwise mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# our parameter -> its Hugging Face tensors; several are parts of one fused weight, stacked along dimension 0; `{i}` is
# the layer
_LLAMA_TENSORS: Mapping[str, tuple[str, ...]] = {
    "embed_tokens.weight": ("model.embed_tokens.weight",),
    "layers.{i}.input_layernorm.weight": ("model.layers.{i}.input_layernorm.weight",),
    "layers.{i}.self_attn.qkv_proj.weight": (
        "model.layers.{i}.self_attn.q_proj.weight",
        "model.layers.{i}.self_attn.k_proj.weight",
        "model.layers.{i}.self_attn.v_proj.weight",
    ),
    "layers.{i}.self_attn.qkv_proj.bias": (
        "model.layers.{i}.self_attn.q_proj.bias",
        "model.layers.{i}.self_attn.k_proj.bias",
        "model.layers.{i}.self_attn.v_proj.bias",
    ),
    "layers.{i}.self_attn.q_norm.weight": ("model.layers.{i}.self_attn.q_norm.weight",),
    "layers.{i}.self_attn.k_norm.weight": ("model.layers.{i}.self_attn.k_norm.weight",),
    "layers.{i}.self_attn.o_proj.weight": ("model.layers.{i}.self_attn.o_proj.weight",),
    "layers.{i}.self_attn.o_proj.bias": ("model.layers.{i}.self_attn.o_proj.bias",),
    "layers.{i}.post_attention_layernorm.weight": ("model.layers.{i}.post_attention_layernorm.weight",),
    "layers.{i}.mlp.gate_up_proj.weight": (
        "model.layers.{i}.mlp.gate_proj.weight",
        "model.layers.{i}.mlp.up_proj.weight",
    ),
    "layers.{i}.mlp.gate_up_proj.bias": ("model.layers.{i}.mlp.gate_proj.bias", "model.layers.{i}.mlp.up_proj.bias"),
    "layers.{i}.mlp.down_proj.weight": ("model.layers.{i}.mlp.down_proj.weight",),
    "layers.{i}.mlp.down_proj.bias": ("model.layers.{i}.mlp.down_proj.bias",),
    "norm.weight": ("model.norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
}

# what transformers assumes where config.json leaves a key out
_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,  # as many as query heads
    "head_dim": None,  # hidden_size / num_attention_heads
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


@dataclass(frozen=True)
class Family:
    """One family. A bias is built in (True), absent (False), or named by a key of config.json (str).

    `windows`: who sees a sliding window: no layer ("none"), every layer where `sliding_window` is set ("all"), or the
    layers that `layer_types` or `max_window_layers` name where `use_sliding_window` is true ("layer_types").
    """

    model_type: str
    architecture: str
    windows: Literal["none", "all", "layer_types"]
    tensors: Mapping[str, tuple[str, ...]]
    defaults: Mapping[str, Any]
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        windows="none",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        tensors=_LLAMA_TENSORS,
        defaults=_DEFAULTS,
    ),
    "mistral": Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        windows="all",
        tensors=_LLAMA_TENSORS,
        defaults=_DEFAULTS | {"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        windows="layer_types",
        qkv_bias=True,
        tensors=_LLAMA_TENSORS,
        defaults=_DEFAULTS | {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    ),
    "qwen3": Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        windows="layer_types",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        tensors=_LLAMA_TENSORS,
        defaults=_DEFAULTS
        | {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    ),
}
