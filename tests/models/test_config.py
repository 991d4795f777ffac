"""config.json: read as transformers reads it, written as transformers reads it, every value honoured or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from chronicals.errors import UserError
from chronicals.models import config as config_module
from chronicals.models.config import ModelConfig
from chronicals.models.families import FAMILIES
from chronicals.models.rope import RopeConfig, rope_to_hf
from tests.models.tiny import CHECKPOINTS, reference

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
SUPPORTED = ", ".join(FAMILIES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, f"model_type 'gpt2' is not supported; use a model of one of {SUPPORTED}"),
        ({"model_type": None}, f"model_type None is not supported; use a model of one of {SUPPORTED}"),
        (
            {"hidden_size": None},
            "hidden_size is None, not a positive integer; take config.json from the model's repository",
        ),
        ({"num_attention_heads": 3}, "num_attention_heads 3 is no multiple of num_key_value_heads 2"),
        ({"head_dim": 7}, "head_dim 7 is odd, rotary embedding turns pairs"),
        (
            {"hidden_act": "relu"},
            "hidden_act 'relu' is not supported; "
            "use a model with one of silu, swish, gelu, gelu_pytorch_tanh, gelu_new",
        ),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1 is not supported; set it to 0.0 in config.json"),
        (
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor 0.5 is not supported for llama; use a model whose whole head is rotated",
        ),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "quantization_config of awq is not supported; use the checkpoint in 16 or 32 bits, and load_in_4bit",
        ),
        ({"pruned_heads": {"1": [0]}}, "pruned_heads {'1': [0]} is not supported; use the unpruned checkpoint"),
        (
            {"rope_scaling": {"type": "su", "factor": 4.0}},
            "rope scaling 'su' is not supported; use one of default, linear, llama3, yarn, longrope",
        ),
        (
            {"rope_scaling": {"type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4}},
            "rope scaling 'longrope' lacks 'long_factor'; take config.json from the model's repository",
        ),
        (
            {"rope_scaling": LONGROPE | {"long_factor": [1.0] * 3}},
            "rope scaling 'longrope' needs 4 numbers in 'long_factor', one for each pair of elements that turns, "
            "not 3; take config.json from the model's repository",
        ),
        (
            {"rope_scaling": LONGROPE | {"short_factor": 2.0}},
            "rope scaling 'longrope' needs 4 numbers in 'short_factor', one for each pair of elements that turns, "
            "not 2.0; take config.json from the model's repository",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0, "beta_fast": 32}},
            "rope parameter 'beta_fast' is not supported; remove it from config.json",
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope scaling 'dynamic' is not supported: its frequencies follow the longest sequence of a batch, so "
            "packed documents would change each other; use 'linear' or 'llama3', or remove it from config.json to "
            "train within the original length",
        ),
        (
            {"rope_scaling": {"type": "linear"}},
            "rope scaling 'linear' lacks 'factor'; take config.json from the model's repository",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 8]}},
            "rope parameter 'mrope_section' is not supported; remove it from config.json",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            "partial_rotary_factor 0.25 is not supported for llama; use a model whose whole head is rotated",
        ),
        (
            {"layer_types": ["sliding_attention"] * 4},
            "layer_types is not supported for llama, whose layers are all alike; remove it from config.json",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention"] * 3},
            "layer_types ['full_attention', 'full_attention', 'full_attention'] is not supported; "
            "give full_attention or sliding_attention for each of the 4 layers",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 4},
            "layer_types has sliding_attention but there is no window; set sliding_window and use_sliding_window",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_not_honoured_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        ModelConfig.from_hf(LLAMA | changes)
    assert str(caught.value) == f"config.json: {message}"


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | {k: v for k, v in LLAMA3.items() if k != "rope_type"}},
        {"rope_theta": 1.0, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    ],
    ids=["old", "new", "oldest", "both"],
)
def test_every_spelling_of_rope_is_read(spelling: dict[str, Any]) -> None:
    expected = RopeConfig("llama3", 5e5, 32.0, 1.0, 4.0, 8192)
    assert ModelConfig.from_hf(LLAMA | spelling).rope == expected


WIDE_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.01 * i for i in range(64)],
    "long_factor": [1.0 + 0.5 * i for i in range(64)],
    "original_max_position_embeddings": 512,
}


@pytest.mark.parametrize(
    ("scaling", "top"),
    [
        ({"rope_type": "default"}, {}),
        ({"rope_type": "linear", "factor": 3.0}, {}),
        (LLAMA3, {}),
        (LLAMA3, {"original_max_position_embeddings": 1024}),
        (YARN, {}),
        (YARN | {"factor": None}, {}),
        (YARN | {"factor": 0.5}, {}),
        (YARN | {"truncate": False, "beta_fast": 20, "beta_slow": 2.0}, {}),
        (YARN | {"attention_factor": 0.77}, {}),
        (YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}, {}),
        (YARN | {"mscale": 0.7}, {}),
        (YARN | {"factor": 40.0, "original_max_position_embeddings": 4}, {}),  # both ends of the ramp cut off
        (YARN, {"original_max_position_embeddings": 256}),
        (WIDE_LONGROPE, {}),
        (WIDE_LONGROPE | {"factor": 32.0}, {}),
        (WIDE_LONGROPE | {"attention_factor": 1.19}, {}),
        (WIDE_LONGROPE | {"original_max_position_embeddings": None}, {"original_max_position_embeddings": 256}),
        (WIDE_LONGROPE | {"original_max_position_embeddings": 4096}, {}),
    ],
    ids=lambda value: value.get("rope_type", "top"),
)
def test_frequencies_are_transformers(scaling: dict[str, Any], top: dict[str, Any]) -> None:
    """Short and long, and the factor of cosines and sines."""
    parameters = {key: value for key, value in scaling.items() if value is not None or key == "factor"}
    sizes = LLAMA | top | {"head_dim": 128, "rope_parameters": parameters | {"rope_theta": 5e5}}
    theirs = transformers.LlamaConfig(**sizes)
    rope = ModelConfig.from_hf(theirs.to_dict()).rope
    for long in (False, True):
        if scaling["rope_type"] == "default":
            expected, attention = LlamaRotaryEmbedding.compute_default_rope_parameters(theirs)
        else:
            expected, attention = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, seq_len=10**6 if long else None)
        torch.testing.assert_close(rope.inv_freq(128, long=long), expected, rtol=2e-7, atol=0)
        assert rope.attention_scaling == pytest.approx(attention, rel=1e-12)


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 3.0}, YARN, WIDE_LONGROPE], ids=str)
@pytest.mark.parametrize(("share", "planes"), [(0.5, 32), (0.75, 48), (0.38, 24)])
def test_frequencies_of_partial_rotation_are_transformers(
    scaling: dict[str, Any], share: float, planes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = replace(FAMILIES["llama"], defaults=FAMILIES["llama"].defaults | {"partial_rotary_factor": 1.0})
    monkeypatch.setattr(config_module, "FAMILIES", {"llama": family})
    scaling = {key: value[:planes] if isinstance(value, list) else value for key, value in scaling.items()}
    parameters = scaling | {"rope_theta": 5e5, "partial_rotary_factor": share}
    theirs = transformers.LlamaConfig(**LLAMA | {"head_dim": 128, "rope_parameters": parameters})
    expected, _ = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs)
    rope = ModelConfig.from_hf(theirs.to_dict()).rope
    assert rope.rotary_dim(128) == 2 * planes
    torch.testing.assert_close(rope.inv_freq(128), expected, rtol=2e-7, atol=0)
    outside = LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling, "partial_rotary_factor": share, "head_dim": 128}
    assert ModelConfig.from_hf(outside).rope == rope
    again = ModelConfig.from_hf(LLAMA | {"head_dim": 128} | rope_to_hf(rope))
    assert again.rope == rope


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_windows_are_transformers(name: str) -> None:
    theirs = reference(name).config
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * theirs.num_hidden_layers
    window = getattr(theirs, "sliding_window", None)
    expected = tuple(window if kind == "sliding_attention" else None for kind in types)
    data = theirs.to_dict()
    assert ModelConfig.from_hf(data).windows == expected
    # older files have no layer_types, only max_window_layers
    assert ModelConfig.from_hf(data | {"layer_types": None}).windows == expected


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_transformers(model_type: str) -> None:
    """A config.json with sizes alone means here what it means there."""
    sizes = {key: LLAMA[key] for key in LLAMA if key not in ("num_key_value_heads", "model_type")}
    sizes |= {"model_type": model_type, "num_attention_heads": 32, "hidden_size": 256}
    theirs = transformers.AutoConfig.for_model(**sizes)
    ours, explicit = ModelConfig.from_hf(sizes), ModelConfig.from_hf(theirs.to_dict())
    assert ours == explicit


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_config_without_source_loads_in_transformers(name: str, tmp_path: Path) -> None:
    """Both spellings of rope are written; transformers reads them as we mean them."""
    source = reference(name).config
    ours = ModelConfig.from_hf(source.to_dict())
    fresh = ModelConfig(**{field: getattr(ours, field) for field in ours.__dataclass_fields__ if field != "source"})
    written = fresh.to_hf()
    again = transformers.AutoConfig.for_model(**written)
    assert ModelConfig.from_hf(again.to_dict()) == ours
    assert again.rope_parameters["rope_theta"] == source.rope_parameters["rope_theta"]
    without_new = {key: value for key, value in written.items() if key != "rope_parameters"}
    assert ModelConfig.from_hf(without_new) == ours


def test_unknown_and_unchanged_keys_are_kept() -> None:
    data = LLAMA | {
        "rope_theta": 7.0,
        "rope_scaling": None,
        "custom": {"a": 1},
        "eos_token_id": [1, 2],
        "num_key_value_heads": None,
    }
    out = ModelConfig.from_hf(data).to_hf()
    assert out == data | {"architectures": ["LlamaForCausalLM"]}
