"""The fused gated linear units, interpreted: against the float64 reference, ragged, in place, in wider buffers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chronicals.kernels.fused import glu as fused
from chronicals.kernels.glu import glu_reference
from tests.kernels.numerics import assert_matches, relative_error

# of a gate far below zero: its sigmoid is rightly 0, and a GPU says nothing
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

ACTIVATIONS = fused.ACTIVATIONS


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 33), (33, 7), (2, 1025)])
def test_values_and_gradients(activation: str, rows: int, width: int) -> None:
    gate_up = 3 * torch.randn(rows, 2 * width)
    assert_matches(lambda x: fused.glu(x, activation), lambda x: glu_reference(x, activation), [gate_up])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_gate_by_itself(activation: str) -> None:
    """Value and slope at each gate, to the rounding of float32: what an average would hide in the tails."""
    gate = torch.linspace(-20, 20, 4001)
    gate_up = torch.cat((gate, torch.ones_like(gate))).unsqueeze(0)
    ours, theirs = gate_up.clone().requires_grad_(), gate_up.double().requires_grad_()
    out, reference = fused.glu(ours, activation), glu_reference(theirs, activation)
    (grad,), (expected,) = torch.autograd.grad(out.sum(), ours), torch.autograd.grad(reference.sum(), theirs)
    for value, exact in ((out, reference), (grad, expected)):
        assert ((value.double() - exact).abs() / (1 + exact.abs())).max() < 1e-6


def test_the_normal_distribution_is_as_near_as_float32() -> None:
    """Absolutely everywhere, and relatively in the tail, where 1 + erf has nothing left."""
    gate = torch.linspace(-12, 12, 9601)
    exact = glu_reference(torch.cat((gate, torch.ones_like(gate))).double(), "gelu")
    tail = 0.5 * gate.double() * torch.special.erfc(-gate.double() / 2**0.5)  # the reference cancels there itself
    out = fused.glu(torch.cat((gate, torch.ones_like(gate))), "gelu").double()
    assert ((out - exact).abs() / (1 + exact.abs())).max() < 1.5e-7
    deep = (gate < 0) & (gate > -8)
    assert ((out - tail).abs() / tail.abs())[deep].max() < 5e-4


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_gates_neither_overflow_nor_turn_to_nan(activation: str) -> None:
    gate = torch.tensor([-1e10, -1e4, -100.0, 0.0, 100.0, 1e4, 1e10])
    gate_up = torch.cat((gate, torch.ones_like(gate))).requires_grad_()
    out = fused.glu(gate_up, activation)
    (grad,) = torch.autograd.grad(out.sum(), gate_up)
    torch.testing.assert_close(out, gate.relu(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad[:7], torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 7, 33])
def test_backward_in_place_with_the_product(activation: str, rows: int) -> None:
    gate_up, d_out = torch.randn(rows, 66), torch.randn(rows, 33)
    product = fused.glu_forward(gate_up, activation)
    apart = fused.glu_backward(d_out, gate_up, activation, d_gate_up=torch.empty_like(gate_up))
    again = torch.empty_like(d_out)
    same = fused.glu_backward(d_out, gate_up.clone(), activation, d_gate_up=gate_up.clone(), out=again)
    assert torch.equal(same, apart)
    assert torch.equal(again, product)
    fused.glu_backward(d_out, gate_up, activation, d_gate_up=gate_up, out=d_out)
    assert torch.equal(gate_up, apart)
    assert torch.equal(d_out, product)


def test_launchers_write_where_they_are_told_and_nowhere_else() -> None:
    wide_in, wide_out, wide_grad = torch.randn(8, 100), torch.full((8, 50), 7.0), torch.full((8, 100), 7.0)
    gate_up, out, d_gate_up = wide_in[::2, 3:69], wide_out[::2, 5:38], wide_grad[::2, 9:75]
    before = wide_in.clone()
    expected = fused.glu_forward(gate_up.contiguous(), "silu")
    assert fused.glu_forward(gate_up, "silu", out=out) is out
    assert torch.equal(out, expected)
    d_out = torch.randn(4, 33)
    apart = fused.glu_backward(d_out, gate_up.contiguous(), "silu", d_gate_up=torch.empty(4, 66))
    out.fill_(0.0)
    assert fused.glu_backward(d_out, gate_up, "silu", d_gate_up=d_gate_up, out=out) is d_gate_up
    assert torch.equal(d_gate_up, apart)
    assert torch.equal(out, expected)
    assert torch.equal(wide_in, before)
    out.fill_(7.0)
    d_gate_up.fill_(7.0)
    assert (wide_out == 7).all() and (wide_grad == 7).all()


def test_strided_input_and_expanded_gradient() -> None:
    wide = torch.randn(9, 140)
    for x in (wide[::2, :66], wide[:, ::2][:, :66], wide.T[:66, :8]):
        assert_matches(lambda x: fused.glu(x, "silu"), lambda x: glu_reference(x, "silu"), [x])
    x: Tensor = torch.randn(7, 66, requires_grad=True)
    ours = torch.autograd.grad(fused.glu(x, "silu").sum(), x)[0]
    assert relative_error(ours, torch.autograd.grad(glu_reference(x, "silu").sum(), x)[0]) < 2e-6


def test_half_precision_is_rounded_once() -> None:
    x = torch.randn(33, 128, dtype=torch.float16)
    ours, expected = fused.glu(x, "silu"), glu_reference(x.double(), "silu").half()
    assert ours.dtype == torch.float16
    # float32 arithmetic may fall on the other side of a tie, rarely
    assert (ours != expected).float().mean() < 1e-2


@pytest.mark.parametrize("shape", [(0, 66), (8,), (2, 3, 8), (0, 3, 8)])
def test_empty_and_other_dimensions(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    out = fused.glu(x, "gelu_tanh")
    assert out.shape == (*shape[:-1], shape[-1] // 2)
    assert torch.allclose(out, glu_reference(x, "gelu_tanh"), atol=1e-6)
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


def test_what_it_does_not_take_is_named() -> None:
    with pytest.raises(ValueError) as caught:
        fused.glu(torch.randn(2, 4), "relu")
    assert str(caught.value) == "unknown activation 'relu': one of silu, gelu, gelu_tanh"
    with pytest.raises(ValueError) as caught:
        fused.glu(torch.randn(2, 4, dtype=torch.float64), "silu")
    assert str(caught.value) == "the fused GLU takes float32, bfloat16 and float16, not torch.float64"
