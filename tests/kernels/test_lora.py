"""LoRA's plain ops: adapters in their places, masks of dropout that are uniform, apart, and their elements' own."""

from __future__ import annotations

import pytest
import torch

from chronicals.kernels.lora import LoRADropout, Part, dropout_mask, place_adapters, threshold
from chronicals.kernels.philox import DROPOUT, philox4x32

DRAW = {"seed": 1, "stream": 2, "counter": 3}


def test_adapters_are_placed_at_each_call() -> None:
    joined, a, b = torch.zeros(7, 9), torch.randn(2, 4), torch.randn(5, 2)
    place = place_adapters([(a, joined[5:, :4]), (b, joined[:5, 4:6])])
    for _ in range(2):
        place()
        assert torch.equal(joined[5:, :4], a) and torch.equal(joined[:5, 4:6], b)
        assert joined.count_nonzero() == a.numel() + b.numel()
        a.normal_()


def test_nothing_to_place() -> None:
    place_adapters([])()


def test_what_does_not_fit_is_refused() -> None:
    joined = torch.zeros(7, 9)
    for source in (torch.zeros(2, 3), torch.zeros(2, 4).half(), torch.zeros(4, 2).t()):
        with pytest.raises(AssertionError):
            place_adapters([(source, joined[5:, :4])])
    with pytest.raises(AssertionError):
        place_adapters([(torch.zeros(4, 2), joined[5:, :4].t())])


def test_a_mask_by_hand() -> None:
    """Element (t, k) from its own call, word and half."""
    p, (tokens, columns) = 0.3, (3, 21)
    mask = dropout_mask(tokens, columns, p, **DRAW)
    for t in range(tokens):
        for k in range(columns):
            words = philox4x32(torch.tensor([t * 3 + k // 8]), DRAW["stream"], DRAW["counter"], DROPOUT, seed=1)
            bits = int(words[k % 8 // 2]) >> 16 * (k % 2) & 0xFFFF
            assert bool(mask[t, k]) == (bits % 2**15 >= round(0.3 * 2**15))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.999])
def test_masks_keep_what_they_should(p: float) -> None:
    mask = dropout_mask(512, 896, p, **DRAW)
    assert mask.shape == (512, 896)
    kept, deviation = 1 - threshold(p) / 2**15, (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(mask.double().mean() - kept) <= 5 * deviation
    for by in (0, 1):  # nor does a row or a column stand out
        n = mask.shape[by]
        assert ((mask.double().mean(by) - kept).abs() <= 5.5 * (p * (1 - p) / n) ** 0.5 + 1e-9).all()


def test_masks_of_other_adapters_steps_and_seeds_are_others() -> None:
    """Two masks agree where chance says, half the time at p = 1/2; so do neighbours within one."""
    mask, chance = dropout_mask(256, 512, 0.5, **DRAW), 5 * 0.5 / (256 * 512) ** 0.5
    others = [dropout_mask(256, 512, 0.5, **DRAW | {key: 7}) for key in DRAW]
    others += [dropout_mask(256, 512, 0.5, **DRAW | {key: DRAW[key] + 2**32}) for key in ("seed",)]
    others += [mask.roll(n, by) for n, by in ((1, 0), (1, 1), (2, 1), (4, 1), (8, 1))]
    for other in others:
        assert abs((mask == other).double().mean() - 0.5) < chance
    assert torch.equal(mask[:100], dropout_mask(100, 512, 0.5, **DRAW))  # an element's own, however many tokens


def test_the_counter_may_lie_on_the_device() -> None:
    for shape in ((), (1,)):
        counter = torch.full(shape, 3, dtype=torch.int64)
        assert torch.equal(dropout_mask(9, 20, 0.3, **DRAW | {"counter": counter}), dropout_mask(9, 20, 0.3, **DRAW))


def test_no_tokens() -> None:
    assert dropout_mask(0, 20, 0.3, **DRAW).shape == (0, 20)


def test_a_probability_of_one_is_refused() -> None:
    with pytest.raises(AssertionError):
        threshold(1.0)


def test_dropout_is_autograds() -> None:
    """y = s B A (M x) of each part, in float64."""
    parts, counter = [Part(0, 3, 2.0, 5), Part(4, 2, 0.5, 6)], torch.tensor([3])
    op = LoRADropout(parts, 0.3, seed=1, device="cpu")
    x, a = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((9, 20), (6, 20)))
    d_t, given = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 20, dtype=torch.float64)
    exact = torch.full((9, 6), 7.0, dtype=torch.float64)
    for part in parts:
        mask = dropout_mask(9, 20, 0.3, seed=1, stream=part.stream, counter=3).double() / 0.7
        rows = slice(part.start, part.start + part.rank)
        exact[:, rows] = part.scale * (x * mask) @ a[rows].t()
    d_x, d_a = torch.autograd.grad(exact, [x, a], d_t)

    x, a = x.detach(), a.detach()
    out = op.down(x, a, counter, out=torch.full((9, 6), 7.0, dtype=torch.float64))
    torch.testing.assert_close(out, exact.detach(), rtol=1e-13, atol=1e-13)
    dx = given.clone()
    partials = op.up_(dx, x, d_t, a, counter)
    torch.testing.assert_close(dx, given + d_x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(partials.sum(1), d_a, rtol=1e-12, atol=1e-12)
    assert torch.equal(op.up_(None, x, d_t, a, counter), partials)

    rstd, norm = torch.rand(9, dtype=torch.float64) + 0.5, torch.randn(20, dtype=torch.float64)
    again = given.clone()
    partials = op.up_(again, x / rstd[:, None] / norm, d_t, a, counter, rstd=rstd, norm=norm)
    assert torch.equal(again, dx)
    torch.testing.assert_close(partials.sum(1), d_a, rtol=1e-12, atol=1e-12)
