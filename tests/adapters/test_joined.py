"""Adapters joined with their weight: the numbers of the unfused ones, and what the buffers hold."""

from __future__ import annotations

import gc
import weakref
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from chronicals.adapters.joined import ROOM, WIDER, JoinedLoRA
from chronicals.adapters.lora import PROJECTIONS, LoRA, adapter_tensors, add_lora
from chronicals.adapters.unfused import LoRAProjection, Target
from chronicals.kernels.ops import REFERENCE, Ops
from chronicals.models.config import ModelConfig
from chronicals.models.decoder import Decoder
from chronicals.models.hf import hf_views
from chronicals.models.layer import Recompute
from chronicals.models.projection import Projection, outlet, widened, with_room
from chronicals.train.digest import digest
from chronicals.train.gradients import Gradients
from tests.kernels.numerics import nan_filled_memory, relative_error
from tests.models.test_layer import MODELS, SIZES, loss_of

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VARIANTS = {
    "all": LoRA(4, 8, ALL),
    "q and v": LoRA(3, 16, ("q_proj", "v_proj"), rslora=True),
    "up": LoRA(2, 2, ("up_proj",)),
    "last projections": LoRA(5, 5, ("o_proj", "down_proj")),
    "one layer": LoRA(2, 4, ("layers.1.self_attn.k_proj", "layers.1.mlp.gate_proj")),
    "patterns": LoRA(3, 8, ALL, rank_pattern={"k_proj": 17, "up_proj": 1}, alpha_pattern={"q_proj": 2}),
}
POLICIES: tuple[Recompute, ...] = ("none", "light", "mlp", "full")


def model_of(
    name: str, lora: LoRA, dtype: torch.dtype = torch.float64, ops: Ops = REFERENCE, **options: Any
) -> Decoder:
    """A model with adapters, every weight far from zero; the same numbers whatever the options."""
    sizes = SIZES | {"hidden_size": 32, "intermediate_size": 48} | MODELS[name]
    model = Decoder(ModelConfig.from_hf(sizes), ops, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    add_lora(model, lora, **options)
    for tensor in adapter_tensors(model).values():
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model


def gradients(model: Decoder) -> dict[str, Tensor]:
    """Of each adapter tensor, through autograd."""
    model.zero_grad()
    loss_of(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_the_unfused_ones(name: str, variant: str, policy: Recompute) -> None:
    lora = VARIANTS[variant]
    joined, unfused = model_of(name, lora), model_of(name, lora, joined=())
    assert {type(m) for m in joined.modules() if isinstance(m, Projection)} <= {JoinedLoRA, Projection}
    assert not any(isinstance(module, JoinedLoRA) for module in unfused.modules())
    joined.set_recompute(policy)
    assert loss_of(joined).item() == pytest.approx(loss_of(unfused).item(), rel=1e-12)
    found, expected = gradients(joined), gradients(unfused)
    assert found.keys() == expected.keys() == {n for n, p in joined.named_parameters() if p.requires_grad}
    for key, gradient in expected.items():
        assert gradient.norm() > 0 and relative_error(found[key], gradient) < 1e-11, key


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_made_beside_is_the_same(
    name: str, variant: str, policy: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JoinedLoRA, "t_wider", 1)
    monkeypatch.setattr(JoinedLoRA, "u_wider", 1)
    with nan_filled_memory():
        model = model_of(name, VARIANTS[variant])
        beside = {m.t_beside or m.u_beside for m in model.modules() if isinstance(m, JoinedLoRA)}
        assert beside == {True} or name == "biases everywhere"  # a matmul with a bias has no columns beside
        model.set_recompute(policy)
        found = gradients(model)
    monkeypatch.undo()
    expected = model_of(name, VARIANTS[variant])
    assert not any(m.t_beside or m.u_beside for m in expected.modules() if isinstance(m, JoinedLoRA))
    assert loss_of(model).item() == pytest.approx(loss_of(expected).item(), rel=1e-12)
    for key, gradient in gradients(expected).items():
        assert relative_error(found[key], gradient) < 1e-11, key


@pytest.mark.parametrize(
    ("policy", "variant", "again"),
    [("none", "all", 0), ("light", "all", 0), ("mlp", "all", 2), ("full", "all", 0), ("light", "q and v", 2)],
)
def test_no_norm_is_made_again_for_adapters(policy: Recompute, variant: str, again: int) -> None:
    """But for a matmul that runs again, and for projections without."""
    calls = 0

    def counted(*args: Any, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return REFERENCE.rmsnorm_recompute(*args, **options)

    model = model_of("window", VARIANTS[variant], ops=replace(REFERENCE, rmsnorm_recompute=counted))
    model.set_recompute(policy)
    gradients(model)
    assert calls == again


def test_float16_norms_again() -> None:
    """u / rms may leave its range."""
    takes = [
        {m.takes_unnormed for m in model_of("window", VARIANTS["all"], dtype).modules() if isinstance(m, JoinedLoRA)}
        for dtype in (torch.float16, torch.bfloat16)
    ]
    assert takes == [{False}, {True}]


@pytest.mark.parametrize(
    ("shape", "r", "t_beside", "u_beside"),
    [
        ((9728, 896), 32, False, True),  # gate and up of Qwen2.5-0.5B
        ((896, 4864), 32, True, False),
        ((1152, 896), 32, False, False),
        ((9728, 896), 80, False, False),  # its matmul would take another tile
        ((28672, 4096), 32, False, False),
    ],
)
def test_where_it_pays(shape: tuple[int, int], r: int, t_beside: bool, u_beside: bool) -> None:
    half = shape[0] // 2
    targets = {name: Target(slice(i * half, (i + 1) * half), r, 1.0, i) for i, name in enumerate(("gate", "up"))}
    plain = [Projection(*shape[::-1], REFERENCE, bias=bias, device="meta") for bias in (False, True)]
    found = [JoinedLoRA(projection, targets) for projection in plain]
    assert [(one.t_beside, one.u_beside) for one in found] == [(t_beside, u_beside), (False, u_beside)]


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("variant", ["all", "q and v", "patterns"])
def test_buffers_of_our_own_get_the_same(variant: str, accumulate: bool) -> None:
    """The As of a projection lie one below the other in them."""
    model = model_of("biases everywhere", VARIANTS[variant], torch.float32)
    expected = gradients(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    buffers = Gradients(model, trained, accumulate=accumulate).buffers
    for times in (1, 2):
        for buffer in () if accumulate else buffers.values():
            buffer.fill_(float("nan"))  # as what was lent to the head
        loss_of(model).backward()
        for name, gradient in expected.items():
            assert relative_error(buffers[name], gradient * (times if accumulate else 1)) < 1e-5, name


@pytest.mark.parametrize("policy", POLICIES)
def test_a_parameter_that_changed_is_never_stale(policy: Recompute) -> None:
    model = model_of("window", VARIANTS["all"])
    model.set_recompute(policy)
    gradients(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    other = model_of("window", VARIANTS["all"], joined=())
    with torch.no_grad():
        for tensor in adapter_tensors(other).values():
            tensor.mul_(1.5)
    assert loss_of(model).item() == pytest.approx(loss_of(other).item(), rel=1e-12)
    found, expected = gradients(model), gradients(other)
    assert all(relative_error(found[name], gradient) < 1e-11 for name, gradient in expected.items())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_unwritten_is_read(variant: str, policy: Recompute) -> None:
    with nan_filled_memory():
        model = model_of("normed heads, tied", VARIANTS[variant])
        model.set_recompute(policy)
        assert all(bool(gradient.isfinite().all()) for gradient in gradients(model).values())


@pytest.mark.parametrize("wider", [WIDER, 1])
def test_bf16_is_as_near_to_float64_as_unfused(wider: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JoinedLoRA, "t_wider", wider)
    monkeypatch.setattr(JoinedLoRA, "u_wider", wider)
    lora = VARIANTS["all"]
    exact = gradients(model_of("window", lora))
    errors = {}
    for joined in (PROJECTIONS, ()):
        found = gradients(model_of("window", lora, torch.bfloat16, joined=joined))
        errors[joined] = [relative_error(found[name], gradient) for name, gradient in exact.items()]
    for measure in (sum, max):
        assert measure(errors[PROJECTIONS]) < 1.2 * measure(errors[()])


def test_chosen_projection_by_projection() -> None:
    model = model_of("window", VARIANTS["all"], joined=("qkv_proj", "down_proj"))
    layer = model.layers[0]
    kinds = [layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj]
    assert [type(kind) for kind in kinds] == [JoinedLoRA, LoRAProjection, LoRAProjection, JoinedLoRA]
    expected = gradients(model_of("window", VARIANTS["all"]))
    assert all(relative_error(found, expected[name]) < 1e-11 for name, found in gradients(model).items())


def test_the_weight_lives_in_the_buffer_alone() -> None:
    sizes = SIZES | {"hidden_size": 32, "intermediate_size": 48} | MODELS["window"]
    model = Decoder(ModelConfig.from_hf(sizes))
    model.init_weights(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    storages = [weakref.ref(m.weight.untyped_storage()) for m in model.layers.modules() if isinstance(m, Projection)]
    add_lora(model, VARIANTS["all"])
    gc.collect()
    assert all(storage() is None for storage in storages)
    joined = {path: module for path, module in model.named_modules() if isinstance(module, JoinedLoRA)}
    assert len(joined) == 8
    for path, module in joined.items():
        rows, columns = module.weight.shape
        assert module.weight.data_ptr() == module.joined.data_ptr() and not module.weight.requires_grad
        assert module.joined.shape == (rows + module.out_room, columns + module.in_room)
        assert module.in_room % ROOM == 0 and 0 <= module.in_room - module.rank < ROOM
        assert torch.equal(module.weight, before[f"{path}.weight"])
        assert module.joined[rows:, columns:].count_nonzero() == 0
        assert all(parameter.is_contiguous() for parameter in [*module.lora_A.values(), *module.lora_B.values()])
    assert not any(name.endswith("joined") for name in model.state_dict())
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen.keys() == before.keys()
    views = dict(hf_views(model, frozen))
    for name, tensor in hf_views(model, before):
        assert torch.equal(views[name], tensor) and digest(views[name]) == digest(tensor), name


def test_another_dtype_is_joined_again() -> None:
    model = model_of("window", VARIANTS["all"], torch.float32)
    gradients(model)
    expected, found = gradients(model_of("window", VARIANTS["all"])), gradients(model.to(torch.float64))
    assert model.layers[0].mlp.down_proj.weight.data_ptr() == model.layers[0].mlp.down_proj.joined.data_ptr()
    assert all(relative_error(found[name], gradient) < 1e-5 for name, gradient in expected.items())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("variant", "norms", "attentions"),
    [("all", 4, 2), ("q and v", 4, 2), ("up", 3, 1), ("last projections", 4, 2), ("one layer", 2, 1)],
)
def test_gradients_that_nobody_reads_are_not_computed(
    policy: Recompute, variant: str, norms: int, attentions: int
) -> None:
    """Nothing is trained before the first adapter. Two layers have five norms; the last one's is always passed."""
    calls: list[str] = []

    class Counted(type(REFERENCE.attention)):  # type: ignore[misc]
        def backward(self, *args: Any, **options: Any) -> None:
            calls.append("attention")
            super().backward(*args, **options)

    def counted(*args: Any, **options: Any) -> Any:
        calls.append("norm")
        return REFERENCE.rmsnorm_backward(*args, **options)

    ops = replace(REFERENCE, rmsnorm_backward=counted, attention=Counted())
    model = Decoder(ModelConfig.from_hf(SIZES | MODELS["window"]), ops)
    model.init_weights(0)
    model.set_recompute(policy)
    add_lora(model, VARIANTS[variant])
    gradients(model)
    assert (calls.count("norm"), calls.count("attention")) == (norms, attentions)


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"dropout": 0.5}], ids=str)
def test_one_token(options: dict[str, Any]) -> None:
    """The stride of a single row is whatever the last view made of it."""
    lora = replace(VARIANTS["all"], **options)
    one = torch.zeros(1, dtype=torch.int64)
    found = []
    for joined in (PROJECTIONS, ()):
        model = model_of("window", lora, joined=joined)
        hidden = model(one + 3, one, torch.tensor([0, 1], dtype=torch.int32), 1)
        hidden.sum().backward()
        found.append([hidden, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12) for ours, theirs in zip(*found, strict=True))


def test_a_copy_has_adapters_of_its_own() -> None:
    model = model_of("window", VARIANTS["all"], joined=PROJECTIONS)

    def run(one: Decoder) -> Tensor:
        return one(torch.arange(6) % 5, torch.arange(6), torch.tensor([0, 6], dtype=torch.int32), 6).detach()

    first = run(model)
    copy = deepcopy(model)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert not torch.allclose(run(copy), first), "the copy computes with the adapters of the model"
    assert torch.equal(run(model), first)
    assert all(m.weight.data_ptr() == m.joined.data_ptr() for m in copy.modules() if isinstance(m, JoinedLoRA))


def test_scales_of_each_rank_stay_float32() -> None:
    model = model_of("window", VARIANTS["patterns"], joined=PROJECTIONS).to(torch.bfloat16)
    scales = [m.scales for m in model.modules() if isinstance(m, JoinedLoRA) and m.scales is not None]
    assert scales and all(one.dtype == torch.float32 for one in scales)


def test_room_is_made_and_never_guessed() -> None:
    x = with_room(torch.empty(3, 5), 7, 2)
    assert x.shape == (3, 7) and widened(x, 2).shape == (3, 9) and widened(x, 2).is_contiguous()
    assert outlet(x, 7, 0) is None
    for other in (torch.empty(3, 7), torch.empty(3, 8)[:, :7], torch.empty(7, 9).t()[:3]):
        with pytest.raises(AssertionError, match="no room of 2"):
            widened(other, 2)
