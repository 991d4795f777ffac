"""The fused update and gradient norm on a GPU: against the plain ones, under a graph, repeatable, without waiting."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn

from chronicals.kernels import adamw
from chronicals.kernels.adamw import AdamWSlot, adamw_reference, grad_norm_reference
from chronicals.optim.adamw import AdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BETAS, EPS, SEED = (0.9, 0.999), 1e-8, 2**40 + 7
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# sizes: one element, ragged, a norm's, one past a tile, many tiles, hidden 5120
SHAPES = [(1,), (7,), (760,), (1128,), (4097,), (0, 5), (1024, 896), (8192, 128), (3, 5120)]
FORMATS = [
    (FP32, "float32", False, FP32),
    (BF16, "float32", True, BF16),
    (FP16, "float32", True, FP32),
    (BF16, "bfloat16", False, BF16),
    (BF16, "bfloat16", False, FP32),
    (FP32, "bfloat16", False, FP32),
    (BF16, "int8", False, BF16),
    (BF16, "int8", True, FP32),
    (FP32, "int8", False, FP32),
]


def slots_of(weight: torch.dtype, state: str, master: bool) -> list[AdamWSlot]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        AdamWSlot.of(
            torch.randn(shape, generator=generator, device="cuda").to(weight),
            state=state,
            master=master,
            rate=1.0 + i,
            decay=0.01 * i,
        )
        for i, shape in enumerate(SHAPES)
    ]


def gradients(step: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(step)
    spread = [10.0 ** -(i % 4) for i in range(len(SHAPES))]
    return [
        (torch.randn(shape, generator=generator, device="cuda") * s).to(dtype)
        for shape, s in zip(SHAPES, spread, strict=True)
    ]


def scalar(value: float) -> Tensor:
    return torch.tensor([float(value)], device="cuda")


def pieces(slot: AdamWSlot) -> dict[str, Tensor]:
    named = {field.name: getattr(slot, field.name) for field in fields(slot)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def fused(slots: list[AdamWSlot]):  # type: ignore[no-untyped-def]
    from chronicals.kernels.fused.adamw import FusedAdamW

    return FusedAdamW(slots, betas=BETAS, eps=EPS, seed=SEED)


@pytest.mark.parametrize(("weight", "state", "master", "grad"), FORMATS)
def test_is_the_plain_update(weight: torch.dtype, state: str, master: bool, grad: torch.dtype) -> None:
    ours, theirs = slots_of(weight, state, master), slots_of(weight, state, master)
    update = fused(ours)
    for step in range(1, 5):
        grads = gradients(step, grad)
        update.step(grads, scalar(1e-3), scalar(0.5), scalar(step), scalar(1.0))
        for i, (slot, g) in enumerate(zip(theirs, grads, strict=True)):
            adamw_reference(
                slot, g, lr=1e-3, clip_scale=0.5, step=step, betas=BETAS, eps=EPS, seed=SEED, stream=i
            )  # fmt: skip
    for i, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
        for name in pieces(its):
            got, expected = decoded(mine, name).double(), decoded(its, name).double()
            assert torch.isfinite(got).all()
            # float32 arithmetic in another order: what is kept in fewer bits falls to the other side at times
            off = (got - expected).abs() > 2e-6 * expected.abs() + 1e-8
            assert off.sum() <= max(1, 2e-3 * off.numel()), f"{name} of tensor {i}: {int(off.sum())} of {off.numel()}"
            assert ((got - expected).abs() <= most_apart(name, state, expected)).all(), f"{name} of tensor {i}"


def decoded(slot: AdamWSlot, name: str) -> Tensor:
    """A piece as numbers: codes as shares of their block's power of two."""
    value = pieces(slot)[name]
    if value.dtype != torch.uint8 or name == "exponents":
        return value
    decode, one = (adamw.decode_first, 127 - 52) if name == "exp_avg" else (adamw.decode_second, 127)
    exponents = torch.full(value.shape[:1], one, dtype=torch.uint8, device="cuda")
    return decode(value, exponents, slot.weight.shape)


def most_apart(name: str, state: str, expected: Tensor) -> Tensor:
    """One step of what is kept in fewer bits, and what a moment one step off does to the scale and the weight."""
    if state == "int8" and name in {"exp_avg", "exp_avg_sq"}:
        return torch.full_like(expected, 0.26)
    if name == "exponents":  # the largest at the edge of a power of two
        return torch.ones_like(expected)
    return expected.abs() * 2**-7 + {"float32": 1e-6, "bfloat16": 2e-4, "int8": 2e-2}[state]


def test_float32_is_no_worse_than_torch() -> None:
    """Against float64, beside torch's fused kernel on the same numbers."""
    grads = [gradients(step, FP32) for step in range(1, 21)]
    ours, exact = slots_of(FP32, "float32", False), slots_of(FP32, "float32", False)
    exact = [AdamWSlot.of(s.weight.double(), state="float32", master=False, rate=s.rate, decay=s.decay) for s in exact]
    torchs = [nn.Parameter(s.weight.clone()) for s in slots_of(FP32, "float32", False)]
    groups = [{"params": [p], "lr": 1e-3 * s.rate, "weight_decay": s.decay} for p, s in zip(torchs, ours, strict=True)]
    theirs, update = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=True), fused(ours)
    for step, gs in enumerate(grads, 1):
        update.step(gs, scalar(1e-3), scalar(1.0), scalar(step), scalar(1.0))
        for p, g, slot in zip(torchs, gs, exact, strict=True):
            p.grad = g
            adamw_reference(slot, g, lr=1e-3, clip_scale=1.0, step=step, betas=BETAS, eps=EPS)
        theirs.step()
    error = [
        torch.cat([(w.double() - s.weight).reshape(-1) for w, s in zip(weights, exact, strict=True)]).norm().item()
        for weights in ([s.weight for s in ours], [p.detach() for p in torchs])
    ]
    assert error[0] <= 1.2 * error[1], error


@pytest.mark.parametrize(("weight", "state", "master", "grad"), FORMATS)
def test_a_step_that_is_not_finite_writes_nothing_but_zeros(
    weight: torch.dtype, state: str, master: bool, grad: torch.dtype
) -> None:
    slots = slots_of(weight, state, master)
    update, grads = fused(slots), gradients(1, grad)
    update.step(grads, scalar(1e-3), scalar(1.0), scalar(1), scalar(1.0))
    before = [{name: value.clone() for name, value in pieces(slot).items()} for slot in slots]
    grads[-1][0, 0] = float("nan")
    update.step(grads, scalar(1e-3), scalar(float("nan")), scalar(2), scalar(0.0), zero_grads=True)
    for slot, old in zip(slots, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in pieces(slot).items())
    assert all(not g.any() for g in grads)
    grads = gradients(2, grad)
    update.step(grads, scalar(1e-3), scalar(1.0), scalar(2), scalar(1.0), zero_grads=True)
    assert all(not g.any() for g in grads)
    assert not torch.equal(slots[-1].weight, before[-1]["weight"])


@pytest.mark.parametrize(("state", "master"), [("float32", True), ("bfloat16", False), ("int8", False)])
def test_views_at_odd_addresses(state: str, master: bool) -> None:
    """Unaligned gradients and weights give the same bits as aligned ones, and nothing beside them is touched."""
    aligned = [AdamWSlot.of(torch.full((4112,), 0.5, device="cuda", dtype=BF16), state=state, master=master)]
    wide = torch.full((4120,), 0.5, device="cuda", dtype=BF16)
    odd = [AdamWSlot.of(wide[3:4115], state=state, master=master)]
    grad = torch.randn(4120, device="cuda", dtype=BF16)
    for slots, g in ((aligned, grad[3:4115].clone()), (odd, grad[3:4115])):
        fused(slots).step([g], scalar(1e-2), scalar(1.0), scalar(1), scalar(1.0))
    for name, value in pieces(aligned[0]).items():
        assert torch.equal(pieces(odd[0])[name], value), name
    assert (wide[:3] == 0.5).all() and (wide[4115:] == 0.5).all()


@pytest.mark.parametrize(("weight", "state", "master", "grad"), FORMATS)
def test_a_captured_update_follows_the_schedule(
    weight: torch.dtype, state: str, master: bool, grad: torch.dtype
) -> None:
    """Norm, clipping and update in one graph; rate, step and gradients change between replays; bits as in eager."""

    def run(captured: bool) -> dict[str, Tensor]:
        from chronicals.kernels.fused.grad_norm import GradNorm

        named = {str(i): nn.Parameter(s.weight) for i, s in enumerate(slots_of(weight, state, master))}
        optimizer = AdamW(named, weight_decay=0.1, decay_names=named, state_dtype=state, master=master, seed=SEED)
        grads, lr = dict(zip(named, gradients(0, grad), strict=True)), torch.zeros((), device="cuda")
        norm = GradNorm(list(grads.values()))

        def update() -> None:
            _, total = norm(list(grads.values()))
            clip = (1.0 / (total + 1e-6)).clamp(max=1.0)
            optimizer.step(grads, lr, clip, torch.isfinite(total), zero_grads=True)

        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for step in range(5):
                lr.fill_(1e-2 / (1 + step))
                for ours, new in zip(grads.values(), gradients(step, grad), strict=True):
                    ours.copy_(new)
                if step == 3:
                    grads["8"][0, 0] = float("inf")
                if step == 1 and captured:
                    torch.cuda.synchronize()
                    with torch.cuda.graph(graph, stream=stream):
                        update()
                if step and captured:
                    graph.replay()
                else:
                    update()
        torch.cuda.synchronize()
        assert optimizer.step_count.item() == 4
        out = {f"{kind}.{name}": t for kind, some in optimizer.state().items() for name, t in some.items()}
        return out | {name: p.detach() for name, p in named.items()}

    eager, replayed = run(False), run(True)
    assert [name for name, value in eager.items() if not torch.equal(value, replayed[name])] == []


def test_a_step_waits_for_nothing_and_takes_new_gradients() -> None:
    named = {"w": nn.Parameter(torch.ones(64, 64, device="cuda", dtype=BF16))}
    optimizer, clip = AdamW(named), torch.ones((), device="cuda")
    finite = torch.ones((), dtype=torch.bool, device="cuda")
    optimizer.step({"w": torch.ones(64, 64, device="cuda", dtype=BF16)}, 1e-2, clip, finite)
    kept = [torch.full((64, 64), float(i), device="cuda", dtype=BF16) for i in range(1, 5)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for grad in kept:
            optimizer.step({"w": grad}, 1e-2, clip, finite)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = 0.0
    for grad in [1.0, 1.0, 2.0, 3.0, 4.0]:
        expected = 0.9 * expected + 0.1 * grad
    torch.testing.assert_close(optimizer.state()["exp_avg"]["w"], torch.full((64, 64), expected, device="cuda"))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_norms(dtype: torch.dtype) -> None:
    from chronicals.kernels.fused.grad_norm import GradNorm

    big = torch.randn(16384, 5120, device="cuda").to(dtype)
    tensors = [*gradients(0, dtype), *gradients(1, FP32), big, big[7:4096].view(-1)]
    measure = GradNorm(tensors)
    norms, total = (t.clone() for t in measure(tensors))
    exact, exact_total = grad_norm_reference(tensors)
    torch.testing.assert_close(norms.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(total.double(), exact_total, rtol=1e-5, atol=0)
    for _ in range(5):  # the same bits every time
        again = measure([t.clone() for t in tensors])
        assert torch.equal(again[0], norms) and torch.equal(again[1], total)
    big[12345, 678] = float("nan")
    norms, total = measure(tensors)
    assert torch.isnan(norms[-2]) and torch.isnan(total) and torch.isfinite(norms[:-2]).all()


def test_stochastic_rounding_is_unbiased_and_reproducible() -> None:
    """2^20 equal weights, moved by a third of a bf16 step each time."""
    mean = []
    for _ in range(2):
        slot = AdamWSlot.of(torch.ones(1 << 20, device="cuda", dtype=BF16), state="float32", master=False)
        update, grad = fused([slot]), torch.ones(1 << 20, device="cuda", dtype=BF16)
        for step in range(1, 31):
            update.step([grad], scalar(2**-8 / 3), scalar(1.0), scalar(step), scalar(1.0))
        mean.append(slot.weight.clone())
    assert torch.equal(*mean)
    moved = 30 * 2**-8 / 3
    # the variance of a step is at most a quarter of a squared bf16 step (2^-8 below 1): five deviations of the mean
    assert abs(1 - mean[0].double().mean().item() - moved) < 5 * (30 / 4) ** 0.5 * 2**-8 / 2**10


def test_nan_does_not_round_to_zero() -> None:
    slot = AdamWSlot.of(torch.ones(4096, device="cuda", dtype=BF16), state="float32", master=False)
    fused([slot]).step(
        [torch.ones_like(slot.weight)], scalar(float("nan")), scalar(1.0), scalar(1), scalar(1.0)
    )  # fmt: skip
    assert slot.weight.isinf().all()
