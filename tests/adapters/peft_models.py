"""Adapters of many kinds, PEFT's models that have them, and what it means to be equal to one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from chronicals.adapters.lora import (
    LoRA,
    adapter_views,
)
from chronicals.models.decoder import Decoder
from tests.kernels.numerics import relative_error
from tests.models.test_parity import logits_and_loss, reference_logits_and_loss
from tests.models.tiny import documents, reference

TOLERANCE = 1e-5
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VARIANTS = {
    "all": LoRA(4, 8, ALL),
    "q and v": LoRA(3, 16, ("q_proj", "v_proj")),
    "rslora": LoRA(4, 8, ALL, rslora=True),
    "mlp": LoRA(2, 2, ("up_proj", "mlp.down_proj")),
    "patterns": LoRA(
        2,
        4,
        ALL,
        rslora=True,
        rank_pattern={"o_proj": 5, r"layers\.[12]\.mlp\.\w+": 3, "mlp.gate_proj": 6},
        alpha_pattern={"self_attn.o_proj": 7, "k_proj": 3},
    ),
    "layers": LoRA(2, 4, ALL, layers_to_transform=(0, 2), layers_pattern=("h", "layers")),
    "excluded": LoRA(2, 4, ALL, layers_to_transform=(1,), exclude_modules=("mlp.up_proj", "layers.1.self_attn.k_proj")),
    "dora": LoRA(4, 8, ALL, dora=True),
    "dora on q and v": LoRA(3, 6, ("q_proj", "v_proj", "down_proj"), dora=True, rslora=True),
    "lora_only": LoRA(2, 4, ("q_proj", "v_proj", "up_proj"), bias="lora_only"),
    "all biases": LoRA(2, 4, ("q_proj", "o_proj"), bias="all"),
    "embeddings": LoRA(2, 4, ("q_proj", "down_proj"), modules_to_save=("embed_tokens", "lm_head")),
    "tied": LoRA(2, 4, ("q_proj",), modules_to_save=("embed_tokens",), ensure_weight_tying=True),
    "head alone": LoRA(2, 4, ("q_proj",), modules_to_save=("lm_head",)),
    "norms": LoRA(2, 4, ("v_proj",), modules_to_save=("norm", "q_norm", "k_norm")),
    "whole modules": LoRA(2, 4, ("v_proj", "o_proj"), modules_to_save=("k_proj", "mlp")),
    "one layer": LoRA(2, 4, ("layers.1.self_attn.k_proj", "layers.2.mlp.gate_proj")),
}
FAMILIES = ("llama-linear-rope-biases", "qwen2-tied", "qwen3")


def theirs_of(name: str, lora: LoRA, folder: Path, **options: Any) -> nn.Module:
    """PEFT's model with random A and B, saved in `folder`."""
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        use_rslora=lora.rslora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        layers_to_transform=lora.layers_to_transform and list(lora.layers_to_transform),
        layers_pattern=list(lora.layers_pattern) or None,
        exclude_modules=list(lora.exclude_modules) or None,
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        bias=lora.bias,
        modules_to_save=list(lora.modules_to_save) or None,
        ensure_weight_tying=lora.ensure_weight_tying,
        task_type="CAUSAL_LM",
        **options,
    )
    model = peft.get_peft_model(reference(name), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                drawn = torch.empty_like(parameter).normal_(0.0, 0.1, generator=generator)
                parameter.copy_(drawn if "lora_A" in key or "lora_B" in key else parameter * (1 + drawn))
    model.save_pretrained(folder)
    return model


def in_order(lora: LoRA) -> LoRA:
    """PEFT keeps names as sets, and names a tied embedding twice."""
    return replace(
        lora,
        targets=tuple(sorted(lora.targets)),
        exclude_modules=tuple(sorted(lora.exclude_modules)),
        modules_to_save=tuple(sorted({name.removeprefix("model.") for name in lora.modules_to_save})),
    )


def plain(name: str) -> str:
    """PEFT's name of a parameter -> its name in the file."""
    return (
        name.replace("modules_to_save.default.", "")
        .replace(".default.weight", ".weight")
        .replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
    )


def assert_equal_to_theirs(ours: Decoder, theirs: nn.Module) -> None:
    """Logits, loss, and every gradient, of the same tensors."""
    streams = documents()
    logits, loss = logits_and_loss(ours, streams)
    expected_logits, expected_loss = reference_logits_and_loss(theirs, streams)
    assert relative_error(logits, expected_logits) < TOLERANCE
    assert loss.item() == pytest.approx(expected_loss.item(), rel=TOLERANCE)
    loss.backward()
    theirs.zero_grad()
    expected_loss.backward()
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert all(p.grad is None for name, p in ours.named_parameters() if name not in trained)
    grads = adapter_views(ours, {name: p.grad for name, p in trained.items()})
    expected = {plain(name): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.norm() > 0, name
        assert relative_error(grads[name], grad) < TOLERANCE, name
