"""The kernel that makes NF4 weights wide, interpreted: the reference's bits, into whole buffers and parts of wider
ones."""

from __future__ import annotations

import pytest
import torch

from chronicals.kernels import nf4
from chronicals.kernels.fused import nf4 as fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (3, 64), (77, 192), (64, 896)])
def test_bits(rows: int, columns: int, double_quant: bool, dtype: torch.dtype) -> None:
    weight = nf4.quantize(0.02 * torch.randn(rows, columns), double_quant=double_quant)
    expected = nf4.dequantize(weight, torch.empty(rows, columns, dtype=dtype))
    whole = fused.dequantize(weight, torch.full((rows, columns), torch.nan, dtype=dtype))
    assert torch.equal(whole, expected)
    wide = torch.full((rows + 3, columns + 40), torch.nan, dtype=dtype)
    fused.dequantize(weight, wide[:rows, :columns])
    assert torch.equal(wide[:rows, :columns], expected)
    assert wide[rows:].isnan().all()
    assert wide[:, columns:].isnan().all()


@pytest.mark.parametrize("rows", [(4, 4), (256, 128, 128), (5, 3, 7)])
def test_a_stack_has_the_bits_of_its_parts(rows: tuple[int, ...]) -> None:
    """Whose groups of blocks and offsets are their own, wherever they begin."""
    parts = [nf4.quantize((1 + i) * torch.randn(n, 64)) for i, n in enumerate(rows)]
    out = fused.dequantize(nf4.stack(parts), torch.empty(sum(rows), 64))
    expected = [nf4.dequantize(part, torch.empty(part.shape)) for part in parts]
    assert torch.equal(out, torch.cat(expected))
