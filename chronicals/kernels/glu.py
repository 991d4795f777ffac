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
    if activation not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: one of {', '.join(_ACTIVATIONS)}")
    gate, up = gate_up.chunk(2, dim=-1)
    return _ACTIVATIONS[activation](gate) * up


def glu_forward(gate_up: Tensor, activation: str, *, out: Tensor | None = None) -> Tensor:
    """`glu` without autograd, written to `out` (T, F) where given."""
    product = glu(gate_up, activation)
    return product if out is None else out.copy_(product)


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
    value = _ACTIVATIONS[activation](gate)
    d_up = d_out * value
    if activation == "silu":
        d_gate = torch.ops.aten.silu_backward(d_out * up, gate)
    else:
        d_gate = torch.ops.aten.gelu_backward(d_out * up, gate, approximate=_APPROXIMATE[activation])
    if out is not None:
        out.copy_(value * up)
    return torch.cat((d_gate, d_up), dim=-1, out=d_gate_up)
