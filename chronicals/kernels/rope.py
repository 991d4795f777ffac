"""Rotary position embedding in the half-rotated (Hugging Face) layout.

The first R elements of a head of width D turn (R = D unless rotation is partial), the others pass. They are R/2
planes; plane j holds the elements j and j + R/2 and turns by `position * inv_freq[j]`:

    out[j]       = x[j] cos - x[j + R/2] sin
    out[j + R/2] = x[j + R/2] cos + x[j] sin

Angles and the rotation are float32 (float64 for float64 inputs); the result is cast once. Gradients and bytes:
docs/math/rope.md. Su et al., "RoFormer", 2021, equation 34; the layout is GPT-NeoX's. Left out: the interleaved layout
(no Hugging Face checkpoint of our families stores it).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rope` as a complex product, in the inputs' own dtype: meant for float64."""

    def turn(x: Tensor) -> Tensor:
        real, imaginary, passed = _parts(x, cos)
        turned = torch.complex(real, imaginary) * torch.complex(cos, sin).unsqueeze(1)
        return torch.cat((turned.real, turned.imag, passed), dim=-1)

    return turn(q), turn(k)


def rope_tables(positions: Tensor, inv_freq: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each token's angles.

    Args:
        positions: (T,) integers, 0 at each document's first token.
        inv_freq: (R/2,) float32, radians per position; or (T, R/2), a token's own.
        scaling: multiplies both (yarn's and longrope's attention factor).

    Returns:
        cos, sin: (T, R/2) float32 each.
    """
    angles = positions.to(inv_freq.dtype).unsqueeze(-1) * inv_freq
    return angles.cos() * scaling, angles.sin() * scaling


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turns queries and keys by their positions.

    Args:
        q: (T, Nq, D).
        k: (T, Nk, D).
        cos, sin: (T, R/2) float32, from `rope_tables`; R <= D.

    Returns:
        q and k turned, shapes and dtypes kept.
    """
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    first, second, passed = _parts(wide, cos)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, passed), dim=-1).to(x.dtype)


def _parts(x: Tensor, cos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two halves that turn into each other, (T, N, R/2) each, and what passes, (T, N, D - R)."""
    half = cos.shape[-1]
    return x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]


def rope_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_key_value_heads: int,
    *,
    positions: Tensor | None = None,
    inverse: bool = False,
) -> None:
    """Turns the queries and keys of a packed projection where they lie; no autograd.

    Args:
        qkv: (T, (Nq + 2 Nk) D), query heads, then key heads, then value heads.
        cos, sin: (T, R/2) float32, or with `positions` (P, R/2), a row for each position; R <= D.
        num_heads, num_key_value_heads: Nq, Nk; a buffer of N turning heads alone is N and 0.
        positions: (T,) integers below P.
        inverse: turn back; applied to the gradient of turned q and k it gives that of q and k.
    """
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    heads = qkv.unflatten(1, (num_heads + 2 * num_key_value_heads, -1))
    turning = heads[:, : num_heads + num_key_value_heads, : 2 * cos.shape[-1]]
    wide = turning.to(torch.promote_types(qkv.dtype, cos.dtype))
    (first, second), sign = wide.chunk(2, dim=-1), -1 if inverse else 1
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = (second * cos).addcmul_(first, sin, value=sign)
    first.mul_(cos).addcmul_(second, sin, value=-sign)
    second.copy_(turned)
    if wide is not turning:
        turning.copy_(wide)
