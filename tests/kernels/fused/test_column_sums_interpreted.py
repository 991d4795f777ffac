"""Column sums, interpreted: ragged sizes, strided views, buffers of the caller's, sums of many at once."""

from __future__ import annotations

import pytest
import torch

from chronicals.kernels.fused import column_sums as fused
from tests.kernels.numerics import relative_error

TILE = fused.ROWS


@pytest.mark.parametrize("rows", [1, 7, TILE, TILE + 1, 5 * TILE + 5])
@pytest.mark.parametrize("columns", [1, 33, 129])
def test_sums(rows: int, columns: int) -> None:
    x = torch.rand(rows, columns)  # nothing cancels
    assert relative_error(fused.column_sums(x, torch.float32), x.double().sum(0)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("add", [False, True])
def test_strided_into_a_buffer(dtype: torch.dtype, add: bool) -> None:
    x, wide = torch.randn(70, 150).half()[::2, 3:140], torch.full((200,), 7.0, dtype=dtype)
    out = wide[5:142]
    if not add:
        out.fill_(float("nan"))
    assert fused.column_sums(x, dtype, out=out, add=add) is out
    expected = x.double().sum(0) + (7 if add else 0)
    assert relative_error(out, expected) < {torch.float32: 1e-6, torch.float16: 4e-4}[dtype]
    assert (wide[:5] == 7).all() and (wide[142:] == 7).all()


def test_partials_of_many_at_once() -> None:
    """As a training step has them: each layer's in its place of one buffer, one reduction into rows that lie apart."""
    layers = [torch.randn(33, 70) for _ in range(3)]
    parts = fused.column_parts(33, 70, layers[0].device)
    partials, wide = torch.empty(3, parts, 70), torch.full((3, 90), 7.0)
    for x, place in zip(layers, partials, strict=True):
        assert fused.column_partials(x, partial=place).data_ptr() == place.data_ptr()
    fused.reduce_partials(partials, torch.float32, out=wide[:, :70])
    for x, ours in zip(layers, wide, strict=True):
        assert torch.equal(ours[:70], fused.column_sums(x, torch.float32))
    assert (wide[:, 70:] == 7).all()
    fused.reduce_partials(partials, torch.float32, out=wide[:, :70], add=True)
    assert relative_error(wide[:, :70], 2 * torch.stack(layers).double().sum(1)) < 1e-6


@pytest.mark.parametrize("parts", [1, 3, fused.FEW, fused.FEW + 1, fused.REDUCE_ROWS + 3])
def test_few_parts_and_more_than_a_tile(parts: int) -> None:
    partials = torch.randn(2, parts, 133)
    together = fused.reduce_partials(partials, torch.float32)
    assert relative_error(together, partials.double().sum(1)) < 1e-6
    for one, alone in zip(together, partials, strict=True):
        assert torch.equal(one, fused.reduce_partials(alone.contiguous(), torch.float32))


def test_nothing_to_sum() -> None:
    assert torch.equal(fused.column_sums(torch.randn(0, 33), torch.float32), torch.zeros(33))
    assert fused.reduce_partials(torch.randn(0, 3, 33), torch.float32).shape == (0, 33)


def test_a_buffer_of_another_size_is_refused() -> None:
    with pytest.raises(AssertionError):
        fused.column_partials(torch.randn(9, 33), partial=torch.empty(99, 33))
