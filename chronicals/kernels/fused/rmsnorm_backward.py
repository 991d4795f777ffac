"""The backward pass of RMSNorm: dx, and the weight's gradient in parts; rmsnorm.py has the math.

The weight's gradient is summed without atomics or zero fill: each program sums its own rows, and `reduce_partials`
adds the programs' sums in order. So it is bit-repeatable on one kind of GPU: the number of programs follows the
device. A training step gives the parts of all its norms places in one buffer (`partial=`, `partial_programs`) and adds
them up in one launch.

A program takes every so many-th tile, so that all of them together sweep through memory as a copy does, and as many
programs are launched as leave the last round nearly full. Tiles to come are loaded while one is worked on.

Queries and keys of one buffer have a weight each and share a launch: a program has either, as many programs of each as
it has rows, so that both sweep through the same memory and end together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from chronicals.kernels.fused.launch import balanced, device_limits
from chronicals.kernels.fused.rows import as_rows, block_for, outlet

Pair = tuple[Tensor, Tensor]  # queries', keys'
MaybePair = tuple[Tensor | None, Tensor | None]


@triton.jit
def _sweep(
    DY: tl.tensor,  # (rows / HEADS, HEADS, hidden), as X and DX; the last stride is 1
    X: tl.tensor,
    RSTD: tl.tensor,  # (rows,) float32
    WEIGHT: tl.tensor,  # (hidden,)
    D_RESIDUAL: tl.tensor,  # what X's gradient is added to, or None; HEADS is 1 then
    DX: tl.tensor,  # may be DY, X or D_RESIDUAL: a program reads a row before it writes it, and no other reads it
    PARTIAL: tl.tensor,  # (programs, hidden) float32: each program's part of the weight's gradient; None: not wanted
    program: tl.tensor,
    programs: tl.tensor,
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
    KEPT: tl.constexpr,  # rows of sums: ROWS, or 1 where a thread has its columns of each row of a tile
    STAGES: tl.constexpr,
) -> None:
    cols = tl.arange(0, BLOCK)[None, :]
    if KEPT == 1:
        weight = tl.load(WEIGHT + cols, mask=cols < hidden, other=0.0).to(tl.float32) + OFFSET
    else:
        # As a row of a tile, so that it lies in threads as tiles do. By itself it would be spread over all threads, and
        # what comes from shared memory would follow it: a row over all warps, and a barrier in each sum.
        row = tl.arange(0, ROWS)[:, None]
        weight = tl.load(WEIGHT + row * 0 + cols, mask=(row == 0) & (cols < hidden), other=0.0).to(tl.float32)
        weight = tl.sum(weight, axis=0, keep_dims=True) + OFFSET
    d_weight, share = tl.zeros((KEPT, BLOCK), tl.float32), 1.0 / hidden
    for start in tl.range(program * ROWS, rows, programs * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)[:, None]
        token, head = (row // HEADS).to(tl.int64), row % HEADS
        mask = (row < rows) & (cols < hidden)
        dy = tl.load(DY + token * dy_stride + head * dy_head + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(X + token * x_stride + head * x_head + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row, mask=row < rows, other=0.0)
        normed = x * rstd
        scaled = dy * weight
        mean = tl.sum(scaled * normed, axis=1, keep_dims=True) * share
        dx = (scaled - normed * mean) * rstd
        if D_RESIDUAL is not None:
            dx += tl.load(D_RESIDUAL + token * residual_stride + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(DX + token * dx_stride + head * dx_head + cols, dx.to(DX.dtype.element_ty), mask=mask)
        if PARTIAL is not None:
            part = dy * normed
            d_weight += tl.sum(part, axis=0, keep_dims=True) if KEPT == 1 else part
    if PARTIAL is not None:
        sums = tl.sum(d_weight, axis=0, keep_dims=True)
        tl.store(PARTIAL + program.to(tl.int64) * hidden + cols, sums, mask=cols < hidden)


@triton.jit
def rmsnorm_backward_kernel(
    DY: tl.tensor,  # as in `_sweep`
    X: tl.tensor,
    RSTD: tl.tensor,
    WEIGHT: tl.tensor,
    D_RESIDUAL: tl.tensor,
    DX: tl.tensor,
    PARTIAL: tl.tensor,
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
    KEPT: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    _sweep(
        DY, X, RSTD, WEIGHT, D_RESIDUAL, DX, PARTIAL, tl.program_id(0), tl.num_programs(0), rows, hidden, dy_stride,
        dy_head, x_stride, x_head, residual_stride, dx_stride, dx_head, OFFSET, HEADS, ROWS, BLOCK, KEPT, STAGES,
    )  # fmt: skip


@triton.jit
def qk_rmsnorm_backward_kernel(
    DY: tl.tensor,  # (tokens, QUERIES + KEYS, hidden), as X and DX; the last stride is 1
    X: tl.tensor,
    Q_RSTD: tl.tensor,  # (tokens * QUERIES,) float32
    K_RSTD: tl.tensor,  # (tokens * KEYS,) float32
    Q_WEIGHT: tl.tensor,  # (hidden,)
    K_WEIGHT: tl.tensor,
    DX: tl.tensor,  # may be DY or X
    Q_PARTIAL: tl.tensor,  # (q_programs, hidden) float32, or None
    K_PARTIAL: tl.tensor,  # (the other programs, hidden) float32, or None
    tokens: tl.tensor,
    q_programs: tl.tensor,
    hidden: tl.tensor,
    dy_stride: tl.tensor,
    dy_head: tl.tensor,
    x_stride: tl.tensor,
    x_head: tl.tensor,
    dx_stride: tl.tensor,
    dx_head: tl.tensor,
    OFFSET: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    if program < q_programs:
        _sweep(
            DY, X, Q_RSTD, Q_WEIGHT, None, DX, Q_PARTIAL, program, q_programs, tokens * QUERIES, hidden,
            dy_stride, dy_head, x_stride, x_head, 0, dx_stride, dx_head, OFFSET, QUERIES, ROWS, BLOCK, KEPT, STAGES,
        )  # fmt: skip
    else:
        _sweep(
            DY + QUERIES * dy_head, X + QUERIES * x_head, K_RSTD, K_WEIGHT, None, DX + QUERIES * dx_head, K_PARTIAL,
            program - q_programs, tl.num_programs(0) - q_programs, tokens * KEYS, hidden,
            dy_stride, dy_head, x_stride, x_head, 0, dx_stride, dx_head, OFFSET, KEYS, ROWS, BLOCK, KEPT, STAGES,
        )  # fmt: skip


class Config(NamedTuple):
    """How the backward is launched."""

    rows: int  # a tile holds
    warps: int
    programs: int  # of a multiprocessor
    stages: int = 1  # of the loads: one less tile than this waits in shared memory


# by the width of a tile
BACKWARD = {
    64: Config(32, 4, 4),
    128: Config(16, 4, 5, 2),
    256: Config(8, 4, 4),
    1024: Config(2, 4, 3, 4),
    2048: Config(2, 8, 2, 3),
    4096: Config(2, 16, 1, 3),
    8192: Config(1, 16, 1, 4),
}


def kept_rows(config: Config, block: int) -> int:
    """1 where one row of a tile takes all threads, 16 bytes of 16-bit elements each; else the rows of a tile."""
    return 1 if block >= 8 * 32 * config.warps else config.rows


def stages_for(config: Config, bytes_a_row: int, shared: int) -> int:
    """The stages of a backward that loads `bytes_a_row` of a tile, padding included, where a program has `shared`."""
    spare = shared - 16 * 1024  # what reductions take
    return max(1, min(config.stages, 1 + spare // (config.rows * bytes_a_row)))


def _parts(given: Tensor | None, wanted: bool, programs: int, x: Tensor) -> Tensor | None:
    """Where the weight's gradient goes in parts: what was given, or a new tensor; None where it is not wanted."""
    if given is None:
        return torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device) if wanted else None
    assert wanted
    assert given.shape == (programs, x.shape[-1]), f"{tuple(given.shape)} is not ({programs}, {x.shape[-1]})"
    assert given.dtype == torch.float32
    assert given.is_contiguous()
    return given


def partial_programs(rows: int, hidden: int, device: torch.device) -> int:
    """How many parts `rmsnorm_backward` leaves of the gradient of a weight (hidden,) that `rows` rows had."""
    config = BACKWARD[block_for(hidden)]
    return balanced(triton.cdiv(rows, config.rows), config.programs * device_limits(device)[0])


def qk_partial_programs(tokens: int, queries: int, keys: int, hidden: int, device: torch.device) -> tuple[int, int]:
    """How many parts `qk_rmsnorm_backward` leaves of the gradients of the two weights (hidden,)."""
    config = BACKWARD[block_for(hidden)]
    tiles = [triton.cdiv(tokens * heads, config.rows) for heads in (queries, keys)]
    most = config.programs * device_limits(device)[0] - 1  # one more where both round up
    rounds = max(1, triton.cdiv(sum(tiles), most))
    return max(1, triton.cdiv(tiles[0], rounds)), max(1, triton.cdiv(tiles[1], rounds))


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
    partial: Tensor | None = None,
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
        partial: (programs, H) float32, contiguous, programs as `partial_programs` says: written, all of it. None: a new
            one.

    Returns:
        (..., H), and (programs, H) float32 for `reduce_partials`, or None.
    """
    rows, d_rows = as_rows(x), as_rows(d_normed)
    tokens, heads, hidden = rows.shape
    assert d_rows.shape == rows.shape and (d_residual is None or heads == 1)
    dx, dx_rows = outlet(out, x, x.dtype)
    residual = None if d_residual is None else as_rows(d_residual)
    block = block_for(hidden)
    config = BACKWARD[block]
    programs = partial_programs(tokens * heads, hidden, x.device)
    assert tokens * heads + programs * config.rows < 2**31
    loaded = [tensor.element_size() for tensor in (d_rows, rows, residual) if tensor is not None]
    partial = _parts(partial, weight_grad, programs, x)
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
        KEPT=kept_rows(config, block),
        STAGES=stages_for(config, block * sum(loaded), device_limits(x.device)[1]),
        num_warps=config.warps,
    )
    return dx, partial


def qk_rmsnorm_backward(
    d_normed: Tensor,
    x: Tensor,
    rstds: Pair,
    weights: Pair,
    queries: int,
    offset: float = 0.0,
    *,
    out: Tensor | None = None,
    weight_grads: tuple[bool, bool] = (True, True),
    partials: MaybePair = (None, None),
) -> tuple[Tensor, MaybePair]:
    """`rmsnorm_backward` of queries and of keys, in one launch.

    Args:
        d_normed: (T, Nq + Nk, D), the gradient of the norms' output.
        x: (T, Nq + Nk, D), what was normalised.
        rstds: (T Nq,) and (T Nk,) float32, from the forward.
        weights: (D,) each.
        queries: Nq.
        offset: as in the forward.
        out: shaped like `x`; may be `d_normed` or `x`. None: a new one.
        weight_grads: whether each weight's gradient is wanted.
        partials: (programs, D) float32 each, contiguous, programs as `qk_partial_programs` says: written, all of it.
            None: a new one.

    Returns:
        (T, Nq + Nk, D), and (programs, D) float32 each for `reduce_partials`, or None.
    """
    rows, d_rows = as_rows(x), as_rows(d_normed)
    tokens, heads, hidden = rows.shape
    assert d_rows.shape == rows.shape == x.shape
    dx, dx_rows = outlet(out, x, x.dtype)
    block = block_for(hidden)
    config = BACKWARD[block]
    programs = qk_partial_programs(tokens, queries, heads - queries, hidden, x.device)
    assert tokens * heads + sum(programs) * config.rows < 2**31
    q_partial, k_partial = (
        _parts(given, wanted, count, x) for given, wanted, count in zip(partials, weight_grads, programs, strict=True)
    )
    qk_rmsnorm_backward_kernel[(sum(programs),)](
        d_rows,
        rows,
        *rstds,
        *(weight.contiguous() for weight in weights),
        dx_rows,
        q_partial,
        k_partial,
        tokens,
        programs[0],
        hidden,
        d_rows.stride(0),
        d_rows.stride(1),
        rows.stride(0),
        rows.stride(1),
        dx_rows.stride(0),
        dx_rows.stride(1),
        OFFSET=offset,
        QUERIES=queries,
        KEYS=heads - queries,
        ROWS=config.rows,
        BLOCK=block,
        KEPT=kept_rows(config, block),
        STAGES=stages_for(config, block * (d_rows.element_size() + rows.element_size()), device_limits(x.device)[1]),
        num_warps=config.warps,
    )
    return dx, (q_partial, k_partial)
