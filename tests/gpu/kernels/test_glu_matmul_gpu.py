"""The GLU inside its matmuls on Hopper: no worse than the two kernels against float64; strided, in place, recorded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from chronicals.kernels.glu import glu_reference
from tests.kernels.numerics import nan_filled_memory, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    from chronicals.kernels.fused import glu, glu_matmul
    from chronicals.kernels.glu_matmul import MatmulThenGLU

    reason = glu_matmul.why_not(torch.device("cuda"), torch.bfloat16)
    pytestmark.append(pytest.mark.skipif(reason is not None, reason=str(reason)))
    PAIR = MatmulThenGLU(glu.glu_forward, glu.glu_backward)

TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4}
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
SHAPES = [(2049, 896, 4864), (3333, 1000, 1128), (2048, 64, 72), (4096, 4096, 1536)]  # rows, hidden, width


@pytest.fixture(autouse=True)
def _nan_filled_memory() -> Iterator[None]:
    with nan_filled_memory():
        yield


@pytest.fixture
def op() -> MatmulThenGLU:
    return glu_matmul.HopperGLUMatmul()


def wide(rows: int, columns: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """(rows, columns) in a buffer that is 64 columns wider, as one with adapters is."""
    return (scale * torch.randn(rows, columns + 64, device="cuda")).to(dtype)[:, :columns]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(
    op: MatmulThenGLU, shape: tuple[int, int, int], activation: str, dtype: torch.dtype, bias: bool
) -> None:
    rows, hidden, width = shape
    left, right = wide(rows, hidden, dtype), wide(2 * width, hidden, dtype, hidden**-0.5)
    added = torch.randn(2 * width, device="cuda").to(dtype) if bias else None
    exact = left.double() @ right.double().t() + (0 if added is None else added.double())
    exact_product = glu_reference(exact, activation)
    places = [torch.full((rows, size + 64), 7.0, device="cuda", dtype=dtype) for size in (2 * width, width)]
    gate_up, product = op.forward(
        left, right, activation, bias=added, gate_up=places[0][:, : 2 * width], out=places[1][:, :width]
    )
    theirs, their_product = PAIR.forward(left, right, activation, bias=added)
    assert relative_error(gate_up, exact) <= min(TOLERANCE[dtype], 1.05 * relative_error(theirs, exact) + 2e-7)
    assert relative_error(product, exact_product) <= 1.05 * relative_error(their_product, exact_product) + 2e-7
    assert all((place[:, -64:] == 7).all() for place in places), "written beside the output"
    alone, nothing = op.forward(left, right, activation, bias=added, product=False)
    assert torch.equal(alone, gate_up) and nothing is None


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(op: MatmulThenGLU, shape: tuple[int, int, int], activation: str, dtype: torch.dtype) -> None:
    rows, hidden, width = shape
    left, right = wide(rows, hidden, dtype), wide(hidden, width, dtype, hidden**-0.5)
    gate_up = wide(rows, 2 * width, dtype, 2.0)
    exact_in = gate_up.double().requires_grad_()
    exact_product = glu_reference(exact_in, activation)
    (exact,) = torch.autograd.grad(exact_product, exact_in, left.double() @ right.double())
    theirs = torch.empty_like(gate_up)
    PAIR.backward(left, right, gate_up, activation, d_gate_up=theirs, again=False)
    apart = torch.empty(rows, 2 * width, device="cuda", dtype=dtype)
    assert op.backward(left, right, gate_up, activation, d_gate_up=apart, again=False) is None
    product = op.backward(left, right, gate_up, activation, d_gate_up=gate_up, again=True)
    assert torch.equal(gate_up, apart), "in place it is another gradient"
    assert relative_error(apart, exact) <= min(2 * TOLERANCE[dtype], 1.05 * relative_error(theirs, exact) + 2e-7)
    assert relative_error(product, exact_product) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_product_again_is_the_forwards(op: MatmulThenGLU, activation: str, dtype: torch.dtype) -> None:
    left, right = wide(2500, 896, dtype), wide(2 * 4864, 896, dtype, 0.1)
    gate_up, product = op.forward(left, right, activation)
    again = op.backward(left, wide(896, 4864, dtype), gate_up, activation, d_gate_up=gate_up, again=True)
    assert torch.equal(again, product)


def test_every_bfloat16_gate(op: MatmulThenGLU) -> None:
    """Value and slope at all gates up to 500, each within a rounding of float64's."""
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cuda").to(torch.int16).view(torch.bfloat16)
    gate = gate[gate.abs() < 500]
    gate = gate[: len(gate) // 8 * 8]
    width = len(gate)
    one = torch.zeros(1, 8, device="cuda", dtype=torch.bfloat16)
    one[0, 0] = 1
    left, right = one.expand(2048, 8).contiguous(), one.t().expand(8, width).contiguous()  # a gradient of ones
    for activation in ACTIVATIONS:
        gate_up = torch.cat((gate, torch.ones_like(gate))).expand(2048, 2 * width).contiguous()
        exact_in = gate_up[:1].double().requires_grad_()
        exact = glu_reference(exact_in, activation)
        (slope,) = torch.autograd.grad(exact.sum(), exact_in)
        product = op.backward(left, right, gate_up, activation, d_gate_up=gate_up, again=True)
        for ours, ref in ((product[-1], exact[0]), (gate_up[-1, :width], slope[0, :width])):
            assert ((ours.double() - ref).abs() <= 2**-8 * ref.abs() + 2e-7 * (1 + gate.double().abs())).all()


def test_recorded_and_the_same_bits_each_time(op: MatmulThenGLU) -> None:
    """Forward and the backward behind it, which reads what forward wrote, in one graph."""
    bf = torch.bfloat16
    left, right, d, down = wide(8192, 896, bf), wide(2 * 4864, 896, bf, 0.1), wide(8192, 896, bf), wide(896, 4864, bf)

    def both() -> tuple[Tensor, ...]:
        gate_up, product = op.forward(left, right, "silu")
        again = op.backward(d, down, gate_up, "silu", d_gate_up=gate_up, again=True)
        return gate_up, product, again

    first = both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both()
    for _ in range(5):
        for x in found:
            x.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(found, first, strict=True))


def test_few_rows_go_to_the_two_kernels(op: MatmulThenGLU) -> None:
    left, right = wide(33, 896, torch.bfloat16), wide(2 * 1128, 896, torch.bfloat16)
    gate_up, product = op.forward(left, right, "silu")
    expected, expected_product = PAIR.forward(left, right, "silu")
    assert torch.equal(gate_up, expected) and torch.equal(product, expected_product)
