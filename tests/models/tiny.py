"""Tiny random checkpoints of every family, with weights large enough that a wrong rope, norm or window shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

_SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 8.0,
}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [3.0, 4.0, 6.0, 9.0],
    "original_max_position_embeddings": 36,  # two of the documents are longer
}
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3-rope": ("llama", {"rope_parameters": _LLAMA3_ROPE, "head_dim": 16}),
    "llama-linear-rope-biases": (
        "llama",
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
            "attention_bias": True,
            "mlp_bias": True,
            "hidden_act": "gelu_pytorch_tanh",
        },
    ),
    "llama-yarn": ("llama", {"rope_parameters": _YARN_ROPE, "head_dim": 16}),
    "llama-longrope": ("llama", {"rope_parameters": _LONG_ROPE}),
    "mistral-window": ("mistral", {"sliding_window": 5, "head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-untied": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-tied-biases": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True, "attention_bias": True}),
}
LENGTHS = (37, 1, 60, 8)


def reference(name: str) -> nn.Module:
    """transformers' model of a checkpoint of `CHECKPOINTS`, float32, matrices eight times their usual size."""
    model_type, options = CHECKPOINTS[name]
    return reference_of(model_type, **options)


def reference_of(model_type: str, **options: Any) -> nn.Module:
    """The same of any model type, for what no family of ours has."""
    config = transformers.AutoConfig.for_model(model_type, **(_SIZES | options))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def save_reference(name: str, folder: Path) -> nn.Module:
    """Writes the checkpoint as transformers does and returns its model."""
    model = reference(name)
    model.save_pretrained(folder)
    return model


def edit_config(folder: Path, **values: Any) -> None:
    """Changes keys of the folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def documents(vocab_size: int = 101) -> list[Tensor]:
    """One random document per length of `LENGTHS`."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (n,), generator=generator) for n in LENGTHS]


def packed(streams: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, int]:
    """tokens, positions, cu_seqlens (with unused entries) and max_seqlen of documents laid end to end."""
    lengths = [len(stream) for stream in streams]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    cu_seqlens = torch.cat((bounds, bounds[-1:].expand(3))).int()
    return torch.cat(streams), torch.cat([torch.arange(n) for n in lengths]).int(), cu_seqlens, max(lengths)
