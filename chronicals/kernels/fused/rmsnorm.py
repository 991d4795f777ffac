"""RMSNorm on the GPU: plain, or fused with the residual add before it; one read and one write of each tensor, each way.

With s = 1 / sqrt(mean(x^2) + eps), n = s x and v = w + offset, a row gives y = v n. For a gradient g of y,

    dx = s (v g - n mean(v g n)) [+ the gradient that x has from elsewhere],    dw = sum over rows of g n

(derived in docs/math/rmsnorm.md). Everything is float32 between load and store and is rounded once, so half precision
is nearer to float64 than transformers', which rounds n as well. Per row of H elements of b bytes the forward moves 2Hb
(4Hb with the add), the backward 3Hb (4Hb with a residual gradient), recomputing y from s 2Hb; beside them s, 4 bytes.

dw is summed without atomics or zero fill: each program sums its own rows, a second kernel adds the programs' sums in
order. So it is bit-repeatable on one kind of GPU: the number of programs follows the device. The partial sums of many
norms can be reduced in one launch.

A row is a vector of the last dimension: with (T, N, D) inputs each head is normalised by itself (QK norm), read and
written where it lies in a wider buffer. Left out: rows wider than `MAX_HIDDEN`, float64, LayerNorm.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_HIDDEN = 8192
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


@triton.jit
def rmsnorm_backward_kernel(
    DY: tl.tensor,  # (rows / HEADS, HEADS, hidden), as X and DX; the last stride is 1
    X: tl.tensor,
    RSTD: tl.tensor,  # (rows,) float32
    WEIGHT: tl.tensor,  # (hidden,)
    D_RESIDUAL: tl.tensor,  # what X's gradient is added to, or None; HEADS is 1 then
    DX: tl.tensor,  # may be DY, X or D_RESIDUAL: a program reads a row before it writes it, and no other reads it
    PARTIAL: tl.tensor,  # (programs, hidden) float32: each program's part of the weight's gradient; None: not wanted
    rows: tl.tensor,
    hidden: tl.tensor,
    dy_stride: tl.tensor,
    dy_head: tl.tensor,
    x_stride: tl.tensor,
    x_head: tl.tensor,
    residual_stride: tl.tensor,
    dx_stride: tl.tensor,
    dx_head: tl.tensor,
    OFFSET: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    first = (program * rows // tl.num_programs(0)).to(tl.int32)
    last = ((program + 1) * rows // tl.num_programs(0)).to(tl.int32)
    cols = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(WEIGHT + cols, mask=cols < hidden, other=0.0).to(tl.float32) + OFFSET
    d_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)[:, None]
        token, head = (row // HEADS).to(tl.int64), row % HEADS
        mask = (row < last) & (cols < hidden)
        dy = tl.load(DY + token * dy_stride + head * dy_head + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(X + token * x_stride + head * x_head + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row, mask=row < last, other=0.0)
        normed = x * rstd
        scaled = dy * weight
        mean = tl.sum(scaled * normed, axis=1, keep_dims=True) / hidden
        dx = (scaled - normed * mean) * rstd
        if D_RESIDUAL is not None:
            dx += tl.load(D_RESIDUAL + token * residual_stride + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(DX + token * dx_stride + head * dx_head + cols, dx.to(DX.dtype.element_ty), mask=mask)
        if PARTIAL is not None:
            d_weight += dy * normed
    if PARTIAL is not None:
        sums = tl.sum(d_weight, axis=0, keep_dims=True)
        tl.store(PARTIAL + program * hidden + cols, sums, mask=cols < hidden)


@triton.jit
def reduce_partials_kernel(
    PARTIAL: tl.tensor,  # (norms, programs, hidden) float32, contiguous
    OUT: tl.tensor,  # (norms, hidden), contiguous
    programs: tl.tensor,
    hidden: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    norm = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        at = PARTIAL + (norm * programs + row) * hidden + cols
        total += tl.load(at, mask=(row < programs) & (cols < hidden), other=0.0)
    sums = tl.sum(total, axis=0, keep_dims=True)
    tl.store(OUT + norm * hidden + cols, sums.to(OUT.dtype.element_ty), mask=cols < hidden)


class Config(NamedTuple):
    """How one kernel is launched."""

    rows: int  # a tile holds; a program of the forward has one tile, one of the backward many
    warps: int
    programs: int = 0  # of a multiprocessor, in the backward
    stages: int = 1  # of the backward's loads: one less tile than this waits in shared memory


REDUCE = Config(rows=1024, warps=16)
REDUCE_BLOCK = 16  # columns: 64 bytes of a row, so that even 896 columns are 56 programs

# by the width of a tile: the least that holds a row
FORWARD = {
    64: Config(32, 4),
    128: Config(16, 4),
    256: Config(8, 4),
    1024: Config(4, 4),
    2048: Config(2, 4),
    4096: Config(1, 8),
    8192: Config(1, 8),
}
BACKWARD = {
    64: Config(32, 4, 4),
    128: Config(16, 4, 4),
    256: Config(8, 4, 4),
    1024: Config(2, 4, 3, 4),
    2048: Config(2, 8, 2, 3),
    4096: Config(1, 8, 2, 3),
    8192: Config(1, 16, 1, 4),
}


def block_for(hidden: int) -> int:
    """The width of a tile that holds a row of `hidden` elements.

    Raises:
        ValueError: the row is wider than `MAX_HIDDEN`.
    """
    if hidden > MAX_HIDDEN:
        raise ValueError(f"the fused RMS norm takes rows of up to {MAX_HIDDEN} elements, not {hidden}")
    return min(block for block in FORWARD if block >= hidden)


def stages_for(config: Config, bytes_a_row: int, shared: int) -> int:
    """The stages of a backward that loads `bytes_a_row` of a tile, padding included, where a program has `shared`."""
    spare = shared - 16 * 1024  # what reductions take
    return max(1, min(config.stages, 1 + spare // (config.rows * bytes_a_row)))


@functools.cache
def _device(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program may have."""
    if device.type != "cuda":  # the interpreter: enough for rows to be shared out
        return 2, 2**16
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return properties["multiprocessor_count"], properties["max_shared_mem"]


def _rows(x: Tensor) -> Tensor:
    """A view (tokens, heads, hidden) of (..., hidden) with a last stride of 1; a copy where there is none."""
    if x.dtype not in DTYPES:
        raise ValueError(f"the fused RMS norm takes float32, bfloat16 and float16, not {x.dtype}")
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return x.reshape(-1, 1, x.shape[-1]) if x.ndim < 3 else x.flatten(0, -3)


def _outlet(given: Tensor | None, like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The tensor to return and its view as rows: the caller's, which is never copied, or a new one."""
    out = torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format) if given is None else given
    rows = _rows(out)
    assert out.shape == like.shape and rows.data_ptr() == out.data_ptr(), "an output is shaped like its input"
    return out, rows


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
    rows = _rows(x)
    tokens, heads, hidden = rows.shape
    y, y_rows = _outlet(out, x, x.dtype if offset else torch.promote_types(x.dtype, weight.dtype))
    known = rstd is not None
    rstd = torch.empty(tokens * heads, dtype=torch.float32, device=x.device) if rstd is None else rstd
    total, deltas, sums = x, None, None
    if delta is not None:
        assert heads == 1 and delta.shape == x.shape
        deltas = _rows(delta)
        total, sums = _outlet(sum_out, x, x.dtype)
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


def rmsnorm_backward(
    d_normed: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    offset: float = 0.0,
    *,
    d_residual: Tensor | None = None,
    out: Tensor | None = None,
    weight_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the norm's input, and the weight's in parts.

    Args:
        d_normed: (..., H), the gradient of the norm's output.
        x: (..., H), what was normalised: after the add, if there was one. The result is then the gradient of both that
            were added.
        rstd: (number of rows,) float32, from the forward.
        weight: (H,).
        offset: as in the forward.
        d_residual: (T, H), the gradient that `x` has beside this one, added to the result; no heads then.
        out: shaped like `x`; may be `d_normed`, `d_residual` or `x`. None: a new one.
        weight_grad: whether the weight's gradient is wanted.

    Returns:
        (..., H), and (programs, H) float32 for `reduce_partials`, or None.
    """
    rows, d_rows = _rows(x), _rows(d_normed)
    tokens, heads, hidden = rows.shape
    assert d_rows.shape == rows.shape and (d_residual is None or heads == 1)
    dx, dx_rows = _outlet(out, x, x.dtype)
    residual = None if d_residual is None else _rows(d_residual)
    block = block_for(hidden)
    config = BACKWARD[block]
    multiprocessors, shared = _device(x.device)
    programs = max(1, min(config.programs * multiprocessors, triton.cdiv(tokens * heads, config.rows)))
    loaded = [tensor.element_size() for tensor in (d_rows, rows, residual) if tensor is not None]
    partial = torch.empty(programs, hidden, dtype=torch.float32, device=x.device) if weight_grad else None
    rmsnorm_backward_kernel[(programs,)](
        d_rows,
        rows,
        rstd,
        weight.contiguous(),
        residual,
        dx_rows,
        partial,
        tokens * heads,
        hidden,
        d_rows.stride(0),
        d_rows.stride(1),
        rows.stride(0),
        rows.stride(1),
        0 if residual is None else residual.stride(0),
        dx_rows.stride(0),
        dx_rows.stride(1),
        OFFSET=offset,
        HEADS=heads,
        ROWS=config.rows,
        BLOCK=block,
        STAGES=stages_for(config, block * sum(loaded), shared),
        num_warps=config.warps,
    )
    return dx, partial


def reduce_partials(partials: Tensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """Adds up what the programs of `rmsnorm_backward` left, of one norm or of many at once.

    Args:
        partials: (programs, H) or (norms, programs, H), float32, contiguous.
        dtype: of the result.
        out: (H,) or (norms, H), contiguous. None: a new one.

    Returns:
        (H,) or (norms, H): the sums over the programs, always in the same order.
    """
    programs, hidden = partials.shape[-2:]
    out = partials.new_empty(*partials.shape[:-2], hidden, dtype=dtype) if out is None else out
    assert partials.is_contiguous() and out.is_contiguous() and out.dtype == dtype
    grid = (triton.cdiv(hidden, REDUCE_BLOCK), out.numel() // hidden)
    reduce_partials_kernel[grid](
        partials,
        out,
        programs,
        hidden,
        ROWS=REDUCE.rows,
        BLOCK=REDUCE_BLOCK,
        num_warps=REDUCE.warps,
    )
    return out


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
