"""The plain update: against torch in float64, unbiased rounding, 8-bit moments near float32."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn

from chronicals.kernels import adamw
from chronicals.kernels.adamw import AdamWSlot, adamw_reference

SETTINGS = {"betas": (0.9, 0.99), "eps": 1e-8}
FIRST_ONE, SECOND_ONE = 127 - 52, 127  # the exponents of 2^0


def test_is_torch_adamw_in_float64() -> None:
    start = torch.randn(7, 33, dtype=torch.float64)
    theirs = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], lr=2e-2, weight_decay=0.1, foreach=False, **SETTINGS)
    slot = AdamWSlot.of(start.clone(), state="float32", master=True, rate=2.0, decay=0.1)
    for step in range(1, 11):
        grad = torch.randn(7, 33, dtype=torch.float64)
        theirs.grad = 0.5 * grad
        optimizer.step()
        adamw_reference(slot, grad, lr=1e-2, clip_scale=0.5, step=step, **SETTINGS)
    torch.testing.assert_close(slot.weight, theirs.detach(), rtol=1e-13, atol=1e-14)


def test_random_bits_are_uniform_and_depend_on_everything() -> None:
    draw, size = {"seed": 1, "step": 2, "stream": 3}, 1 << 16
    words = adamw.random_bits(size, **draw)
    for bits in words:
        ones = torch.stack([(bits >> i & 1).double().mean() for i in range(12, 32)])  # the ones that rounding uses
        assert (ones - 0.5).abs().max() < 5 * 0.5 / 2**8  # five deviations
        assert len(bits.unique()) > size - 10
    assert all(map(torch.equal, adamw.random_bits(5000, **draw), (b[:5000] for b in words)))  # an element's own
    for key in draw:
        assert (adamw.random_bits(5000, **draw | {key: 7})[0] != words[0][:5000]).float().mean() > 0.999


def test_random_bits_of_an_element_and_of_those_that_share_a_call_do_not_go_together() -> None:
    first, second, weight = (
        bits.double() / 2**32 - 0.5 for bits in adamw.random_bits(1 << 18, seed=1, step=2, stream=3)
    )
    pairs = [(first, second), (first, weight), (second, weight)]
    pairs += [(second, second.roll(shift)) for shift in (1, 128, 2048, 4096, 6144)]
    for one, other in pairs:
        assert (12 * (one * other).mean()).abs() < 5 / 2**9  # the correlation, in five deviations


def test_every_way_of_rounding_is_unbiased() -> None:
    """Over all random numbers the mean is the value itself: exactly, not statistically."""
    r = torch.arange(1 << 16) << 16
    for value in (1.0, -1.00390625, 0.3, -1e-30, 3.14159, 65280.1):
        x = torch.tensor(value, dtype=torch.float32)
        rounded = adamw.round_stochastically(x.expand(1 << 16), r).double()
        assert len(rounded.unique()) <= 2
        assert abs(rounded.mean() - x.double()) <= 1e-12 * x.double().abs()
    r, blocks = torch.arange(1 << 20) << 12, torch.ones(1 << 12, dtype=torch.uint8)
    for value in (1.0, 0.7, 0.1, 1e-2, 3e-4, 2e-5, 1e-6, 0.0):
        x = torch.full((1 << 20,), value)
        for sign in (1, -1):
            one = FIRST_ONE * blocks
            decoded = adamw.decode_first(adamw.encode_first(sign * x, one, r), one, x.shape).double()
            assert len(decoded.unique()) <= 2
            assert abs(decoded.mean() - sign * x[0].double()) < 1e-12
            assert ((decoded - sign * x).abs() <= (x / 8).clamp(min=2**-17)).all()
        if value > 2**-31:
            one = SECOND_ONE * blocks
            decoded = adamw.decode_second(adamw.encode_second(x, one, r), one, x.shape).double()
            assert abs(decoded.mean() / x[0].double() - 1) < 1e-12
            assert ((decoded / x - 1).abs() <= 1 / 8).all()


def test_nan_and_infinity_do_not_become_numbers() -> None:
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    for r in (0, 0xFFFF0000):
        assert adamw.round_stochastically(bits, torch.full((3,), r)).isinf().all()
        infinite = torch.tensor([float("inf"), -float("inf")])
        assert torch.equal(adamw.round_stochastically(infinite, torch.full((2,), r)).float(), infinite)


def test_codes_over_their_whole_range() -> None:
    codes = torch.arange(256).to(torch.uint8)
    of_first, of_second = (torch.tensor([one], dtype=torch.uint8) for one in (FIRST_ONE, SECOND_ONE))
    in_order = adamw._as_words(codes.view(1, 256))  # so that element i has code i
    m = adamw.decode_first(in_order, of_first, codes.shape)
    v = adamw.decode_second(in_order, of_second, codes.shape)
    assert m[0] == 0 and (m[:128].diff() > 0).all() and torch.equal(m[128:], -m[:128])
    assert v[0] == 2**-31 and (v.diff() > 0).all() and m[127] == v[255] == 1.875
    # in the middle of two codes the random number decides, and only it
    for encode, one, value, top in ((adamw.encode_first, of_first, m, 127), (adamw.encode_second, of_second, v, 255)):
        between = torch.cat(((value[:top] + value[1 : top + 1]) / 2, torch.zeros(256 - top)))
        for r, expected in ((0x70000000, codes[:top]), (0x90000000, codes[:top] + 1)):
            got = adamw._in_order(encode(between, one, torch.full((256,), r)), 256)
            assert torch.equal(got[:top], expected)


def test_a_blocks_exponent_leaves_room_for_rounding() -> None:
    """Whatever the largest of a block, with the largest random number its code is the last one at most."""
    r = torch.tensor([0xFFFFFFFF])
    for mantissa in (1.0, 1.5, 1.75, 1.8749, 1.875 - 2**-19, 1.875 - 2**-23, 1.875, 1.9, 2 - 2**-23):
        for power in (-60, 0, 40):
            x = torch.tensor([mantissa * 2.0**power])
            of_first, of_second = adamw.block_exponents(x / adamw.UNIT), adamw.block_exponents(x)
            (m,) = adamw.decode_first(adamw.encode_first(x, of_first, r), of_first, x.shape)
            (v,) = adamw.decode_second(adamw.encode_second(x, of_second, r), of_second, x.shape)
            assert x <= m < 1.125 * x and x <= v < 1.125 * x
            assert adamw.decode_first(adamw.encode_first(-x, of_first, r), of_first, x.shape) == -m
    zero = torch.zeros(300)
    exponents = adamw.block_exponents(zero)
    assert not exponents.any()
    r = r.expand(300)
    for encode, decode in ((adamw.encode_first, adamw.decode_first), (adamw.encode_second, adamw.decode_second)):
        assert not decode(encode(zero, exponents, r), exponents, zero.shape).any()


def test_codes_hold_any_moment_that_a_finite_norm_allows() -> None:
    for size in (1e-19, 1e-10, 1.0, 1e10, 1.8e19):
        slot = AdamWSlot.of(torch.zeros(256), state="int8", master=False)
        grad = torch.full((256,), size)
        adamw_reference(slot, grad, lr=1e-3, clip_scale=1.0, step=1, betas=(0.9, 0.999), eps=1e-8)
        m, v = slot.moments()
        assert (m / (0.1 * size) - 1).abs().max() < 1 / 8
        if size**2 > 1e-35:
            assert (v / (0.001 * size * size) - 1).abs().max() < 1 / 8


def test_float16_needs_a_master() -> None:
    with pytest.raises(ValueError) as caught:
        AdamWSlot.of(torch.ones(2, dtype=torch.float16), state="float32", master=False)
    assert str(caught.value) == "float16 weights need a float32 master; stochastic rounding is for bfloat16"


def train(dtype: torch.dtype, state: str, *, seed: int = 0, steps: int = 200) -> tuple[Tensor, list[float]]:
    """A layer of 64 x 48 fitted to noisy targets; the weight, and the loss after each step."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(512, 48, generator=generator) * torch.logspace(-2, 0, 48)
    y = x @ torch.randn(48, 64, generator=generator) + 0.1 * torch.randn(512, 64, generator=generator)
    slot = AdamWSlot.of(torch.zeros(64, 48, dtype=dtype), state=state, master=False, decay=0.01)
    losses = []
    for step in range(1, steps + 1):
        rows = torch.randint(512, (64,), generator=generator)
        weight = slot.weight.float().clone().requires_grad_()
        (x[rows] @ weight.T - y[rows]).square().mean().backward()
        assert weight.grad is not None
        lr = 0.02 * (1 - (step - 1) / steps)
        adamw_reference(slot, weight.grad, lr=lr, clip_scale=1.0, step=step, betas=(0.9, 0.999), eps=1e-8, seed=seed)
        losses.append((x @ slot.weight.float().T - y).square().mean().item())
    return slot.weight.float(), losses


@pytest.mark.parametrize(
    ("dtype", "state", "distance", "loss"),
    [  # distance of the weights after 200 steps, as a share of how far they went; excess of the final loss
        (torch.float32, "bfloat16", 0.006, 0.01),
        (torch.float32, "int8", 0.06, 0.04),
        (torch.bfloat16, "bfloat16", 0.03, 0.02),
        (torch.bfloat16, "int8", 0.07, 0.04),
    ],
)
def test_200_steps_stay_near_float32(dtype: torch.dtype, state: str, distance: float, loss: float) -> None:
    exact, losses = train(torch.float32, "float32")
    assert losses[-1] < 0.5 * losses[0]
    weight, other = train(dtype, state)
    apart, excess = (weight - exact).norm() / exact.norm(), other[-1] / losses[-1] - 1
    assert apart < distance and abs(excess) < loss


def test_a_second_moment_decays_in_every_format() -> None:
    """Rounded to nearest it would stand still: a step takes a thousandth, half a bf16 step is twice that."""
    for state in ("float32", "bfloat16", "int8"):
        slot = AdamWSlot.of(torch.zeros(2048), state=state, master=False)
        for step in range(1, 401):  # one gradient, then none but of each block's first
            grad = torch.zeros(2048)
            grad[:: adamw.BLOCK] = 1.0
            grad = torch.ones(2048) if step == 1 else grad
            adamw_reference(slot, grad, lr=0.0, clip_scale=1.0, step=step, betas=(0.9, 0.999), eps=1e-8)
        m, v = (moment.float().view(-1, adamw.BLOCK)[:, 1:] for moment in slot.moments())
        assert abs(v.mean() / (1e-3 * 0.999**399) - 1) < 0.1, state
        assert m.abs().max() < 1e-3, state


@pytest.mark.parametrize(
    ("dtype", "state", "master"),
    [(torch.bfloat16, "bfloat16", False), (torch.bfloat16, "int8", False), (torch.float16, "int8", True)],
)
def test_the_same_seed_gives_the_same_bits(dtype: torch.dtype, state: str, master: bool) -> None:
    grad = torch.randn(7, 333)

    def run(seed: int) -> AdamWSlot:
        slot = AdamWSlot.of(torch.ones(7, 333, dtype=dtype), state=state, master=master)
        for step in range(1, 4):
            adamw_reference(slot, grad, lr=1e-3, clip_scale=1.0, step=step, seed=seed, **SETTINGS)
        return slot

    first, again, other = run(1), run(1), run(2)
    for field in fields(first):
        value = getattr(first, field.name)
        if isinstance(value, Tensor):
            assert torch.equal(value, getattr(again, field.name))
    assert not torch.equal(first.exp_avg_sq, other.exp_avg_sq)
