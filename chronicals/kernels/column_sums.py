"""Sums over the rows of a matrix: the gradient of a bias, and the last step of a norm's weight's.

They come in two steps, so that kernels need no atomics and a training step can add up the parts of all its layers at
once: `column_partials` leaves sums over some of the rows each, `reduce_partials` adds these up. Here there is one part.
"""

from __future__ import annotations

import torch
from torch import Tensor


def column_parts(rows: int, columns: int, device: torch.device) -> int:
    """How many partial sums `column_partials` leaves of a (rows, columns) matrix."""
    return 1


def column_partials(x: Tensor, *, partial: Tensor | None = None) -> Tensor:
    """(T, N) -> (parts, N) float32 (float64 for float64), written to `partial` where given."""
    sums = x.sum(0, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return sums if partial is None else partial.copy_(sums)


def reduce_partials(partials: Tensor, dtype: torch.dtype, *, out: Tensor | None = None, add: bool = False) -> Tensor:
    """Adds parts up, of one sum or of many at once.

    Args:
        partials: (parts, N) or (sums, parts, N).
        dtype: of the result.
        out: (N,) or (sums, N). None: a new one.
        add: to what is in `out`.

    Returns:
        (N,) or (sums, N).
    """
    total = partials.sum(-2)
    if out is None:
        return total.to(dtype)
    return out.copy_(total + out if add else total)
