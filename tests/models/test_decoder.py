"""The decoder's own promises: initialisation, growing the vocabulary, ties, and rope tables that no cast can spoil."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from chronicals.models.config import ModelConfig
from chronicals.models.decoder import Decoder
from chronicals.models.hf import load_model, save_model
from tests.models.tiny import documents, packed, save_reference

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.05,
}


def built(seed: int = 0, **changes: object) -> Decoder:
    model = Decoder(ModelConfig.from_hf(CONFIG | changes))
    model.init_weights(seed)
    return model


def test_initialisation_is_transformers() -> None:
    model = built()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        else:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.005, name


def test_a_seed_means_the_same_model_in_every_dtype() -> None:
    half = Decoder(ModelConfig.from_hf(CONFIG), dtype=torch.bfloat16)
    torch.manual_seed(99)  # the global generator plays no part
    half.init_weights(3)
    for a, b in zip(built(3).parameters(), half.parameters(), strict=True):
        assert torch.equal(a.to(torch.bfloat16), b)
    assert not torch.equal(built(3).head_weight, built(4).head_weight)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_and_ties_are_kept(tied: bool, tmp_path: Path) -> None:
    model = built(tie_word_embeddings=tied)
    old = {"embed": model.embed_tokens.weight.detach().clone(), "head": model.head_weight.detach().clone()}
    model.resize_token_embeddings(1005)
    assert model.config.vocab_size == 1005
    assert (model.head_weight is model.embed_tokens.weight) == tied
    for key, weight in (("embed", model.embed_tokens.weight), ("head", model.head_weight)):
        assert weight.shape == (1005, 64)
        assert weight.requires_grad
        assert torch.equal(weight[:1000], old[key])
        torch.testing.assert_close(weight[1000:], old[key].mean(0).expand(5, -1))
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path).head_weight, model.head_weight)


def test_resizing_to_the_same_size_keeps_the_parameter() -> None:
    model = built()
    before = model.embed_tokens.weight
    model.resize_token_embeddings(1000)
    assert model.embed_tokens.weight is before


def test_shrinking_is_refused() -> None:
    with pytest.raises(ValueError) as caught:
        built().resize_token_embeddings(999)
    assert str(caught.value) == "cannot shrink the vocabulary from 1000 to 999 rows"


def test_neither_a_cast_nor_to_empty_touches_the_rope_frequencies() -> None:
    model = built()
    frequencies = model.rotary_emb.inv_freq.clone()
    assert torch.equal(model.to(torch.bfloat16).rotary_emb.inv_freq, frequencies)
    assert model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.device("meta"):
        empty = Decoder(ModelConfig.from_hf(CONFIG))
    assert empty.embed_tokens.weight.is_meta
    assert torch.equal(empty.to_empty(device="cpu").rotary_emb.inv_freq, frequencies)


def test_half_precision_follows_float32(tmp_path: Path) -> None:
    save_reference("llama3-rope", tmp_path)
    inputs = packed(documents())
    with torch.no_grad():
        full, half = (load_model(tmp_path, dtype=dtype)(*inputs) for dtype in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert ((half.float() - full).norm() / full.norm()).item() < 0.1


def test_long_rope_keeps_both_sets_of_frequencies() -> None:
    factors = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
    model = built(rope_parameters={"rope_type": "longrope", "factor": 4.0, **factors}, max_position_embeddings=64)
    frequencies = model.rotary_emb.inv_freq.clone()
    assert frequencies.shape == (2, 8)
    assert torch.equal(model.to(torch.bfloat16).rotary_emb.inv_freq, frequencies)
    with torch.device("meta"):
        empty = Decoder(model.config)
    assert torch.equal(empty.to_empty(device="cpu").rotary_emb.inv_freq, frequencies)


def test_the_order_of_tokens_is_the_batchs_or_made_here() -> None:
    tokens, positions, cu_seqlens, max_seqlen = packed(documents(1000))
    made, given = built(), built()
    made(tokens, positions, cu_seqlens, max_seqlen).square().sum().backward()
    order = tokens.argsort(stable=True).int()
    given(tokens, positions, cu_seqlens, max_seqlen, order).square().sum().backward()
    assert torch.equal(made.embed_tokens.weight.grad, given.embed_tokens.weight.grad)
    assert set(made.embed_tokens.weight.grad.abs().sum(1).nonzero().flatten().tolist()) == set(tokens.tolist())
