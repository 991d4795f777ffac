from __future__ import annotations

import pytest
import torch

from chronicals.models.config import ModelConfig
from chronicals.models.decoder import Decoder
from chronicals.train.gradients import Gradients

SIZES = {
    "model_type": "qwen2",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}


def model_of(dtype: torch.dtype) -> Decoder:
    model = Decoder(ModelConfig.from_hf(SIZES), dtype=dtype)
    model.init_weights(0)
    return model


def micro(model: Decoder, gradients: Gradients | None = None, scale: float = 1.0) -> None:
    tokens = torch.randint(11, (16,), generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor([0, 16], dtype=torch.int32)
    hidden = model(tokens, torch.arange(16, dtype=torch.int32), cu_seqlens, 16)
    rows = torch.arange(15, dtype=torch.int32)
    loss = model.ops.linear_cross_entropy(
        hidden, model.head_weight, rows, tokens[1:], torch.tensor([scale]), sink=model.sink
    )
    loss.backward()
    if gradients is not None:
        gradients.finish(model.ops.reduce_partials)


def gradients_of(dtype: torch.dtype, *, accumulate: bool) -> tuple[Decoder, Gradients]:
    model = model_of(dtype)
    return model, Gradients(model, dict(model.named_parameters()), accumulate=accumulate)


@pytest.mark.parametrize("accumulate", [False, True])
def test_equal_to_autograds(accumulate: bool) -> None:
    """Ties included: the head writes, the embedding adds. The second micro-batch writes over the first, or adds."""
    plain = model_of(torch.float32)
    micro(plain)
    model, gradients = gradients_of(torch.float32, accumulate=accumulate)
    for count in range(2):
        micro(model, gradients)
        if accumulate and count:
            micro(plain)
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(gradients.buffers[name], parameter.grad, rtol=1e-5, atol=1e-7)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_several_micro_batches_add_up_in_float32() -> None:
    """1 + 256 times 1/256 of one gradient is twice it in float32; a bf16 sum would stay where the first put it."""
    model, gradients = gradients_of(torch.bfloat16, accumulate=True)
    micro(model, gradients)
    first = {name: gradient.clone() for name, gradient in gradients.buffers.items()}
    for _ in range(256):
        micro(model, gradients, 1 / 256)
    for name, gradient in gradients.buffers.items():
        assert gradient.dtype == torch.float32
        assert (gradient - 2 * first[name]).norm() < 1e-2 * first[name].norm(), name


def test_one_micro_batch_keeps_the_weights_dtype() -> None:
    _, gradients = gradients_of(torch.bfloat16, accumulate=False)
    assert {gradient.dtype for gradient in gradients.buffers.values()} == {torch.bfloat16}


def test_gradients_that_come_later_are_lent_to_the_head() -> None:
    model, _ = gradients_of(torch.bfloat16, accumulate=False)
    scratch = model.sink.scratch(model.head_weight)
    assert scratch is not None and scratch.nbytes >= 4 * model.head_weight.numel()
    for dtype, accumulate in ((torch.bfloat16, True), (torch.float32, False)):
        model, _ = gradients_of(dtype, accumulate=accumulate)
        assert model.sink.scratch(model.head_weight) is None, "it has a float32 buffer"


@pytest.mark.parametrize("tied", [True, False])
def test_what_was_lent_may_hold_anything(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "tie_word_embeddings", tied)
    model, gradients = gradients_of(torch.bfloat16, accumulate=False)
    micro(model, gradients)
    first = {name: gradient.clone() for name, gradient in gradients.buffers.items()}
    for gradient in gradients.buffers.values():
        gradient.fill_(float("nan"))
    micro(model, gradients)
    for name, gradient in gradients.buffers.items():
        assert torch.equal(gradient, first[name]), name


def test_buffers_are_aligned_as_by_the_allocator() -> None:
    for accumulate in (False, True):
        _, gradients = gradients_of(torch.bfloat16, accumulate=accumulate)
        places = [buffer.storage_offset() * buffer.element_size() for buffer in gradients.buffers.values()]
        assert len(places) == len(set(places)) and all(place % 256 == 0 for place in places)


def test_views_are_parts_of_the_buffers_under_hugging_face_names() -> None:
    model, gradients = gradients_of(torch.float32, accumulate=False)
    micro(model, gradients)
    up = gradients.views["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(up, gradients.buffers["layers.0.mlp.gate_up_proj.weight"][8:])
    assert up.abs().sum() > 0


def test_missing_are_those_that_no_backward_has_written() -> None:
    model, gradients = gradients_of(torch.float32, accumulate=False)
    assert len(gradients.missing()) == len(gradients.buffers)
    micro(model, gradients)
    assert gradients.missing() == []


@pytest.mark.parametrize("frozen", ["layers.1.", "layers.1.mlp.gate_up_proj.weight"])
def test_frozen_between(frozen: str) -> None:
    """A layer, or a part of one: then its vectors and their like are no longer equally far apart."""
    plain, model = model_of(torch.float32), model_of(torch.float32)
    micro(plain)
    names = [name for name, _ in model.named_parameters() if frozen not in name]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    extra = {name: parameter for name, parameter in model.named_parameters() if name in names}
    gradients = Gradients(model, extra, accumulate=False)
    micro(model, gradients)
    for name, parameter in plain.named_parameters():
        if name in names:
            torch.testing.assert_close(gradients.buffers[name], parameter.grad, rtol=1e-5, atol=1e-7)


def test_a_vector_that_two_layers_share_is_no_quiet_loss() -> None:
    model, gradients = gradients_of(torch.float32, accumulate=False)
    model.layers[0].input_layernorm.weight = model.layers[1].input_layernorm.weight
    with pytest.raises(AssertionError, match="a second set of parts"):
        micro(model, gradients)


def test_a_weight_that_is_frozen_later_is_missing() -> None:
    model, gradients = gradients_of(torch.float32, accumulate=False)
    model.norm.weight.requires_grad_(False)
    micro(model, gradients)
    assert gradients.missing() == ["norm.weight"]
