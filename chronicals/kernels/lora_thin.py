"""LoRA's thin matmuls, in plain PyTorch: those that go to the adapters' ranks, and the adapters' gradients.

Of a projection whose adapters are stacked, A (R, in) and B (out, R), which has a block for each adapter:

    t = s x A'          u = s dy B          dB_i = dy_i' t_i          dA = u' x

Each reads a wide matrix to make a thin one. They are a tenth of the work of the projection's own matmul at most, and
bound by memory. Where x or dy is much wider than what is made of it, that matmul makes t or u as well, and `lora_add_`
is what is left.

Shapes: T tokens, R ranks of all adapters together, padded where the buffers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from chronicals.kernels.grad_sink import matmul_into


class Block(NamedTuple):
    """Where one adapter's B lies in the stack: rows, which are columns of the output, and columns, which are ranks."""

    first: int
    columns: int
    start: int
    rank: int

    @property
    def outputs(self) -> slice:
        return slice(self.first, self.first + self.columns)

    @property
    def ranks(self) -> slice:
        return slice(self.start, self.start + self.rank)


def lora_down(
    x: Tensor, a: Tensor, *, alpha: float, scales: Tensor | None = None, out: Tensor, copy: Tensor | None = None
) -> None:
    """`t = s x A'`.

    Args:
        x: (T, in), last stride 1.
        a: (R, in), last stride 1.
        alpha: s, where it is the same for all adapters.
        scales: (R,) float32: s of each rank, times `alpha`.
        out: (T, R), last stride 1: written.
        copy: (T, R), last stride 1: written too.
    """
    torch.addmm(out, x, a.t(), beta=0, alpha=alpha, out=out)
    if scales is not None:
        out.mul_(scales)
    if copy is not None:
        copy.copy_(out)


def lora_up_backward(
    d_out: Tensor,
    b: Tensor,
    blocks: Sequence[Block],
    *,
    alpha: float,
    scales: Tensor | None = None,
    out: Tensor,
    copy: Tensor | None = None,
    rows: Tensor | None = None,
) -> None:
    """`u = s dy B`.

    Args:
        d_out: (T, out), last stride 1.
        b: (out, R), last stride 1; zero outside the blocks, and not read there.
        blocks: in order, side by side in ranks; beyond the last all is zero.
        alpha, scales: as in `lora_down`.
        out: (T, R), last stride 1: written, zeros beyond the last block included.
        copy: (T, R), last stride 1: written too, each row times its element of `rows` (T,) float32, where given.
    """
    torch.addmm(out, d_out, b, beta=0, alpha=alpha, out=out)
    if scales is not None:
        out.mul_(scales)
    if copy is not None:
        copy.copy_(out if rows is None else out * rows[:, None])


def lora_add_(
    y: Tensor,
    thin: Tensor,
    right: Tensor,
    *,
    alpha: float,
    scales: Tensor | None = None,
    kept: Tensor,
    rows: Tensor | None = None,
) -> Tensor:
    """`y += s v R`, where one matmul made y and v = x A' (R = B') or v = dy B (R = A) beside it.

    Args:
        y: (T, N), last stride 1: added to.
        thin: v, (T, R), last stride 1.
        right: (R, N).
        alpha, scales: as in `lora_down`.
        kept: (T, R), last stride 1: s v is written to it, t or u.
        rows: (T,) float32: of `kept` alone, each row is written times its element.

    Returns:
        y.
    """
    torch.mul(thin, alpha, out=kept)
    if scales is not None:
        kept.mul_(scales)
    y.addmm_(kept, right)
    if rows is not None:
        kept.mul_(rows[:, None])
    return y


def lora_grads(
    d_out: Tensor,
    u: Tensor | None,
    x: Tensor | None,
    t: Tensor,
    blocks: Sequence[Block],
    d_a: Sequence[Tensor | None],
    d_b: Sequence[Tensor | None],
    *,
    add: bool,
    norm: Tensor | None = None,
    parts: Tensor | None = None,
) -> None:
    """`dA = u' x`, or the sum of its `parts`, and `dB_i = dy_i' t_i`.

    Args:
        d_out: (T, out), u: (T, R), x: (T, in), t: (T, R): last stride 1. u and x are None where there are `parts`.
        blocks: of the adapters.
        d_a: of each adapter (rank, in), contiguous, of d_out's dtype or float32: written. None: not wanted.
        d_b: of each adapter (columns, rank), likewise.
        add: to what is there.
        norm: (in,): columns of dA are times its elements. With u times 1 / rms of its row, x may be what a norm of that
            weight read: `u' norm(x) = ((u / rms)' x) norm`.
        parts: (R or more, parts, in) float32 (float64 for float64), contiguous: dA in parts, as dropout's pass leaves
            it (lora.py).
    """
    for block, da, db in zip(blocks, d_a, d_b, strict=True):
        if da is not None and parts is not None:
            change = parts[block.ranks].sum(1)
            da.copy_(da + change if add else change)
        elif da is not None:
            assert u is not None and x is not None
            if norm is None:
                matmul_into(da, add, u[:, block.ranks].t(), x)
            else:
                change = torch.empty_like(da) if add else da
                matmul_into(change, False, u[:, block.ranks].t(), x)
                change.mul_(norm)
                if add:
                    da.add_(change)
        if db is not None:
            matmul_into(db, add, d_out[:, block.outputs].t(), t[:, block.ranks])
