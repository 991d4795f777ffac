"""DoRA (Liu et al. 2024) in plain PyTorch: each row of an adapted weight has a length of its own, which is trained.

    y = c * z + b        z = x (W + s B A)^T        c = m / |W + s B A|, the norm of each row

with m the magnitude. The norm counts as a constant in backward (section 4.3 of the paper), as in PEFT, so that

    dz = c * dy          dm = (sum over tokens of dy * z) / norm

and the adapter's own gradients are those of plain LoRA for dz. The norms are worked out once a micro-batch, without a
weight of full size beside W, and rounded to the magnitude's dtype, so that c is 1 where that begins as the norm. Left
out: dropout, for which PEFT adapts another input than W is given.

Shapes: T tokens, N outputs, K inputs, r the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chronicals.kernels.glu import glu_forward


@dataclass(frozen=True)
class DoRARows:
    """What the scales of one target are made of, and where they go; all keep their memory."""

    weight: Tensor  # (N, K), any row stride
    a: Tensor  # (r, K), any row stride
    b: Tensor  # (N, r), contiguous
    scaling: float  # s
    magnitude: Tensor  # (N,)
    c: Tensor  # (N,) float32 (float64 for float64): written, magnitude / norm
    inverse_norm: Tensor  # (N,), as c: written


def dora_scales(targets: Sequence[DoRARows]) -> Callable[[], None]:
    """A plan, made once: each call of it writes every target's `c` and `inverse_norm`."""

    @torch.no_grad()
    def write() -> None:
        for rows in targets:
            wide = rows.c.dtype
            adapted = rows.weight.to(wide) + rows.scaling * (rows.b.to(wide) @ rows.a.to(wide))
            norm = adapted.norm(dim=1).to(rows.magnitude.dtype).to(wide)
            torch.div(1, norm, out=rows.inverse_norm)
            torch.mul(rows.magnitude.to(wide), rows.inverse_norm, out=rows.c)

    return write


def scale_columns_(y: Tensor, c: Tensor, bias: Tensor | None = None) -> Tensor:
    """`c * y + bias`, in place.

    Args:
        y: (T, N), any row stride.
        c: (N,) float32.
        bias: (N,) or None.
    """
    scaled = y * c
    return y.copy_(scaled if bias is None else scaled + bias)


def scaled_glu_forward_(
    gate_up: Tensor, c: Tensor, bias: Tensor | None, activation: str, *, out: Tensor | None = None
) -> Tensor:
    """`scale_columns_`, and the GLU of what it makes: the bits of one after the other.

    Args:
        gate_up: (T, 2F), any row stride; scaled in place.
        c: (2F,) float32.
        bias: (2F,) or None.
        activation: as `glu_forward` has it.
        out: (T, F), written. None: a new one.

    Returns:
        (T, F).
    """
    return glu_forward(scale_columns_(gate_up, c, bias), activation, out=out)


def dora_backward(
    d: Tensor,
    z: Tensor,
    c: Tensor,
    factor: Tensor,
    *,
    out: Tensor,
    bias: Tensor | None = None,
    partial: Tensor | None = None,
) -> Tensor:
    """Makes of the gradient of y that of z, and the magnitude's gradient in parts.

    Args:
        d: (T, N), any row stride: dy.
        z: (T, N), any row stride. Where y itself was kept, y with its `bias`.
        c: (N,) float32.
        factor: (N,) float32 that multiplies the sums: `inverse_norm` for z; for y 1 / magnitude, as z = (y - b) / c.
        out: (T, N), any row stride: c * dy; may be `d` or `z`.
        bias: (N,), taken from `z`.
        partial: (parts, N) float32 to write, parts as `column_parts` says. None: a new one.

    Returns:
        (parts, N) float32 (float64 for float64), for `reduce_partials`; here one part.
    """
    wide = torch.promote_types(d.dtype, torch.float32)
    kept = z.to(wide) if bias is None else z.to(wide) - bias
    sums = ((d * kept).sum(0, keepdim=True) * factor).to(wide)
    out.copy_(d * c)
    return sums if partial is None else partial.copy_(sums)
