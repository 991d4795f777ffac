"""Gated linear unit: `act(gate) * up`, gate and up being the halves of one fused projection.

Shazeer, "GLU Variants Improve Transformer", 2020: SwiGLU (`silu`) and GEGLU. `gelu` is the error-function form and
`gelu_tanh` its tanh approximation: two different functions, never mixed up here (Gemma means tanh).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}  # torch's names of the two


def glu_reference(gate_up: Tensor, activation: str) -> Tensor:
    """`glu` written out, in the input's own dtype: meant for float64."""
    gate, up = gate_up.chunk(2, dim=-1)
    match activation:
        case "silu":
            weight = 1 / (1 + torch.exp(-gate))
        case "gelu":
            weight = 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
        case "gelu_tanh":
            weight = 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        case _:
            raise ValueError(f"unknown activation {activation!r}: one of {', '.join(_ACTIVATIONS)}")
    return gate * weight * up


def glu(gate_up: Tensor, activation: str) -> Tensor:
    """Activates the gate and multiplies.

    Args:
        gate_up: (T, 2F): gate in the first F columns, up in the last F.
        activation: "silu", "gelu" or "gelu_tanh".

    Returns:
        (T, F) in the dtype of `gate_up`.

    Raises:
        ValueError: another activation.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return _activation(activation)(gate) * up


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def glu_forward(gate_up: Tensor, activation: str, *, out: Tensor | None = None) -> Tensor:
    """`glu` without autograd, written to `out` (T, F) where given."""
    gate, up = gate_up.chunk(2, dim=-1)
    value = _activation(activation)(gate)
    return torch.mul(value, up, out=value if out is None else out)


def glu_backward(
    d_out: Tensor, gate_up: Tensor, activation: str, *, d_gate_up: Tensor, out: Tensor | None = None
) -> Tensor:
    """The gradient of `gate_up`, and the forward's output again where it is wanted.

    Args:
        d_out: (T, F), the gradient of the output.
        gate_up: (T, 2F), the forward's input.
        activation: as in the forward.
        d_gate_up: (T, 2F), written; may be `gate_up`.
        out: (T, F), written with the forward's output; may be `d_out`. None: not computed.

    Returns:
        `d_gate_up`.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    d_gate, d_up = d_gate_up.chunk(2, dim=-1)
    value, d_value = _ACTIVATIONS[activation](gate), d_out * up
    product = None if out is None else value * up  # before `d_up`, which may be `up`, is written
    torch.mul(d_out, value, out=d_up)
    if out is not None and product is not None:
        out.copy_(product)
    if activation == "silu":
        torch.ops.aten.silu_backward(d_value, gate, grad_input=d_gate)
    else:
        torch.ops.aten.gelu_backward(d_value, gate, approximate=_APPROXIMATE[activation], grad_input=d_gate)
    return d_gate_up
