"""Linear maps of the decoder, as one class with one seam: whatever multiplies by a weight goes through a projection.

A plain projection holds its weight as it is. LoRA, NF4 and FP8 projections replace the class when the model is built;
the decoder does not know which one it runs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Projection(nn.Module):
    """`y = x W^T + b`, weight (out, in), the fused outputs of several Hugging Face projections stacked along `out`.

    Parameters are uninitialised until `Decoder.init_weights` or `load_model` fills them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(T, in) -> (T, out)."""
        return F.linear(x, self.weight, self.bias)
