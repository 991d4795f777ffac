"""Our decoder against transformers on every family: logits, loss, every gradient; packed and alone; saved and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from chronicals.models.config import ModelConfig
from chronicals.models.decoder import Decoder
from chronicals.models.hf import hf_views, load_model, save_model
from chronicals.models.layer import Recompute
from chronicals.models.rope import RopeConfig
from tests.kernels.numerics import relative_error
from tests.models.tiny import CHECKPOINTS, documents, packed, reference_of, save_reference

TOLERANCE = 1e-5


def logits_and_loss(model: Decoder, streams: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Packed logits, and the mean loss over all next-token predictions."""
    tokens, positions, cu_seqlens, max_seqlen = packed(streams)
    hidden = model(tokens, positions, cu_seqlens, max_seqlen)
    rows = torch.where(positions[1:] > 0)[0]
    scale = torch.tensor([1 / max(1, len(rows))])
    loss = model.ops.linear_cross_entropy(hidden, model.head_weight, rows, tokens[rows + 1], scale, chunk_rows=16)
    return hidden @ model.head_weight.T, loss


def reference_logits_and_loss(model: nn.Module, streams: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The same from transformers, each document alone."""
    logits = [model(stream.unsqueeze(0)).logits[0] for stream in streams]
    losses = [
        F.cross_entropy(out[:-1], stream[1:], reduction="sum") for out, stream in zip(logits, streams, strict=True)
    ]
    return torch.cat(logits), sum(losses) / sum(len(stream) - 1 for stream in streams)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A checkpoint's folder and transformers' model of it."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, save_reference(request.param, folder)


def test_logits_loss_and_every_gradient(pair: tuple[Path, nn.Module]) -> None:
    folder, theirs = pair
    ours, streams = load_model(folder), documents()
    logits, loss = logits_and_loss(ours, streams)
    expected_logits, expected_loss = reference_logits_and_loss(theirs, streams)
    assert relative_error(logits, expected_logits) < TOLERANCE
    assert loss.item() == pytest.approx(expected_loss.item(), rel=TOLERANCE)
    loss.backward()
    theirs.zero_grad()
    expected_loss.backward()
    grads = dict(hf_views(ours, {name: p.grad for name, p in ours.named_parameters()}))
    assert grads.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        assert relative_error(grads[name], parameter.grad) < TOLERANCE, name


def test_the_test_sees_a_wrong_rope(pair: tuple[Path, nn.Module]) -> None:
    ours, streams = load_model(pair[0]), documents()
    config = replace(ours.config, rope=replace(ours.config.rope, theta=2 * ours.config.rope.theta))
    wrong = Decoder(config)
    wrong.load_state_dict(ours.state_dict())
    assert relative_error(logits_and_loss(wrong, streams)[0], logits_and_loss(ours, streams)[0]) > 100 * TOLERANCE


def test_partial_rotary_as_in_phi3() -> None:
    """Phi-3 is this decoder with part of a head turning; its two sets of longrope factors included."""
    rope = {"rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 0.75}
    rope |= {"short_factor": [1.0, 1.5, 2.0], "long_factor": [3.0, 4.0, 6.0]}
    lengths = {"original_max_position_embeddings": 36, "max_position_embeddings": 256}
    theirs = reference_of("phi3", rope_parameters=rope, pad_token_id=0, eos_token_id=0, **lengths)
    scaling = RopeConfig(
        "longrope",
        500.0,
        factor=256 / 36,
        original_max_position_embeddings=36,
        short_factor=(1.0, 1.5, 2.0),
        long_factor=(3.0, 4.0, 6.0),
        partial_rotary_factor=0.75,
    )
    plain = {key: value for key, value in theirs.config.to_dict().items() if "rope" not in key and "rotary" not in key}
    llama = ModelConfig.from_hf(plain | {"model_type": "llama", "original_max_position_embeddings": None})
    ours, streams = Decoder(replace(llama, rope=scaling)), documents()
    ours.load_state_dict({name.removeprefix("model."): tensor for name, tensor in theirs.state_dict().items()})
    expected_grads = {name.removeprefix("model."): parameter for name, parameter in theirs.named_parameters()}
    logits, loss = logits_and_loss(ours, streams)
    expected_logits, expected_loss = reference_logits_and_loss(theirs, streams)
    assert relative_error(logits, expected_logits) < TOLERANCE
    loss.backward()
    expected_loss.backward()
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, expected_grads[name].grad) < TOLERANCE, name


def test_packed_equals_alone(pair: tuple[Path, nn.Module]) -> None:
    model, streams = load_model(pair[0]), documents()
    logits, loss = logits_and_loss(model, streams)
    packed_grads = torch.autograd.grad(loss, list(model.parameters()))
    alone, total = [], torch.zeros(())
    for stream in streams:
        out, mean = logits_and_loss(model, [stream])
        alone.append(out)
        total = total + mean * (len(stream) - 1)
    total = total / sum(len(stream) - 1 for stream in streams)
    assert relative_error(logits, torch.cat(alone)) < TOLERANCE
    grads = torch.autograd.grad(total, list(model.parameters()))
    for (name, _), grad, expected in zip(model.named_parameters(), packed_grads, grads, strict=True):
        assert relative_error(grad, expected) < TOLERANCE, name


@pytest.mark.parametrize("policy", ["light", "mlp", "full"])
def test_recompute_changes_nothing(pair: tuple[Path, nn.Module], policy: Recompute) -> None:
    model, streams = load_model(pair[0]), documents()
    model.set_recompute("none")
    kept = torch.autograd.grad(logits_and_loss(model, streams)[1], list(model.parameters()))
    for layers in (None, 1):
        model.set_recompute(policy, layers)
        again = torch.autograd.grad(logits_and_loss(model, streams)[1], list(model.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_transformers_loads_what_we_save(pair: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, theirs = pair
    save_model(load_model(folder), tmp_path, max_shard_size=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.dtype == torch.float32
    weights, expected = again.state_dict(), theirs.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    with torch.no_grad():
        for stream in documents():
            # not bit for bit: matmuls round by how memory-mapped weights happen to be aligned
            assert relative_error(again(stream[None]).logits, theirs(stream[None]).logits) < 1e-6


def test_sharded_round_trip_is_bit_equal(pair: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, _ = pair
    save_model(load_model(folder), tmp_path, max_shard_size=20_000)
    stored = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    original = load_file(folder / "model.safetensors")
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], original[name]) for name in original)
    once, twice = load_model(folder), load_model(tmp_path)
    assert once.config == twice.config
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))
