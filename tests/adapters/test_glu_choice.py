"""Who computes a layer's GLU: one choice for both directions, so that the product that backward makes again is the one
that forward made, whatever forms the projections around it have."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from chronicals.adapters.lora import LoRA, dropout_counter
from chronicals.kernels.glu_matmul import MatmulThenGLU
from chronicals.kernels.ops import REFERENCE
from chronicals.models.decoder import Decoder
from chronicals.models.layer import Recompute
from chronicals.train.precision import told_apart
from tests.adapters.test_joined import ALL, gradients, model_of


class Inside(MatmulThenGLU):
    """In place of Hopper's kernels: the same product in both directions, and other bits than the GLU's own pass."""

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        gate_up, product = super().forward(*args, **options)
        return gate_up, None if product is None else product.mul_(1 + 2**-9)

    def backward(self, *args: Any, **options: Any) -> Tensor | None:
        product = super().backward(*args, **options)
        return None if product is None else product.mul_(1 + 2**-9)


OPS = replace(REFERENCE, glu_matmul=Inside(REFERENCE.glu_forward, REFERENCE.glu_backward))
LORA = LoRA(4, 8, ALL)
GATE, DOWN = ("q_proj", "gate_proj"), ("q_proj", "down_proj")
CASES: dict[str, tuple[LoRA, dict[str, Any], bool]] = {  # and whether the GLU is inside its matmuls
    "lora": (LORA, {}, True),
    "lora of attention": (replace(LORA, targets=("q_proj",)), {}, True),
    "gate up by itself": (LORA, {"joined": ("qkv_proj", "o_proj", "down_proj")}, False),
    "down by itself": (LORA, {"joined": ("qkv_proj", "o_proj", "gate_up_proj")}, False),
    "lora beside a trained down": (replace(LORA, targets=GATE, modules_to_save=("down_proj",)), {}, True),
    "lora beside a trained up": (replace(LORA, targets=DOWN, modules_to_save=("up_proj",)), {}, True),
    "lora inside a trained gate": (
        replace(LORA, targets=(*DOWN, "up_proj"), modules_to_save=("gate_proj",)),
        {},
        False,
    ),
    "dropout": (replace(LORA, dropout=0.3), {}, True),
    "dropout before gate": (replace(LORA, targets=GATE, dropout=0.3), {}, True),
    "dropout before down": (replace(LORA, targets=DOWN, dropout=0.3), {}, True),
    "dora": (replace(LORA, dora=True), {}, False),
    "dora of gate": (replace(LORA, targets=GATE, dora=True), {}, False),
    "dora of gate beside a trained down": (
        replace(LORA, targets=GATE, dora=True, modules_to_save=("down_proj",)),
        {},
        False,
    ),
    "dora of down": (replace(LORA, targets=DOWN, dora=True), {}, True),
    "dora with dropout": (replace(LORA, dora=True, dropout=0.3), {}, False),
}


def built(case: str) -> Decoder:
    lora, options, _ = CASES[case]
    model = model_of("biases everywhere", lora, torch.float32, OPS, **options)
    dropout_counter(model).fill_(3)
    return model


def chosen(model: Decoder) -> list[MatmulThenGLU]:
    return [layer._halves[1].glu.matmul for layer in model.layers]


@pytest.mark.parametrize("policy", ["light", "mlp"])
@pytest.mark.parametrize("case", CASES)
def test_the_product_again_has_forwards_bits(case: str, policy: Recompute) -> None:
    """Gradients are those with forward's product kept. (`full` runs forward again.)"""
    model = built(case)
    model.set_recompute("none")
    expected = gradients(model)
    model.set_recompute(policy)
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert [name for name, gradient in expected.items() if not torch.equal(found[name], gradient)] == []


@pytest.mark.parametrize("case", CASES)
def test_inside_its_matmuls_where_both_can(case: str) -> None:
    model, inside = built(case), CASES[case][2]
    kind = Inside if inside else MatmulThenGLU
    assert [type(matmul) for matmul in chosen(model)] == [kind, kind]
    assert [type(matmul) for matmul in chosen(deepcopy(model))] == [kind, kind]


def test_layer_by_layer_and_what_the_header_says() -> None:
    lora = replace(LORA, dora=True, layers_to_transform=(1,))
    model = model_of("window", lora, torch.float32, OPS)
    assert [type(matmul) for matmul in chosen(model)] == [Inside, MatmulThenGLU]
    assert told_apart(model) == " (behind those of 1 layer, for its adapters)"
    assert told_apart(built("dora")) == " (behind those of 2 layers, for their adapters)"
    assert told_apart(built("lora")) == told_apart(model_of("window", lora)) == "", "no GLU inside, nothing to say"
