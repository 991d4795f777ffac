"""The layers' backward pass, written by hand: finite differences, frozen weights, both sinks, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from chronicals.kernels.grad_sink import InPlace
from chronicals.kernels.ops import REFERENCE
from chronicals.models.config import ModelConfig
from chronicals.models.decoder import Decoder
from chronicals.models.half import Stream
from chronicals.models.layer import Recompute
from chronicals.models.mlp import MLPHalf, MLPSaved
from tests.models.tiny import packed

SIZES: dict[str, Any] = {
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
MODELS: dict[str, dict[str, Any]] = {
    "biases everywhere": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "normed heads, tied": {"model_type": "qwen3", "tie_word_embeddings": True},
    "window": {"model_type": "mistral", "sliding_window": 3},
}


def model_of(name: str, dtype: torch.dtype = torch.float64) -> Decoder:
    """Weights far from their initial ones, where every term of a gradient counts."""
    model = Decoder(ModelConfig.from_hf(SIZES | MODELS[name]), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(0.4 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return model


def loss_of(model: Decoder) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    hidden = model(*packed([torch.randint(13, (n,), generator=generator) for n in (7, 1, 4)]))
    return (hidden * torch.randn(hidden.shape, generator=generator)).sum()


def gradients(model: Decoder) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def trained(model: Decoder) -> dict[str, Tensor]:
    """Parameters that `loss_of` depends on: not an untied head."""
    return {name: parameter for name, parameter in model.named_parameters() if "lm_head" not in name}


@pytest.mark.parametrize("name", MODELS)
def test_finite_differences(name: str) -> None:
    """Of every weight, along a random direction."""
    model = model_of(name)
    found, step = gradients(model), 1e-5
    for weight, parameter in trained(model).items():
        gradient = found[weight]
        assert gradient is not None
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        ends = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter += sign * step * direction
                ends.append(loss_of(model).item())
                parameter -= sign * step * direction
        expected = (ends[0] - ends[1]) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-4, abs=1e-5), weight


@pytest.mark.parametrize("policy", ["none", "light", "mlp", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_a_frozen_weight_has_no_gradient_and_changes_no_other(name: str, policy: Recompute) -> None:
    model = model_of(name, torch.float32)
    model.set_recompute(policy)
    expected = gradients(model)
    for frozen in trained(model):
        model.get_parameter(frozen).requires_grad_(False)
        found = gradients(model)
        assert found.pop(frozen) is None
        assert_equal(found, expected)
        model.get_parameter(frozen).requires_grad_(True)


@pytest.mark.parametrize("name", MODELS)
def test_a_frozen_weight_is_never_asked_of_the_sink(name: str) -> None:
    """There is no buffer for it."""
    model = model_of(name, torch.float32)
    expected = gradients(model)
    for frozen in trained(model):
        model.get_parameter(frozen).requires_grad_(False)
        others = {key: torch.zeros_like(p) for key, p in trained(model).items() if key != frozen}
        model.sink = InPlace({model.get_parameter(key): buffer for key, buffer in others.items()}, accumulate=False)
        loss_of(model).backward()
        assert_equal(others, {key: expected[key] for key in others})
        model.get_parameter(frozen).requires_grad_(True)


def test_a_frozen_vector_costs_no_pass_for_its_gradient() -> None:
    asked: list[bool] = []
    widths: list[int] = []

    def sums(x: Tensor, **options: Any) -> Tensor:
        widths.append(x.shape[1])
        return REFERENCE.column_partials(x, **options)

    def watched(*args: Any, weight_grad: bool, **options: Any) -> tuple[Tensor, Tensor | None]:
        asked.append(weight_grad)
        return REFERENCE.rmsnorm_backward(*args, weight_grad=weight_grad, **options)

    ops = replace(REFERENCE, rmsnorm_backward=watched, column_partials=sums)
    model = Decoder(ModelConfig.from_hf(SIZES | MODELS["biases everywhere"]), ops)
    model.init_weights(0)
    model.layers[1].input_layernorm.weight.requires_grad_(False)
    model.layers[1].mlp.gate_up_proj.bias.requires_grad_(False)
    gradients(model)
    assert asked == [True, True, False, True, True], "from the last norm to the first"
    assert widths == [8, 8, 32, 8, 24, 8, 32], "down, o, qkv of the last layer, then all of the first"


def assert_equal(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> None:
    for name, gradient in found.items():
        other = expected[name]
        assert gradient is other is None or (gradient is not None and other is not None), name
        assert gradient is None or other is None or torch.equal(gradient, other), name


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ("none", {"x", "rstd", "normed", "gate_up", "product"}),
        ("light", {"x", "rstd", "gate_up"}),
        ("mlp", {"x", "rstd"}),
        ("full", set()),
    ],
)
def test_what_is_kept(monkeypatch: pytest.MonkeyPatch, policy: Recompute, kept: set[str]) -> None:
    """The policy is that of the first layers, the others are light, which is also the default."""
    seen: list[set[str]] = []
    forward = MLPHalf.forward

    def watched(self: MLPHalf, *args: Any) -> tuple[Tensor, Tensor, MLPSaved]:
        out = forward(self, *args)
        seen.append({name for name, value in vars(out[2]).items() if value is not None})
        return out

    monkeypatch.setattr(MLPHalf, "forward", watched)
    model, light = model_of("window", torch.float32), {"x", "rstd", "gate_up"}
    loss_of(model)
    assert seen == [light, light]
    seen.clear()
    model.set_recompute(policy, 1)
    loss_of(model)
    assert seen == [*([kept] if kept else []), light], "a whole layer keeps nothing of its halves"
    seen.clear()
    model.set_recompute(policy)
    loss_of(model)
    assert seen == ([kept, kept] if kept else [])


@torch.no_grad()
@pytest.mark.parametrize("policy", ["none", "light", "mlp"])
def test_attention_keeps_its_normed_input_only_where_asked(policy: Recompute) -> None:
    model = model_of("window", torch.float32)
    model.set_recompute(policy)
    x, delta = torch.randn(2, 12, 8).unbind()
    half = model.layers[0]._halves[0]
    where = packed([torch.arange(12)])[1:]
    stream = Stream(*model.rotary_emb(*where), *where[1:], model.sink)
    assert (half.forward(x, delta, stream)[2].normed is None) == (policy != "none")


def test_backward_runs_once() -> None:
    """It overwrites what forward kept, so a second time would be wrong without a word."""
    loss = loss_of(model_of("window", torch.float32))
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="it runs once"):
        loss.backward()


def test_both_outputs_of_a_unit_belong_to_one_sum() -> None:
    model = model_of("window", torch.float32)
    layer: Callable[..., tuple[Tensor, Tensor]] = model.layers[0].forward

    def leaking(*args: Any) -> tuple[Tensor, Tensor]:
        residual, delta = layer(*args)
        return residual * 2, delta

    model.layers[0].forward = leaking  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="both outputs feed one sum"):
        loss_of(model).backward()
