"""Column sums on CUDA: every dtype against float64, no worse than eager PyTorch, strided, and the same bits again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.numerics import nan_filled_memory, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    from chronicals.kernels.fused import column_sums as fused

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1152), (7, 33), (760, 1128), (65, 1), (513, 5120), (16384, 1152), (8192, 6144), (2048, 9728)]


@pytest.fixture(autouse=True)
def _nan_filled_memory() -> Iterator[None]:
    with nan_filled_memory():
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = torch.randn(shape, device="cuda").to(dtype)
    exact, ours = x.double().sum(0), fused.column_sums(x, torch.float32)
    scale = x.double().abs().sum(0).norm()  # a sum may cancel
    assert (ours.double() - exact).norm() < 1e-6 * scale
    narrow, eager = fused.column_sums(x, dtype), x.sum(0)
    assert relative_error(narrow, exact) <= 1.05 * relative_error(eager, exact) + 1e-6
    for _ in range(3):
        assert torch.equal(fused.column_sums(x, torch.float32), ours)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add", [False, True])
def test_of_a_part_of_a_wider_buffer_into_another(kept: torch.dtype, add: bool) -> None:
    """The query part of a packed gradient, unaligned too; nothing else is read or written."""
    for first in (0, 8, 3):
        wide = torch.full((1128, 1152), float("nan"), device="cuda").bfloat16()
        wide[:, first : first + 896] = torch.randn(1128, 896, device="cuda")
        out = torch.full((1000,), 7.0, device="cuda").to(kept)
        fused.column_sums(wide[:, first : first + 896], kept, out=out[first : first + 896], add=add)
        exact = wide[:, first : first + 896].double().sum(0) + (7 if add else 0)
        assert relative_error(out[first : first + 896], exact) < {torch.float32: 1e-6, torch.bfloat16: 4e-3}[kept]
        assert (out[:first] == 7).all() and (out[first + 896 :] == 7).all()


def test_many_layers_and_one_reduction_under_a_graph() -> None:
    layers = [torch.randn(2048, 1152, device="cuda").bfloat16() for _ in range(4)]
    parts = fused.column_parts(2048, 1152, layers[0].device)
    partials = torch.empty(4, parts, 1152, device="cuda")
    sums = torch.empty(4, 1152, device="cuda")

    def step() -> None:
        for x, place in zip(layers, partials, strict=True):
            fused.column_partials(x, partial=place)
        fused.reduce_partials(partials, torch.float32, out=sums)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for x in layers:
        x.normal_()
    graph.replay()
    for x, ours in zip(layers, sums, strict=True):
        assert torch.equal(ours, fused.column_sums(x, torch.float32))


def test_no_rows() -> None:
    assert (fused.column_sums(torch.randn(0, 300, device="cuda"), torch.float32) == 0).all()
