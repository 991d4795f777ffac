"""Dropout and DoRA joined with the weights: the numbers of the unfused ones, masks included."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from chronicals.adapters.joined import JoinedLoRA
from chronicals.adapters.joined_variants import JoinedDoRA, JoinedDropout, JoinedNF4DoRA, JoinedNF4Dropout
from chronicals.adapters.lora import LoRA, adapter_tensors, add_lora, all_linear, dropout_counter
from chronicals.adapters.unfused import DoRAProjection
from chronicals.models.config import ModelConfig
from chronicals.models.decoder import Decoder
from chronicals.models.hf import load_model
from chronicals.models.layer import Recompute
from chronicals.models.projection import Projection
from chronicals.models.quantization import NF4
from chronicals.train.gradients import Gradients
from tests.adapters.test_joined import ALL, POLICIES, gradients, model_of
from tests.adapters.test_joined import VARIANTS as PLAIN
from tests.kernels.numerics import nan_filled_memory, relative_error
from tests.models.test_layer import MODELS as LAYERS
from tests.models.test_layer import SIZES, loss_of
from tests.models.test_nf4 import SIZES as NF4_SIZES
from tests.models.tiny import reference_of

KINDS = {"dropout": JoinedDropout, "dora": JoinedDoRA}
MODELS = ("biases everywhere", "normed heads, tied")


def variant_of(kind: str, targets: str = "all") -> LoRA:
    return replace(PLAIN[targets], **({"dropout": 0.3} if kind == "dropout" else {"dora": True}))


def assert_alike(joined: Decoder, unfused: Decoder, tolerance: float = 1e-10) -> None:
    assert loss_of(joined).item() == pytest.approx(loss_of(unfused).item(), rel=tolerance)
    found, expected = gradients(joined), gradients(unfused)
    assert found.keys() == expected.keys() == {n for n, p in joined.named_parameters() if p.requires_grad}
    for key, gradient in expected.items():
        assert gradient.norm() > 0 and relative_error(found[key], gradient) < tolerance, key


def pair(name: str, lora: LoRA, dtype: torch.dtype = torch.float64) -> list[Decoder]:
    """A model joined and one unfused, magnitudes beside the norms, in a micro-batch that is not the first."""
    models = [model_of(name, lora, dtype), model_of(name, lora, dtype, joined=())]
    for model in models:
        dropout_counter(model).fill_(3)
        for key, tensor in adapter_tensors(model).items():
            if "magnitude" in key:
                tensor.add_(1.5)
    return models


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", PLAIN)
def test_values_and_gradients_are_the_unfused_ones(targets: str, kind: str, policy: Recompute) -> None:
    joined, unfused = pair(MODELS[0], variant_of(kind, targets))
    assert {type(m) for m in joined.modules() if isinstance(m, Projection)} <= {KINDS[kind], Projection}
    joined.set_recompute(policy)
    assert_alike(joined, unfused)


@pytest.mark.parametrize("kind", KINDS)
def test_of_other_models(kind: str) -> None:
    assert_alike(*pair(MODELS[1], variant_of(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_beside_trained_biases(kind: str) -> None:
    """DoRA scales what the bias is added to."""
    assert_alike(*pair(MODELS[0], replace(variant_of(kind), bias="all")))


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation(kind: str) -> None:
    """Nothing is dropped, and gradients are there too."""
    joined, unfused = pair(MODELS[0], variant_of(kind))
    assert_alike(joined.eval(), unfused.eval())


def test_masks_are_of_the_micro_batch() -> None:
    joined, unfused = pair(MODELS[0], variant_of("dropout"))
    before = loss_of(joined).item()
    for model in (joined, unfused):
        dropout_counter(model).add_(1)
    assert_alike(joined, unfused)
    assert loss_of(joined).item() != before
    assert loss_of(joined).item() == loss_of(joined).item()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_buffers_of_our_own_get_the_same(kind: str, accumulate: bool) -> None:
    model = pair(MODELS[0], replace(variant_of(kind, "patterns"), bias="lora_only"), torch.float32)[0]
    expected = gradients(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept = Gradients(model, trained, accumulate=accumulate)
    for times in (1, 2):
        for buffer in () if accumulate else kept.buffers.values():
            buffer.fill_(float("nan"))  # as what was lent to the head
        loss_of(model).backward()
        kept.finish(model.ops.reduce_partials)
        for name, gradient in expected.items():
            assert relative_error(kept.buffers[name], gradient * (times if accumulate else 1)) < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_that_changed_is_never_stale(kind: str) -> None:
    models = pair(MODELS[0], variant_of(kind))
    gradients(models[0])
    for model in models:
        for tensor in adapter_tensors(model).values():
            tensor.mul_(1.5)
    assert_alike(*models)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["patterns", "one layer"])
def test_nothing_unwritten_is_read(targets: str, kind: str, policy: Recompute) -> None:
    with nan_filled_memory():
        model = pair(MODELS[0], variant_of(kind, targets))[0]
        model.set_recompute(policy)
        assert all(bool(gradient.isfinite().all()) for gradient in gradients(model).values())


def errors_of_bf16(kind: str, micro: int) -> tuple[dict[str, float], dict[str, float]]:
    """Of each gradient of a micro-batch, from float64: joined, and not."""
    found = []
    for dtype, which in ((torch.float64, 1), (torch.bfloat16, 0), (torch.bfloat16, 1)):
        model = pair(MODELS[0], variant_of(kind), dtype)[which]
        dropout_counter(model).fill_(micro)
        found.append(gradients(model))
    exact, *others = found
    joined, unfused = ({name: relative_error(other[name], g) for name, g in exact.items()} for other in others)
    return joined, unfused


def test_dora_in_bf16_is_as_near_to_float64_as_unfused() -> None:
    joined, unfused = errors_of_bf16("dora", 3)
    for measure in (sum, max):
        assert measure(joined.values()) < 1.2 * measure(unfused.values())


def test_dropout_in_bf16_is_as_near_to_float64_as_unfused() -> None:
    """Each gradient in the middle of micro-batches: one rounding moves all of one, here twice as far, there half."""
    errors = [errors_of_bf16("dropout", micro) for micro in range(20)]
    middle = [statistics.median(joined[name] / unfused[name] for joined, unfused in errors) for name in errors[0][0]]
    assert statistics.median(middle) < 1.1 and max(middle) < 1.3


def test_dora_begins_with_scales_of_one_in_bf16() -> None:
    """But where a norm lies on the edge between two values."""
    sizes = SIZES | {"hidden_size": 32, "intermediate_size": 48} | LAYERS["window"]
    model = Decoder(ModelConfig.from_hf(sizes), dtype=torch.bfloat16)
    model.init_weights(0)
    add_lora(model, variant_of("dora"))
    loss_of(model)
    scales = torch.cat([module.c for module in model.modules() if isinstance(module, JoinedDoRA)])
    off = (scales - 1).abs()
    assert (off < 1e-6).float().mean() > 0.99 and off.max() < 2**-6


@pytest.mark.parametrize("kind", KINDS)
def test_another_dtype_is_joined_again(kind: str) -> None:
    joined, unfused = pair(MODELS[0], variant_of(kind), torch.float32)
    gradients(joined)
    assert_alike(joined.to(torch.float64), unfused.to(torch.float64))


def test_dora_with_dropout_and_trained_weights_are_not_joined() -> None:
    model = model_of(MODELS[0], replace(variant_of("dora"), dropout=0.1))
    assert not any(isinstance(module, JoinedLoRA) for module in model.modules())
    assert sum(isinstance(module, DoRAProjection) for module in model.modules()) == 8


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    reference_of("llama", **NF4_SIZES, attention_bias=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("policy", ["light", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_beside_weights_in_4_bits(plain: Path, kind: str, policy: Recompute) -> None:
    found: list[dict[str, Tensor]] = []
    for joined in (("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), ()):
        model = load_model(plain, quantization=NF4())
        add_lora(model, replace(variant_of(kind), targets=all_linear(model.config)), joined=joined)
        model.train()
        model.set_recompute(policy)
        kinds = {type(module) for module in model.modules() if isinstance(module, JoinedLoRA)}
        assert kinds <= {JoinedNF4Dropout if kind == "dropout" else JoinedNF4DoRA} and bool(kinds) == bool(joined)
        generator = torch.Generator().manual_seed(1)
        for name, tensor in adapter_tensors(model).items():
            if "magnitude" not in name:
                nn.init.normal_(tensor, 0.0, 0.1, generator=generator)
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys() and ALL
    for name, gradient in found[1].items():
        assert gradient.norm() > 0 and relative_error(found[0][name], gradient) < 1e-5, name
