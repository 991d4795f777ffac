"""Gated linear units: their references, transformers' activations, and the error for an unknown one."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from chronicals.kernels.glu import glu, glu_backward, glu_reference
from tests.kernels.numerics import assert_matches

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 2), (7, 1520), (33, 64)])
def test_matches_reference(dtype: torch.dtype, activation: str, shape: tuple[int, int]) -> None:
    x = (3 * torch.randn(shape)).to(dtype)
    assert_matches(lambda x: glu(x, activation), lambda x: glu_reference(x, activation), [x])


@pytest.mark.parametrize(("ours", "theirs"), ACTIVATIONS.items())
def test_is_transformers_activation(ours: str, theirs: str) -> None:
    x = 3 * torch.randn(9, 40)
    assert torch.equal(glu(x, ours), ACT2FN[theirs](x[:, :20]) * x[:, 20:])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_in_the_memory_of_its_inputs(activation: str) -> None:
    """As the MLP's backward calls it: the gradient over gate_up, the product over its own gradient."""
    gate_up, d_out = torch.randn(5, 12, requires_grad=True), torch.randn(5, 6)
    product = glu(gate_up, activation)
    (expected,) = torch.autograd.grad(product, gate_up, d_out)
    place, out = gate_up.detach().clone(), d_out.clone()
    assert glu_backward(out, place, activation, d_gate_up=place, out=out) is place
    torch.testing.assert_close(place, expected)
    assert torch.equal(out, product)


@pytest.mark.parametrize("function", [glu, glu_reference])
def test_unknown_activation_is_named(function: object) -> None:
    with pytest.raises(ValueError) as caught:
        function(torch.randn(2, 4), "relu")
    assert str(caught.value) == "unknown activation 'relu': one of silu, gelu, gelu_tanh"
