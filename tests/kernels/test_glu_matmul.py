"""The matmul and the GLU behind it as one op: against autograd in float64, in wider buffers, and in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chronicals.kernels.glu import glu_backward, glu_forward, glu_reference
from chronicals.kernels.glu_matmul import MatmulThenGLU
from chronicals.kernels.ops import REFERENCE

OP = MatmulThenGLU(glu_forward, glu_backward)
ROWS, HIDDEN, WIDTH = 7, 10, 6


def wide(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(rows, columns) inside a wider buffer."""
    return torch.randn(rows, columns + 3, dtype=dtype)[:, :columns]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_forward(activation: str, bias: bool) -> None:
    left, right = wide(ROWS, HIDDEN), wide(2 * WIDTH, HIDDEN)
    added = torch.randn(2 * WIDTH, dtype=torch.float64) if bias else None
    expected = left @ right.t() + (0 if added is None else added)
    places = wide(ROWS, 2 * WIDTH), wide(ROWS, WIDTH)
    for gate_up, out in ((None, None), places):
        found, product = OP.forward(left, right, activation, bias=added, gate_up=gate_up, out=out)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(product, glu_reference(expected, activation))
        assert out is None or (found is gate_up and product is out)
        alone, nothing = OP.forward(left, right, activation, bias=added, product=False, gate_up=gate_up)
        assert torch.equal(alone, found) and nothing is None


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_backward(activation: str) -> None:
    left, right, gate_up = wide(ROWS, HIDDEN), wide(HIDDEN, WIDTH), wide(ROWS, 2 * WIDTH)
    exact = gate_up.clone().requires_grad_()
    product = glu_reference(exact, activation)
    (expected,) = torch.autograd.grad(product, exact, left @ right)
    apart = torch.empty_like(gate_up)
    assert OP.backward(left, right, gate_up, activation, d_gate_up=apart, again=False) is None
    torch.testing.assert_close(apart, expected)
    out = wide(ROWS, WIDTH)
    assert OP.backward(left, right, gate_up, activation, d_gate_up=gate_up, again=True, out=out) is out
    torch.testing.assert_close(gate_up, expected)
    torch.testing.assert_close(out, product.detach())


def test_the_bits_of_the_two_kernels() -> None:
    left, right = torch.randn(9, 16).bfloat16(), torch.randn(2 * 8, 16).bfloat16()
    gate_up, product = REFERENCE.glu_matmul.forward(left, right, "silu")
    assert torch.equal(gate_up, torch.nn.functional.linear(left, right))
    assert torch.equal(product, glu_forward(gate_up, "silu"))
    down, d = torch.randn(4, 8).bfloat16(), torch.randn(9, 4).bfloat16()
    expected, d_product = torch.empty_like(gate_up), d @ down
    glu_backward(d_product, gate_up, "silu", d_gate_up=expected, out=d_product)
    again = REFERENCE.glu_matmul.backward(d, down, gate_up, "silu", d_gate_up=gate_up, again=True)
    assert torch.equal(gate_up, expected) and torch.equal(again, d_product) and torch.equal(again, product)
