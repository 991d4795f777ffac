"""The fused update under the interpreter: the bits of the plain one in each format, ragged, unaligned, skipped."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from chronicals.kernels.adamw import AdamWSlot, adamw_reference
from chronicals.kernels.fused.adamw import FusedAdamW
from chronicals.kernels.fused.pointers import PointerTable

BETAS, EPS, SEED = (0.9, 0.999), 1e-8, 2**33 + 5
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES = [1, 33, 300, 8193, 0]  # a whole tile among them
FORMATS = [  # weight, moments, master, gradient; masters are float16's: the interpreter truncates a copy to bfloat16
    (FP32, "float32", False, FP32),
    (FP16, "float32", True, FP16),
    (FP32, "bfloat16", False, BF16),
    (BF16, "bfloat16", False, BF16),
    (BF16, "int8", False, FP32),
    (FP16, "int8", True, FP32),
]


def slots_of(weight: torch.dtype, state: str, master: bool, sizes: list[int]) -> list[AdamWSlot]:
    generator = torch.Generator().manual_seed(0)
    return [
        AdamWSlot.of(
            torch.randn(size, generator=generator).to(weight),
            state=state,
            master=master,
            rate=1.0 + i,
            decay=0.1 * i,
        )
        for i, size in enumerate(sizes)
    ]


def gradients(step: int, dtype: torch.dtype, sizes: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def pieces(slot: AdamWSlot) -> dict[str, Tensor]:
    named = {field.name: getattr(slot, field.name) for field in fields(slot)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def one(value: float) -> Tensor:
    return torch.tensor([float(value)])


def assert_as_plain(ours: list[AdamWSlot], theirs: list[AdamWSlot]) -> None:
    for mine, its in zip(ours, theirs, strict=True):
        for name, value in pieces(its).items():
            got = pieces(mine)[name]
            if value.dtype == FP32:
                torch.testing.assert_close(got, value, rtol=1e-6, atol=1e-7)
            else:  # float32 arithmetic in another order may fall to the other side, once in a thousand
                assert (got != value).sum() <= 1e-3 * value.numel(), name


@pytest.mark.parametrize(("weight", "state", "master", "grad"), FORMATS)
def test_is_the_plain_update(weight: torch.dtype, state: str, master: bool, grad: torch.dtype) -> None:
    ours, theirs = slots_of(weight, state, master, SIZES), slots_of(weight, state, master, SIZES)
    update = FusedAdamW(ours, betas=BETAS, eps=EPS, seed=SEED)
    for step in (1, 2):
        grads = gradients(step, grad, SIZES)
        update.step(grads, one(1e-2), one(0.5), one(step), one(1.0))
        for i, (slot, g) in enumerate(zip(theirs, grads, strict=True)):
            adamw_reference(
                slot, g, lr=1e-2, clip_scale=0.5, step=step, betas=BETAS, eps=EPS, seed=SEED, stream=i
            )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(grads, gradients(step, grad, SIZES), strict=True))
    assert_as_plain(ours, theirs)


def test_late_steps_and_other_betas() -> None:
    """1 - beta^t: by its series while beta^t is near 1, by the exponential after; beta 0 is no special case."""
    for betas in ((0.9, 0.9999), (0.0, 0.95)):
        for step in (1, 3, 1000, 100_000):
            ours, theirs = slots_of(FP32, "float32", False, [16]), slots_of(FP32, "float32", False, [16])
            grads = gradients(1, FP32, [16])
            FusedAdamW(ours, betas=betas, eps=EPS).step(grads, one(1e-2), one(1.0), one(step), one(1.0))
            adamw_reference(theirs[0], grads[0], lr=1e-2, clip_scale=1.0, step=step, betas=betas, eps=EPS)
            assert_as_plain(ours, theirs)


@pytest.mark.parametrize(("weight", "state", "master", "grad"), [FORMATS[0], FORMATS[4]])
def test_a_step_that_is_not_finite_writes_nothing_but_zeros(
    weight: torch.dtype, state: str, master: bool, grad: torch.dtype
) -> None:
    sizes = [7, 4112]
    slots = slots_of(weight, state, master, sizes)
    update = FusedAdamW(slots, betas=BETAS, eps=EPS)
    before = [{name: value.clone() for name, value in pieces(slot).items()} for slot in slots]
    for zero in (False, True):
        grads = [torch.full((size,), float("nan"), dtype=grad) for size in sizes]
        update.step(grads, one(1e-2), one(float("nan")), one(1), one(0.0), zero_grads=zero)
        assert all((g == 0).all() if zero else g.isnan().all() for g in grads)
        for slot, old in zip(slots, before, strict=True):
            assert all(torch.equal(value, old[name]) for name, value in pieces(slot).items())
    grads = gradients(1, grad, sizes)
    update.step(grads, one(1e-2), one(1.0), one(1), one(1.0), zero_grads=True)
    assert all((g == 0).all() for g in grads)
    assert all(not torch.equal(slot.weight, old["weight"]) for slot, old in zip(slots, before, strict=True))


def test_a_rate_of_zero_moves_no_weight() -> None:
    """Not even one that is zero, by the little that a bound on the rate would leave; without a gradient neither."""
    weight, grad = torch.randn(272), torch.randn(272)
    weight[::2], grad[::3] = 0.0, 0.0
    slot = AdamWSlot.of(weight.clone(), state="float32", master=False, decay=0.1)
    FusedAdamW([slot], betas=BETAS, eps=EPS).step([grad], one(0.0), one(1.0), one(1), one(1.0))
    assert torch.equal(slot.weight, weight)
    torch.testing.assert_close(slot.exp_avg, 0.1 * grad)


@pytest.mark.parametrize("state", ["bfloat16", "int8"])
def test_views_at_odd_addresses(state: str) -> None:
    wide, grad = torch.full((300,), 0.5, dtype=BF16), torch.randn(300).to(BF16)
    odd = [AdamWSlot.of(wide[3:275], state=state, master=False)]
    plain = [AdamWSlot.of(wide[3:275].clone(), state=state, master=False)]
    update = FusedAdamW(odd, betas=BETAS, eps=EPS)
    update.step([grad[5:277]], one(1e-2), one(1.0), one(1), one(1.0))
    assert [group.aligned for group in update._groups] == [False]
    adamw_reference(plain[0], grad[5:277], lr=1e-2, clip_scale=1.0, step=1, betas=BETAS, eps=EPS)
    assert_as_plain(odd, plain)
    assert (wide[:3] == 0.5).all() and (wide[275:] == 0.5).all()


def test_nan_does_not_round_to_zero() -> None:
    """A GPU's own NaN is 0x7FFFFFFF: random bits added to it carry through its sign."""
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(FP32)
    slots = [AdamWSlot.of(torch.ones(272, dtype=BF16), state="float32", master=False, decay=1.0)]
    FusedAdamW(slots, betas=BETAS, eps=EPS).step([torch.ones(272, dtype=BF16)], nan, one(1.0), one(1), one(1.0))
    assert slots[0].weight.isinf().all()


def test_the_table() -> None:
    tensors = [torch.zeros(size) for size in (5, 0, 16, 17)]
    table = PointerTable([tensors, [None] * 4], [5, 0, 16, 17], tile=8)
    assert table.tiles.tolist() == [[0, 0], [2, 0], [2, 1], [3, 0], [3, 1], [3, 2]]
    assert table.first_tile.tolist() == [0, 1, 1, 3, 6]
    assert table.addresses.tolist() == [[t.data_ptr() for t in tensors], [0] * 4]
    moved = [torch.zeros(20)[1:][: t.numel()] for t in tensors]
    table.set(0, moved)
    assert table.addresses[0].tolist() == [t.data_ptr() for t in moved]
    assert not table.aligned
