"""AdamW against torch's own, masters of narrow weights, and the step that must write nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from chronicals.optim import adamw
from chronicals.optim.adamw import AdamW
from chronicals.optim.groups import decay_names

SHAPES = {"embed.weight": (33, 17), "norm.weight": (17,), "proj.weight": (5, 3, 2), "proj.bias": (1,)}
SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
YES = torch.tensor(True)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def gradients(step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def make(weights: dict[str, nn.Parameter]) -> AdamW:
    return AdamW(weights, **SETTINGS, decay_names=decay_names(weights))


def everything(optimizer: AdamW) -> dict[str, Tensor]:
    """Weights, state and step count, copied."""
    out = {f"{kind}.{name}": t.clone() for kind, named in optimizer.state().items() for name, t in named.items()}
    out |= {name: p.detach().clone() for name, p in optimizer.parameters.items()}
    return out | {"step_count": optimizer.step_count.clone()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("clip", [False, True])
def test_equals_torch_adamw(clip: bool) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = make(ours)
    matrices = [p for p in theirs.values() if p.ndim >= 2]
    vectors = [p for p in theirs.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=SETTINGS["betas"], eps=1e-8, foreach=False)
    for step in range(20):
        lr = 1e-2 * (1 - step / 20)
        for name, grad in gradients(step).items():
            theirs[name].grad = grad
        norm = nn.utils.clip_grad_norm_(theirs.values(), 1.0 if clip else float("inf"))
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        scale = (1.0 / (norm + 1e-6)).clamp(max=1.0) if clip else torch.ones(())
        optimizer.step(gradients(step), lr, scale, YES)
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_the_float32_run_rounded(dtype: torch.dtype) -> None:
    narrow = parameters(dtype)
    wide = {name: nn.Parameter(p.detach().float()) for name, p in narrow.items()}
    ours, reference = make(narrow), make(wide)
    for step in range(20):
        grads = gradients(step, dtype)
        ours.step(grads, 1e-4, torch.tensor(0.5), YES)
        reference.step({name: g.float() for name, g in grads.items()}, 1e-4, torch.tensor(0.5), YES)
    for name in SHAPES:
        assert torch.equal(ours.state()["master"][name], wide[name])
        assert torch.equal(narrow[name], wide[name].to(dtype))


def test_updates_too_small_for_bfloat16_add_up_in_the_master() -> None:
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = AdamW({"w": weight})
    for _ in range(100):  # each moves the weight by lr = 1e-4; bf16 steps below 1 are 4e-3 wide
        optimizer.step({"w": torch.ones(4, 4, dtype=torch.bfloat16)}, 1e-4, torch.ones(()), YES)
    assert torch.equal(weight, torch.full_like(weight, 0.99))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_writes_nothing(bad: float, dtype: torch.dtype) -> None:
    optimizer, clean = make(parameters(dtype)), make(parameters(dtype))
    for step in range(6):
        if step == 3:
            before, grads = everything(optimizer), gradients(step, dtype)
            grads["embed.weight"][0, 0] = bad
            optimizer.step(grads, 1e-2, torch.tensor(float("nan")), torch.tensor([False]))
            assert_equal(everything(optimizer), before)
            assert torch.equal(grads["norm.weight"], gradients(step, dtype)["norm.weight"])
        for one in (optimizer, clean):
            one.step(gradients(step, dtype), 1e-2, torch.tensor([0.3]), torch.tensor([True]))
    assert_equal(everything(optimizer), everything(clean))  # the skipped step did not count either
    assert optimizer.step_count.item() == 6


def test_state_is_named_as_the_parameters_and_float32() -> None:
    mixed = parameters() | {"proj.weight": nn.Parameter(torch.zeros(5, 3, 2, dtype=torch.bfloat16))}
    state = make(mixed).state()
    assert {kind: set(named) for kind, named in state.items()} == {
        "exp_avg": set(SHAPES),
        "exp_avg_sq": set(SHAPES),
        "master": {"proj.weight"},
    }
    for named in state.values():
        assert all(t.dtype == torch.float32 and t.shape == SHAPES[name] for name, t in named.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_copied_over_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    first = make(parameters(dtype))
    for step in range(5):
        first.step(gradients(step, dtype), 1e-2, torch.ones(()), YES)
    second = make({name: nn.Parameter(p.detach().clone()) for name, p in first.parameters.items()})
    for kind, named in first.state().items():
        for name, tensor in named.items():
            second.state()[kind][name].copy_(tensor)
    second.step_count.fill_(5)
    for one in (first, second):
        for step in range(5, 10):
            one.step(gradients(step, dtype), 1e-2, torch.tensor(0.7), YES)
    assert_equal(everything(first), everything(second))


def test_buckets_and_strides_of_gradients_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(parameters())
    monkeypatch.setattr(adamw, "BUCKET_ELEMENTS", 20)
    cut = make(parameters())
    assert len(cut._buckets) > len(whole._buckets)
    whole.step(gradients(0), 1e-2, torch.ones(()), YES)
    cut.step({n: g.mT.contiguous().mT if g.ndim > 1 else g for n, g in gradients(0).items()}, 1e-2, torch.ones(()), YES)
    assert_equal(everything(whole), everything(cut))


FORMATS = [("float32", False), ("bfloat16", True), ("bfloat16", False), ("int8", True), ("int8", False)]


def build(weights: dict[str, nn.Parameter], state: str, master: bool, **options: object) -> AdamW:
    return AdamW(weights, **SETTINGS, decay_names=decay_names(weights), state_dtype=state, master=master, **options)


@pytest.mark.parametrize(("state", "master"), FORMATS)
def test_formats_keep_what_they_say(state: str, master: bool) -> None:
    kept = build(parameters(torch.bfloat16), state, master).state()
    assert set(kept) == {"exp_avg", "exp_avg_sq", "master"} | ({"exponents"} if state == "int8" else set())
    assert set(kept["master"]) == (set(SHAPES) if master else set())
    blocks = {name: 3 if name == "embed.weight" else 1 for name in SHAPES}
    for kind in ("exp_avg", "exp_avg_sq"):
        for name, tensor in kept[kind].items():
            if state == "int8":
                assert (tensor.dtype, tensor.shape) == (torch.uint8, (blocks[name], 256))
            else:
                assert (tensor.dtype, tensor.shape) == (getattr(torch, state), SHAPES[name])
    for name, tensor in kept.get("exponents", {}).items():
        assert (tensor.dtype, tensor.shape) == (torch.uint8, (blocks[name], 2))


@pytest.mark.parametrize(("state", "master"), FORMATS)
def test_every_format_follows_float32(state: str, master: bool) -> None:
    """20 steps along steady gradients: 8 bits keep a moment to an eighth, bfloat16 weights move by their steps."""
    exact, ours = build(parameters(), "float32", True), build(parameters(torch.bfloat16), state, master, seed=1)
    start = {name: p.detach().clone() for name, p in exact.parameters.items()}
    for step in range(20):
        grads = {name: (1 + 0.1 * g).abs() for name, g in gradients(step).items()}
        exact.step(grads, 1e-2, torch.tensor(0.5), YES)
        ours.step({name: g.to(torch.bfloat16) for name, g in grads.items()}, 1e-2, torch.tensor(0.5), YES)
    moved = torch.cat([(p - start[name]).reshape(-1) for name, p in exact.parameters.items()])
    apart = torch.cat(
        [(ours.parameters[name].float() - p).reshape(-1) - (start[name].bfloat16().float() - start[name]).reshape(-1)
         for name, p in exact.parameters.items()]
    )  # fmt: skip
    assert apart.norm() < 0.1 * moved.norm()
    assert apart.mean().abs() < 0.01 * moved.norm() / len(moved) ** 0.5  # rounded up as often as down


@pytest.mark.parametrize(("state", "master"), FORMATS)
@pytest.mark.parametrize("zero_grads", [False, True])
def test_no_format_writes_a_step_that_is_not_finite(state: str, master: bool, zero_grads: bool) -> None:
    optimizer = build(parameters(torch.bfloat16), state, master)
    optimizer.step(gradients(0), 1e-2, torch.ones(()), YES)
    before, grads = everything(optimizer), gradients(1)
    grads["embed.weight"][0, 0] = float("nan")
    optimizer.step(grads, 1e-2, torch.tensor(float("nan")), torch.tensor(False), zero_grads=zero_grads)
    assert_equal(everything(optimizer), before)
    assert all((g == 0).all() for g in grads.values()) == zero_grads


@pytest.mark.parametrize(("state", "master"), FORMATS)
def test_every_format_goes_on_from_a_copied_state_bit_for_bit(state: str, master: bool) -> None:
    first = build(parameters(torch.bfloat16), state, master, seed=3)
    for step in range(3):
        first.step(gradients(step), 1e-2, torch.ones(()), YES)
    weights = {name: nn.Parameter(p.detach().clone()) for name, p in first.parameters.items()}
    second = build(weights, state, master, seed=3)
    for kind, named in first.state().items():
        for name, tensor in named.items():
            second.state()[kind][name].copy_(tensor)
    second.step_count.copy_(first.step_count)
    for one in (first, second):
        for step in range(3, 6):
            one.step(gradients(step), 1e-2, torch.tensor(0.7), YES)
    assert_equal(everything(first), everything(second))


@pytest.mark.parametrize("state", ["float32", "int8"])
def test_rates_multiply_the_learning_rate(state: str) -> None:
    apart, together = build(parameters(), state, True, rates={"proj.weight": 3.0}), build(parameters(), state, True)
    slow = {name: p.detach().clone() for name, p in parameters().items()}
    for one, lr in ((apart, 1e-3), (together, 3e-3)):
        one.step(gradients(0), lr, torch.ones(()), YES)
    torch.testing.assert_close(apart.parameters["proj.weight"], together.parameters["proj.weight"])
    for name in ("embed.weight", "norm.weight", "proj.bias"):
        moved = (apart.parameters[name] - slow[name]).detach()
        torch.testing.assert_close(3 * moved, (together.parameters[name] - slow[name]).detach(), rtol=1e-3, atol=1e-6)


def test_the_learning_rate_may_be_a_tensor() -> None:
    for state in ("float32", "bfloat16"):
        number, tensor = build(parameters(), state, True), build(parameters(), state, True)
        number.step(gradients(0), 0.25, torch.ones(()), YES)
        tensor.step(gradients(0), torch.tensor(0.25), torch.ones(()), YES)
        assert_equal(everything(number), everything(tensor))


def test_float16_weights_need_a_master() -> None:
    with pytest.raises(ValueError) as caught:
        AdamW({"w": nn.Parameter(torch.ones(2, dtype=torch.float16))}, master=False)
    assert str(caught.value) == "float16 weights need a float32 master; stochastic rounding is for bfloat16"
