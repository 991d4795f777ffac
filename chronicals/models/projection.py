"""Linear maps of the decoder, as one class with one seam: whatever multiplies by a weight goes through a projection.

A plain projection holds its weight as it is. A LoRA projection takes its place in a built model (adapters/lora.py);
the layers do not know which one they run. Forward and backward are methods without autograd: the layer halves call
them from autograd functions of their own (see layer.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chronicals.kernels.grad_sink import WeightGradients
from chronicals.kernels.ops import Ops


class Projection(nn.Module):
    """`y = x W^T + b`, weight (out, in), the fused outputs of several Hugging Face projections stacked along `out`.

    Parameters are uninitialised until `Decoder.init_weights` or `load_model` fills them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ops: Ops,
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.ops = ops
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(T, in) -> (T, out)."""
        return F.linear(x, self.weight, self.bias)

    def input_grad(self, d_out: Tensor) -> Tensor:
        """(T, out) -> (T, in)."""
        return d_out @ self.weight

    def weight_grads(self, d_out: Tensor, x: Tensor, gradients: WeightGradients) -> None:
        """The gradients of weight and bias, from d_out (T, out) and the forward's x (T, in)."""
        gradients.matmul(self.weight, d_out.t(), x)
        if self.bias is not None and self.bias.requires_grad:
            place = gradients.place(self.bias, self.ops.column_parts(*d_out.shape, d_out.device))
            partials = self.ops.column_partials(d_out, partial=place)
            if place is None:
                gradients.sum(self.bias, partials, self.ops.reduce_partials)
