"""DoRA's kernels, interpreted: scales of many targets by one launch, both passes near the plain ones in float64."""

from __future__ import annotations

import pytest
import torch

from chronicals.kernels import dora
from chronicals.kernels.column_sums import reduce_partials
from chronicals.kernels.dora import DoRARows
from chronicals.kernels.fused import dora as fused
from chronicals.kernels.fused.glu import ACTIVATIONS, glu_forward
from tests.kernels.numerics import inside, relative_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scales_of_many_targets(dtype: torch.dtype) -> None:
    targets = []
    for rows, columns, rank, scaling in ((1, 5, 1, 2.0), (70, 130, 40, 0.5), (64, 64, 16, 1.0)):
        weight, a = inside(torch.randn(rows, columns).to(dtype)), inside(torch.randn(rank, columns).to(dtype))
        b, magnitude = torch.randn(rows, rank).to(dtype), torch.randn(rows)
        targets.append(DoRARows(weight, a, b, scaling, magnitude, torch.zeros(rows), torch.zeros(rows)))
    write = fused.dora_scales(targets)
    for _ in range(2):
        write()
        for ours in targets:
            plain = DoRARows(ours.weight, ours.a, ours.b, ours.scaling, ours.magnitude, *(2 * [ours.c.double()]))
            dora.dora_scales([plain])()
            assert relative_error(ours.c, plain.c) < 1e-6
            assert relative_error(ours.c, ours.magnitude * ours.inverse_norm) < 1e-6
            ours.b.normal_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [(1, 5), (33, 130), (70, 64)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_both_passes(dtype: torch.dtype, size: tuple[int, int], with_bias: bool) -> None:
    z, d = (inside(torch.randn(size).to(dtype)) for _ in range(2))
    c, factor = torch.randn(size[1]), torch.randn(size[1])
    bias = torch.randn(size[1]).to(dtype) if with_bias else None
    wide = None if bias is None else bias.double()
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3}[dtype]

    d_exact = d.double()
    sums = dora.dora_backward(d_exact, z.double(), c.double(), factor.double(), out=d_exact, bias=wide)
    outs = (torch.empty_like(d), z.clone(), d)
    for out in outs:  # apart, over z, over d
        partials = fused.dora_backward(d, out if out is outs[1] else z, c, factor, out=out, bias=bias)
    assert torch.equal(outs[0], d) and torch.equal(outs[1], d)
    scale = (d.abs().float().sum() * z.abs().float().max()).item()  # sums may cancel
    assert (reduce_partials(partials, torch.float32) - sums[0]).norm() < 1e-6 * scale * factor.abs().max()
    assert relative_error(d, d_exact) < tolerance

    exact = dora.scale_columns_(z.double(), c.double(), wide)
    assert fused.scale_columns_(z, c, bias) is z
    assert relative_error(z, exact) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_scales_and_the_glu_behind_them(dtype: torch.dtype, activation: str, with_bias: bool) -> None:
    """The bits of one pass after the other, in slices of wider buffers."""
    z, out = inside(torch.randn(5, 2 * 77).to(dtype)), inside(torch.zeros(5, 77, dtype=dtype))
    c, bias = torch.randn(2 * 77), torch.randn(2 * 77).to(dtype) if with_bias else None
    y = fused.scale_columns_(z.clone(), c, bias)
    expected = glu_forward(y, activation)
    assert fused.scaled_glu_forward_(z, c, bias, activation, out=out) is out
    assert torch.equal(z, y) and torch.equal(out, expected)
    assert torch.equal(fused.scaled_glu_forward_(z.clone(), torch.ones_like(c), None, activation), expected)
    assert fused.scaled_glu_forward_(z[:0], c, bias, activation).shape == (0, 77)


def test_into_a_place_and_of_nothing() -> None:
    place = torch.full((3, fused.column_parts(70, 64, torch.device("cpu")), 64), 7.0)
    d, z, c = torch.randn(70, 64), torch.randn(70, 64), torch.randn(64)
    assert fused.dora_backward(d, z, c, c, out=d, partial=place[1]).data_ptr() == place[1].data_ptr()
    assert (place[::2] == 7).all() and not (place[1] == 7).any()
    assert (fused.dora_backward(d[:0], z[:0], c, c, out=d[:0]) == 0).all()
    fused.scale_columns_(d[:0], c)
    fused.dora_scales([])()
