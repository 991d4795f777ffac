"""Rotary position embedding in the half-rotated (Hugging Face) layout.

A head of width D is D/2 planes; plane j holds the elements j and j + D/2 and turns by `position * inv_freq[j]`:

    out[j]       = x[j] cos - x[j + D/2] sin
    out[j + D/2] = x[j + D/2] cos + x[j] sin

Angles and the rotation are float32 (float64 for float64 inputs); the result is cast once. Su et al., "RoFormer",
2021, equation 34; the layout is GPT-NeoX's. Left out: the interleaved layout (no Hugging Face checkpoint of our
families stores it).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rope` as a complex product, in the inputs' own dtype: meant for float64."""

    def turn(x: Tensor) -> Tensor:
        real, imaginary = x.chunk(2, dim=-1)
        turned = torch.complex(real, imaginary) * torch.complex(cos, sin).unsqueeze(1)
        return torch.cat((turned.real, turned.imag), dim=-1)

    return turn(q), turn(k)


def rope_tables(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each token's angles.

    Args:
        positions: (T,) integers, 0 at each document's first token.
        inv_freq: (D/2,) float32, radians per position.

    Returns:
        cos, sin: (T, D/2) float32 each.
    """
    angles = positions.to(inv_freq.dtype).unsqueeze(-1) * inv_freq
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turns queries and keys by their positions.

    Args:
        q: (T, Nq, D).
        k: (T, Nk, D).
        cos, sin: (T, D/2) float32, from `rope_tables`.

    Returns:
        q and k turned, shapes and dtypes kept.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)
