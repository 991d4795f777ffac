"""The fused gated linear units on CUDA: every dtype against float64, no worse than eager PyTorch, in place or not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from chronicals.kernels.glu import glu, glu_reference
from tests.kernels.numerics import nan_filled_memory, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    from chronicals.kernels.fused import glu as fused

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
SHAPES = [(1, 17), (7, 33), (760, 1128), (1, 4864), (33, 1025), (2048, 4864), (1024, 14336), (513, 5120)]


@pytest.fixture(autouse=True)
def _nan_filled_memory() -> Iterator[None]:
    with nan_filled_memory():
        yield


def random(rows: int, width: int, dtype: torch.dtype, scale: float = 3.0) -> Tensor:
    return (scale * torch.randn(rows, width, device="cuda")).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype, activation: str, shape: tuple[int, int]) -> None:
    rows, width = shape
    gate_up, d_out = random(rows, 2 * width, dtype), random(rows, width, dtype)
    exact_in = gate_up.double().requires_grad_()
    exact = glu_reference(exact_in, activation)
    (exact_grad,) = torch.autograd.grad(exact, exact_in, d_out.double())
    for op in (fused.glu, glu):
        x = gate_up.clone().requires_grad_()
        out = op(x, activation)
        (grad,) = torch.autograd.grad(out, x, d_out)
        found = {"value": relative_error(out, exact), "gradient": relative_error(grad, exact_grad)}
        if op is fused.glu:
            ours = found
    for name, error in ours.items():
        assert error <= TOLERANCE[dtype], name
        assert error <= 1.05 * found[name] + 2e-7, f"{name}: eager is nearer"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_bfloat16_gate(activation: str) -> None:
    """All bf16 values up to 500, value and slope, each within a rounding of float64's; none beyond turns to NaN."""
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cuda").to(torch.int16).view(torch.bfloat16)
    far = gate[gate.abs() < 1e9]
    assert fused.glu(torch.cat((far, torch.ones_like(far))), activation).isfinite().all()
    gate = gate[gate.abs() < 500]
    width = len(gate)
    gate_up = torch.cat((gate, torch.ones_like(gate)))[None]
    exact_in = gate_up.double().requires_grad_()
    exact = glu_reference(exact_in, activation)
    (exact_grad,) = torch.autograd.grad(exact.sum(), exact_in)
    x = gate_up.clone().requires_grad_()
    out = fused.glu(x, activation)
    (grad,) = torch.autograd.grad(out.sum(), x)
    for ours, ref in ((out[0], exact[0]), (grad[0, :width], exact_grad[0, :width])):
        assert ((ours.double() - ref).abs() <= 2**-8 * ref.abs() + 2e-7 * (1 + gate.double().abs())).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_in_place_with_the_product(dtype: torch.dtype, activation: str) -> None:
    gate_up, d_out = random(1128, 2 * 4864, dtype), random(1128, 4864, dtype)
    product = fused.glu_forward(gate_up, activation)
    apart = fused.glu_backward(d_out, gate_up, activation, d_gate_up=torch.empty_like(gate_up))
    fused.glu_backward(d_out, gate_up, activation, d_gate_up=gate_up, out=d_out)
    assert torch.equal(gate_up, apart)
    assert torch.equal(d_out, product)


def test_slices_of_wider_buffers_and_what_lies_beside_them() -> None:
    wide_in, wide_out = random(500, 2300, torch.bfloat16), torch.full((500, 1200), 7.0, device="cuda").bfloat16()
    gate_up, out = wide_in[::2, 3:2259], wide_out[::2, 1:1129]
    expected = fused.glu_forward(gate_up.contiguous(), "silu")
    assert torch.equal(fused.glu_forward(gate_up, "silu", out=out), expected)
    out.fill_(7.0)
    assert (wide_out == 7).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_same_bits_each_time_and_no_rows(activation: str) -> None:
    gate_up, d_out = random(2048, 2 * 4864, torch.bfloat16), random(2048, 4864, torch.bfloat16)
    first = fused.glu_backward(d_out, gate_up, activation, d_gate_up=torch.empty_like(gate_up))
    for _ in range(3):
        again = fused.glu_backward(d_out, gate_up, activation, d_gate_up=torch.empty_like(gate_up))
        assert torch.equal(first, again)
    assert fused.glu(gate_up[:0], activation).shape == (0, 4864)
