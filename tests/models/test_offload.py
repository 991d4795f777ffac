"""What layers keep goes to the host's memory and comes back: the same bits, and nothing else is asked of anybody."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from chronicals.adapters.lora import LoRA, add_lora
from chronicals.errors import UserError
from chronicals.kernels.ops import REFERENCE
from chronicals.models import offload
from chronicals.models.config import ModelConfig
from chronicals.models.decoder import Decoder
from chronicals.models.layer import Recompute
from chronicals.models.offload import Offload
from chronicals.models.projection import widened, with_room
from tests.models.tiny import packed

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 13,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which tiny tensors go, over borders between chunks."""
    monkeypatch.setattr(offload, "LARGE", 500)
    monkeypatch.setattr(offload, "CHUNK", 1000)


def model_of(family: str, *, adapter: bool = False, layers: tuple[int, ...] | None = None) -> Decoder:
    model = Decoder(ModelConfig.from_hf(SIZES | {"model_type": family}), REFERENCE)
    model.init_weights(0)
    if adapter:
        add_lora(model, LoRA(4, 8.0, ("q_proj", "o_proj", "up_proj", "down_proj"), layers_to_transform=layers))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return model


def loss_of(model: Decoder) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    hidden = model(*packed([torch.randint(13, (n,), generator=generator) for n in (7, 1, 4)]))
    return (hidden * torch.randn(hidden.shape, generator=generator)).sum()


def gradients(model: Decoder) -> list[Tensor]:
    trained = [p for name, p in model.named_parameters() if p.requires_grad and "lm_head" not in name]
    return list(torch.autograd.grad(loss_of(model), trained))


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("policy", ["none", "light", "mlp", "full"])
@pytest.mark.parametrize(("family", "adapter"), [("llama", False), ("qwen3", False), ("llama", True)])
def test_gradients_are_the_same_bits(family: str, adapter: bool, policy: Recompute) -> None:
    model = model_of(family, adapter=adapter)
    model.set_recompute(policy)
    expected, used = gradients(model), [0]
    for layers in (1, 2, 3, None):
        model.set_offload(layers)
        assert equal(gradients(model), expected)
        assert model.offload is not None
        used.append(model.offload._used)
    assert 0 < used[1] < used[2] == used[3] == used[4], "the last layer's stays"


@pytest.mark.parametrize(
    ("layers", "leaving"),
    [(0, []), (1, [0]), (2, [0, 3]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4]), (6, [0, 1, 2, 3, 4])],
)
def test_layers_that_stay_are_spread_evenly(layers: int, leaving: list[int]) -> None:
    model = Decoder(ModelConfig.from_hf(SIZES | {"model_type": "llama", "num_hidden_layers": 6}), REFERENCE)
    model.set_offload(layers)
    assert [index for index, layer in enumerate(model.layers) if layer.offloads] == leaving
    assert (model.offload is None) == (not leaving)


def test_light_layers_behind_those_that_recompute_stay_too() -> None:
    model = Decoder(ModelConfig.from_hf(SIZES | {"model_type": "llama", "num_hidden_layers": 6}), REFERENCE)
    model.set_recompute("mlp", 4)
    for layers, leaving in ((None, [0, 1, 2, 3]), (4, [0, 1, 2, 3]), (3, [0, 1, 2]), (2, [0, 2]), (0, [])):
        model.set_offload(layers)
        assert [index for index, layer in enumerate(model.layers) if layer.offloads] == leaving


def test_it_is_the_host_that_backward_reads() -> None:
    model = model_of("llama", adapter=True)
    model.set_offload()
    loss = loss_of(model)
    assert model.offload is not None
    for chunk in model.offload._chunks:
        chunk.fill_(255)  # nan in every dtype
    loss.backward()
    lost = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.isnan().any()]
    assert any("layers.1." in name for name in lost) and not any("layers.2." in name for name in lost)


def test_a_second_step_takes_no_more_memory() -> None:
    model = model_of("llama")
    model.set_offload()
    first, used = gradients(model), model.offload
    assert used is not None
    held = used.host_bytes
    assert used._used <= held < used._used + 1000
    assert equal(gradients(model), first)
    assert used.host_bytes == held


def test_a_full_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "CHUNK", 2**60)
    model = model_of("llama")
    model.set_offload()
    with pytest.raises(UserError, match="no more page-locked memory for activation_offloading, which has 0"):
        loss_of(model)


def test_evaluation_between_forward_and_backward_leaves_it_alone() -> None:
    model = model_of("llama")
    expected = gradients(model)
    model.set_offload()
    trained = [p for name, p in model.named_parameters() if "lm_head" not in name]
    loss = loss_of(model)
    with torch.no_grad():
        loss_of(model)
    assert equal(list(torch.autograd.grad(loss, trained)), expected)


def test_an_older_pass_is_refused() -> None:
    model = model_of("llama")
    model.set_offload()
    older = loss_of(model)
    loss_of(model)
    with pytest.raises(AssertionError, match="another forward pass has taken its memory"):
        older.backward()


def test_layers_that_never_go_backward_hand_over_nothing() -> None:
    model = model_of("llama", adapter=True, layers=(1, 2))
    expected = gradients(model)
    model.set_offload(1)
    assert equal(gradients(model), expected)
    assert model.offload is not None and model.offload._used == 0
    model.set_offload(2)
    assert equal(gradients(model), expected)
    assert model.offload._used > 0


def test_a_parcel_is_what_was_put() -> None:
    """Of tensors that share memory there is one copy, with the room behind rows; small ones and None stay."""
    wide = torch.randn(20, 16)
    x = with_room(wide, 16, 8)
    widened(x, 8).copy_(torch.randn(20, 24))
    small, other = torch.randn(3), torch.randn(40, 10).t()
    expected = [widened(x, 8).clone(), wide.clone(), other.clone()]
    host = Offload(CPU)
    first = host.put([x, None, small, wide])
    second = host.put([x[:, 4:], other, x])
    sizes = [20 * 24 * 4, 20 * 16 * 4, 20 * 24 * 4, 40 * 10 * 4]
    assert host._used == sum(sizes)
    host.settle()
    x.zero_(), wide.zero_(), other.zero_()
    part, back, whole = host.get(second)
    assert part is not None and back is not None and whole is not None
    assert torch.equal(part, expected[0][:, 4:16]) and torch.equal(back, expected[2])
    assert back.stride() == other.stride() and part.data_ptr() == whole.data_ptr() + 16
    again, nothing, stayed, plain = host.get(first)
    assert nothing is None and stayed is not None and stayed.data_ptr() == small.data_ptr()
    assert again is not None and torch.equal(widened(again, 8), expected[0])
    assert plain is not None and torch.equal(plain, expected[1])
