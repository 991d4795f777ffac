"""RMSNorm on the GPU: plain, or fused with the residual add before it; one read and one write of each tensor, each way.

With s = 1 / sqrt(mean(x^2) + eps), n = s x and v = w + offset, a row gives y = v n. For a gradient g of y,

    dx = s (v g - n mean(v g n)) [+ the gradient that x has from elsewhere],    dw = sum over rows of g n

(derived in docs/math/rmsnorm.md). Everything is float32 between load and store and is rounded once, so half precision
is nearer to float64 than transformers', which rounds n as well. Per row of H elements of b bytes the forward moves 2Hb
(4Hb with the add), the backward (rmsnorm_backward.py) 3Hb (4Hb with a residual gradient), recomputing y from s 2Hb;
beside them s, 4 bytes.

A row is a vector of the last dimension: with (T, N, D) inputs each head is normalised by itself (QK norm), read and
written where it lies in a wider buffer. Left out: rows wider than `MAX_HIDDEN`, float64, LayerNorm.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from chronicals.kernels.fused.column_sums import reduce_partials
from chronicals.kernels.fused.rmsnorm_backward import (
    partial_programs,
    qk_partial_programs,
    qk_rmsnorm_backward,
    rmsnorm_backward,
)
from chronicals.kernels.fused.rows import as_rows, block_for, outlet

__all__ = [
    "add_rmsnorm",
    "add_rmsnorm_forward",
    "partial_programs",
    "qk_partial_programs",
    "qk_rmsnorm_backward",
    "reduce_partials",
    "rmsnorm",
    "rmsnorm_backward",
    "rmsnorm_forward",
    "rmsnorm_recompute",
]


@triton.jit
def rmsnorm_forward_kernel(
    X: tl.tensor,  # (rows / HEADS, HEADS, hidden), as all below; the last stride is 1
    DELTA: tl.tensor,  # added to X before the norm, or None; HEADS is 1 then
    SUM: tl.tensor,  # X + DELTA, rounded; None without DELTA
    Y: tl.tensor,
    RSTD: tl.tensor,  # (rows,) float32: written, or read where it is KNOWN
    WEIGHT: tl.tensor,  # (hidden,)
    rows: tl.tensor,
    hidden: tl.tensor,
    x_stride: tl.tensor,
    x_head: tl.tensor,
    delta_stride: tl.tensor,
    sum_stride: tl.tensor,
    y_stride: tl.tensor,
    y_head: tl.tensor,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    HEADS: tl.constexpr,
    KNOWN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    token, head = (row // HEADS).to(tl.int64), row % HEADS
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (cols < hidden)
    x = tl.load(X + token * x_stride + head * x_head + cols, mask=mask, other=0.0).to(tl.float32)
    if DELTA is not None:
        x += tl.load(DELTA + token * delta_stride + cols, mask=mask, other=0.0).to(tl.float32)
        total = x.to(SUM.dtype.element_ty)
        tl.store(SUM + token * sum_stride + cols, total, mask=mask)
        x = total.to(tl.float32)  # normalise what is stored: it is all that the backward pass will see
    if KNOWN:
        rstd = tl.load(RSTD + row, mask=row < rows, other=0.0)
    else:
        rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / hidden + EPS)
        tl.store(RSTD + row, rstd, mask=row < rows)
    weight = tl.load(WEIGHT + cols, mask=cols < hidden, other=0.0).to(tl.float32) + OFFSET
    tl.store(Y + token * y_stride + head * y_head + cols, (x * rstd * weight).to(Y.dtype.element_ty), mask=mask)


class Config(NamedTuple):
    """How the forward is launched."""

    rows: int  # a tile holds
    warps: int


# by the width of a tile
FORWARD = {
    64: Config(32, 4),
    128: Config(16, 4),
    256: Config(8, 4),
    1024: Config(4, 4),
    2048: Config(2, 4),
    4096: Config(1, 8),
    8192: Config(1, 8),
}


def _forward(
    x: Tensor,
    weight: Tensor,
    offset: float,
    eps: float,
    *,
    rstd: Tensor | None = None,
    delta: Tensor | None = None,
    sum_out: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = as_rows(x)
    tokens, heads, hidden = rows.shape
    y, y_rows = outlet(out, x, x.dtype if offset else torch.promote_types(x.dtype, weight.dtype))
    known = rstd is not None
    rstd = torch.empty(tokens * heads, dtype=torch.float32, device=x.device) if rstd is None else rstd
    total, deltas, sums = x, None, None
    if delta is not None:
        assert heads == 1 and delta.shape == x.shape
        deltas = as_rows(delta)
        total, sums = outlet(sum_out, x, x.dtype)
    block = block_for(hidden)
    config = FORWARD[block]
    if x.numel():
        rmsnorm_forward_kernel[(triton.cdiv(tokens * heads, config.rows),)](
            rows,
            deltas,
            sums,
            y_rows,
            rstd,
            weight.contiguous(),
            tokens * heads,
            hidden,
            rows.stride(0),
            rows.stride(1),
            0 if deltas is None else deltas.stride(0),
            0 if sums is None else sums.stride(0),
            y_rows.stride(0),
            y_rows.stride(1),
            EPS=eps,
            OFFSET=offset,
            HEADS=heads,
            KNOWN=known,
            ROWS=config.rows,
            BLOCK=block,
            num_warps=config.warps,
        )
    return total, y, rstd


def rmsnorm_forward(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Normalises the rows of `x`.

    Args:
        x: (..., H) with H up to `MAX_HIDDEN`; float32, bfloat16 or float16. Strides are free but for the last, else `x`
            is copied.
        weight: (H,).
        eps: added to the mean square.
        offset: added to the weight.
        out: shaped like `x`, rows whole, otherwise strided at will; may be `x`. None: a new one, in the dtype of
            `x * weight`, or of `x` where `offset` is not 0.

    Returns:
        the normalised rows (..., H), and rstd: (number of rows,) float32, 1 / sqrt(mean square + eps).

    Raises:
        ValueError: another dtype, wider rows.
    """
    _, y, rstd = _forward(x, weight, offset, eps, out=out)
    return y, rstd


def add_rmsnorm_forward(
    residual: Tensor,
    delta: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    *,
    sum_out: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`residual + delta`, rounded, and its norm. Shapes and errors of `rmsnorm_forward`; no heads.

    Args:
        residual, delta: (T, H) each.
        sum_out: (T, H), may be `residual` or `delta`. None: a new one like `residual`.
        out: (T, H), may be `delta`. None: a new one.

    Returns:
        the sum (T, H), its norm (T, H), rstd (T,) float32.
    """
    return _forward(residual, weight, offset, eps, delta=delta, sum_out=sum_out, out=out)


def rmsnorm_recompute(
    x: Tensor, rstd: Tensor, weight: Tensor, offset: float = 0.0, *, out: Tensor | None = None
) -> Tensor:
    """The bits of the forward's norm once more, from `x` (after the add, if there was one) and `rstd`."""
    return _forward(x, weight, offset, 0.0, rstd=rstd, out=out)[1]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        y, rstd = rmsnorm_forward(x, weight, eps, offset)
        ctx.save_for_backward(x, rstd, weight)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, weight = ctx.saved_tensors
        dx, partial = rmsnorm_backward(grad, x, rstd, weight, ctx.offset, weight_grad=ctx.needs_input_grad[1])
        return dx, None if partial is None else reduce_partials(partial, weight.dtype), None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, delta: Tensor, weight: Tensor, eps: float, offset: float
    ) -> tuple[Tensor, Tensor]:
        total, y, rstd = add_rmsnorm_forward(residual, delta, weight, eps, offset)
        ctx.save_for_backward(total, rstd, weight)
        ctx.offset, ctx.delta_dtype = offset, delta.dtype
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, d_normed: Tensor) -> tuple[Tensor | None, ...]:
        total, rstd, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2]
        dx, partial = rmsnorm_backward(
            d_normed, total, rstd, weight, ctx.offset, d_residual=d_total, weight_grad=wanted
        )
        d_weight = None if partial is None else reduce_partials(partial, weight.dtype)
        return dx, dx.to(ctx.delta_dtype), d_weight, None, None


def rmsnorm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Normalises the last dimension of `x`; differentiable once.

    Args:
        x: (..., H), float32, bfloat16 or float16; each row of the last dimension by itself, so (T, N, D) is a norm per
            head. Strided views of a packed buffer are read in place.
        weight: (H,).
        eps: added to the mean square.
        offset: added to the weight; Gemma stores `weight - 1`.

    Returns:
        (..., H) in the dtype of `x` (of `x * weight` where those differ and `offset` is 0, as in transformers).

    Raises:
        ValueError: another dtype, or H above `MAX_HIDDEN`.
    """
    return _RMSNorm.apply(x, weight, eps, offset)


def add_rmsnorm(
    residual: Tensor, delta: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`residual + delta` and its `rmsnorm`, in one pass each way; differentiable once.

    Args:
        residual, delta: (T, H) each.
        weight, eps, offset: as for `rmsnorm`.

    Returns:
        the sum, rounded to the dtype of `residual`, and its norm: (T, H) each.
    """
    return _AddRMSNorm.apply(residual, delta, weight, eps, offset)
