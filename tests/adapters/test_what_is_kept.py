"""What a layer keeps for backward where its projections have adapters: nothing that none of them reads."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from chronicals.adapters.lora import LoRA, dropout_counter
from chronicals.models.attention import AttentionHalf
from chronicals.models.decoder import Decoder
from chronicals.models.layer import Recompute
from chronicals.models.mlp import MLPHalf, MLPSaved
from tests.adapters.test_joined import ALL, POLICIES, gradients, model_of
from tests.models.test_layer import loss_of

LORA = LoRA(4, 8, ALL)
ATTENTION = {"x", "rstd", "qkv", "turned", "out", "lse"}
MLP = {"x", "rstd", "gate_up"}
NORMED, PRODUCT = {"normed"}, {"product"}
APART, PRODUCT_APART = {"normed_kept"}, {"product_kept"}  # t, which is thin
CASES: dict[str, tuple[LoRA, dict[str, Any], set[str], set[str]]] = {  # and what the halves keep beside the above
    "lora": (LORA, {}, APART, APART | PRODUCT),
    "lora of v and up": (replace(LORA, targets=("v_proj", "up_proj")), {}, APART, APART | PRODUCT),
    "lora of o and down": (replace(LORA, targets=("o_proj", "down_proj")), {}, NORMED, NORMED | PRODUCT),
    "float16": (LORA, {"dtype": torch.float16}, NORMED, NORMED | PRODUCT),
    "dora": (replace(LORA, dora=True), {}, NORMED | {"delta"}, NORMED | PRODUCT | {"delta"}),
    "dora of down": (replace(LORA, targets=("down_proj",), dora=True), {}, NORMED, NORMED | PRODUCT | {"delta"}),
    "not joined": (LORA, {"joined": ()}, NORMED, NORMED | PRODUCT),
    "dropout": (replace(LORA, dropout=0.3), {}, APART, APART | PRODUCT_APART),
    "dropout of down": (replace(LORA, targets=("down_proj",), dropout=0.3), {}, NORMED, NORMED | PRODUCT_APART),
    "dropout, not joined": (replace(LORA, dropout=0.3), {"joined": ()}, NORMED, NORMED | PRODUCT),
}


def built(case: str, **options: Any) -> Decoder:
    model = model_of("window", CASES[case][0], **{"dtype": torch.float32, **CASES[case][1], **options})
    dropout_counter(model).fill_(3)
    return model


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_kept_that_no_projection_reads(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[type, set[str]] = {}

    def watched(half: type) -> Any:
        forward = half.forward  # type: ignore[attr-defined]

        def call(self: Any, *args: Any) -> Any:
            out = forward(self, *args)
            seen[half] = {field.name for field in fields(out[2]) if getattr(out[2], field.name) is not None}
            return out

        return call

    for half in (AttentionHalf, MLPHalf):
        monkeypatch.setattr(half, "forward", watched(half))
    model = built(case)
    model.set_recompute("none")
    loss_of(model)
    *_, attention, mlp = CASES[case]
    assert seen == {AttentionHalf: ATTENTION | attention, MLPHalf: MLP | mlp}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", ["lora", "dropout", "dropout of down"])
def test_gradients_have_the_bits_of_everything_kept(
    case: str, policy: Recompute, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(case).train(training)
    model.set_recompute(policy)
    found = gradients(model)
    for half in (AttentionHalf, MLPHalf):
        monkeypatch.setattr(half, "unread", ())
    expected = gradients(model)
    assert [name for name, gradient in expected.items() if not torch.equal(found[name], gradient)] == []


@pytest.mark.parametrize(("case", "normed", "product"), [("lora", False, True), ("dropout of down", True, False)])
def test_a_layer_that_runs_again_keeps_no_more(
    case: str, normed: bool, product: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, ...]] = []
    backward = MLPHalf.backward

    def watched(self: MLPHalf, saved: MLPSaved, *args: Any) -> Tensor | None:
        seen.append((saved.normed is not None, saved.product is not None))
        return backward(self, saved, *args)

    monkeypatch.setattr(MLPHalf, "backward", watched)
    model = built(case)
    model.set_recompute("full")
    gradients(model)
    assert seen == [(normed, product)] * 2
