"""The gated linear unit together with the matmul that it follows: the gate-up projection before it in the forward
pass, the down projection's input gradient in the backward pass.

    forward:   [gate | up] = left right' + bias,   product = a(gate) up
    backward:  d = left right,   dgate = d up a'(gate),   dup = d a(gate)     (kernels/glu.py has a and a')

`MatmulThenGLU` is two kernels, a matmul and the pass over its output, on any device: from plain PyTorch and from
Triton alike, whose passes it is given. In `fused/glu_matmul.py` the pass is the end of the matmul's own kernel, and d
is never written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class MatmulThenGLU:
    """The matmul, then the GLU's own pass.

    Operands and results may be slices of wider buffers; their last stride is 1.

    Args:
        glu_forward, glu_backward: those of kernels/glu.py, or of another file with the same signatures.
    """

    glu_forward: Callable[..., Tensor]
    glu_backward: Callable[..., Tensor]

    def forward(
        self,
        left: Tensor,
        right: Tensor,
        activation: str,
        *,
        bias: Tensor | None = None,
        product: bool = True,
        gate_up: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The projection and its GLU.

        Args:
            left: (T, K).
            right: (2F, K): the gate's rows, then up's.
            activation: "silu", "gelu" or "gelu_tanh".
            bias: (2F,).
            product: whether it is wanted; gate and up are the same bits without it.
            gate_up: (T, 2F), written with the projection. None: a new one.
            out: (T, F), written with the product. None: a new one.

        Returns:
            gate_up (T, 2F), and the product (T, F) or None.
        """
        if gate_up is None:
            gate_up = F.linear(left, right, bias)
        elif bias is None:
            torch.mm(left, right.t(), out=gate_up)
        else:
            torch.addmm(bias, left, right.t(), out=gate_up)
        return gate_up, self.glu_forward(gate_up, activation, out=out) if product else None

    def backward(
        self,
        left: Tensor,
        right: Tensor,
        gate_up: Tensor,
        activation: str,
        *,
        d_gate_up: Tensor,
        again: bool,
        out: Tensor | None = None,
    ) -> Tensor | None:
        """The gradient of gate and up, and the product again where it was not kept.

        Args:
            left: (T, N), the gradient of what the product was projected to.
            right: (N, F), the weight that projected it.
            gate_up: (T, 2F), the forward's.
            activation: as in the forward.
            d_gate_up: (T, 2F), written; may be `gate_up`.
            again: whether the product is wanted.
            out: (T, F), written with it. None: a new one.

        Returns:
            The product (T, F), bit for bit the forward's, or None where it is not wanted.
        """
        d_product = torch.mm(left, right, out=out if again else None)
        self.glu_backward(d_product, gate_up, activation, d_gate_up=d_gate_up, out=d_product if again else None)
        return d_product if again else None
