"""NF4 weights made wide on CUDA: the reference's bits, into parts of wider buffers and in a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from chronicals.kernels import nf4

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    from chronicals.kernels.fused import nf4 as fused

SHAPES = [(1, 64), (3, 64), (129, 192), (1152, 896), (896, 4864), (4096, 14336)]


def some(rows: int, columns: int) -> torch.Tensor:
    weight = 0.02 * torch.randn(rows, columns)
    weight[:-1, :64] = 0.0
    return weight


def on_gpu(weight: nf4.NF4Weight) -> nf4.NF4Weight:
    scales = None if weight.scales is None else weight.scales.cuda()
    return nf4.NF4Weight(weight.codes.cuda(), weight.absmax.cuda(), scales, weight.tables.cuda())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits(shape: tuple[int, int], double_quant: bool, dtype: torch.dtype) -> None:
    rows, columns = shape
    weight = nf4.quantize(some(rows, columns), double_quant=double_quant)
    expected = nf4.dequantize(weight, torch.empty(rows, columns, dtype=dtype))
    for extra in (0, 40, 128):
        wide = torch.full((rows + 1, columns + extra), torch.nan, dtype=dtype, device="cuda")
        out = fused.dequantize(on_gpu(weight), wide[:rows, :columns])
        assert torch.equal(out.cpu(), expected), extra
        assert wide[rows:].isnan().all(), extra
        assert wide[:, columns:].isnan().all(), extra


@pytest.mark.parametrize("rows", [(4, 4), (896, 128, 128), (300, 5, 7)])
def test_a_stack_has_the_bits_of_its_parts(rows: tuple[int, ...]) -> None:
    parts = [nf4.quantize((1 + i) * torch.randn(n, 192)) for i, n in enumerate(rows)]
    out = fused.dequantize(on_gpu(nf4.stack(parts)), torch.empty(sum(rows), 192, device="cuda"))
    assert torch.equal(out.cpu(), torch.cat([nf4.dequantize(part, torch.empty(part.shape)) for part in parts]))


def test_quantised_here_or_on_the_host() -> None:
    """The same codes; a mean's last bit may differ, and a byte of absmax with it."""
    weight = some(1152, 896).bfloat16()
    here, host = nf4.quantize(weight.cuda()), nf4.quantize(weight)
    assert torch.equal(here.codes.cpu(), host.codes)
    assert (here.absmax.cpu() != host.absmax).float().mean() < 1e-3
    wide = [nf4.dequantize(w, torch.empty_like(weight, device=w.codes.device)).cpu() for w in (here, host)]
    torch.testing.assert_close(*wide, rtol=1e-2, atol=1e-3)


def test_in_a_graph() -> None:
    first, second = (nf4.quantize(torch.randn(256, 896, device="cuda")) for _ in range(2))
    buffer = torch.empty(256, 896 + 32, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(64, 896, dtype=torch.bfloat16, device="cuda")

    def both() -> torch.Tensor:
        return torch.cat([x @ fused.dequantize(w, buffer[:, :896]).t() for w in (first, second)])

    expected = both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = both()
    buffer.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, expected)
