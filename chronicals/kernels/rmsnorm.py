"""Root mean square norm: `y = x / sqrt(mean(x^2) + eps) * (w + offset)` over the last dimension.

The statistics are float32 whatever the input, and the casts stand where transformers has them, so that half precision
rounds alike: Llama and its kin cast the normalised input back before they multiply by the weight; Gemma, whose weight
is stored as a distance from one (`offset = 1`), multiplies in float32 and casts last.

Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4. Left out here: LayerNorm (no family
needs it).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rmsnorm_reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """`rmsnorm` in the inputs' own dtype, without any cast: meant for float64."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (weight + offset)


def rmsnorm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Normalises the last dimension of `x`.

    Args:
        x: (..., H), any float dtype.
        weight: (H,).
        eps: added to the mean square.
        offset: added to the weight; Gemma stores `weight - 1`.

    Returns:
        (..., H) in the dtype of `x` (of `x * weight` where those differ and `offset` is 0, as in transformers).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset == 0.0:
        return weight * normalised.to(x.dtype)
    return (normalised * (weight.to(wide.dtype) + offset)).to(x.dtype)
