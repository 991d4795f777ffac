"""Sums over the rows of a matrix, in float32 and in one order: the gradient of a bias, and of a norm's weight.

A bias adds to every row, so its gradient is the column sum of the upstream gradient. It comes in two steps, as the
gradient of a norm's weight does: programs each sum rows of their own (`column_partials`, all that reads the matrix),
and `reduce_partials` adds the programs' sums. There are no atomics, nothing is filled with zeros, and the bits are the
same every time on one kind of GPU. The second step is a launch of a few microseconds, so a training step keeps the
partial sums of all its layers in one buffer and adds them up in one launch; `column_sums` is both steps at once.

Bytes: the matrix read once; the partial sums are about a hundredth of it.

Left out: rows weighed or masked, and float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chronicals.kernels.fused.launch import balanced, device_limits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, COLUMNS, THREADS = 8, 256, 32  # of a tile; a thread has the same places of each tile, and sums in registers
KEPT = 1 if COLUMNS >= 8 * THREADS else ROWS  # rows of sums: a row that takes all threads, 8 columns each, needs one
PROGRAMS, STAGES = 8, 4  # programs of a multiprocessor; of their loads: one tile less than this waits in shared memory
REDUCE_ROWS, REDUCE_COLUMNS, REDUCE_THREADS = 1024, 16, 512  # 64 bytes of a row, so that 896 columns are 56 programs
# of up to so many parts, as an adapter's gradient comes in: tiles as high as they are many, or most of one is empty
FEW, FEW_COLUMNS, FEW_THREADS = 64, 128, 128


@triton.jit
def column_partials_kernel(
    X: tl.tensor,  # (rows, columns), last stride 1
    PARTIAL: tl.tensor,  # (parts, columns) float32
    rows: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEPT: tl.constexpr,  # rows of sums: ROWS, or 1 where a thread has its columns of each row of a tile
    STAGES: tl.constexpr,
) -> None:
    strips = tl.cdiv(columns, COLUMNS)
    part, parts = tl.program_id(0) // strips, tl.num_programs(0) // strips
    column = (tl.program_id(0) % strips) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((KEPT, COLUMNS), tl.float32)
    for start in tl.range(part * ROWS, rows, parts * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & (column < columns)
        x = tl.load(X + row.to(tl.int64) * stride + column, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(x, axis=0, keep_dims=True) if KEPT == 1 else x
    sums = tl.sum(total, axis=0, keep_dims=True)
    tl.store(PARTIAL + part.to(tl.int64) * columns + column, sums, mask=column < columns)


@triton.jit
def reduce_partials_kernel(
    PARTIAL: tl.tensor,  # (sums, parts, columns) float32, contiguous
    OUT: tl.tensor,  # (sums, columns), last stride 1
    parts: tl.tensor,
    columns: tl.tensor,
    out_stride: tl.tensor,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    which = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, parts, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        at = PARTIAL + (which * parts + row) * columns + column
        total += tl.load(at, mask=(row < parts) & (column < columns), other=0.0)
    sums = tl.sum(total, axis=0, keep_dims=True)
    out = OUT + which * out_stride + column
    if ADD:
        sums += tl.load(out, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(out, sums.to(OUT.dtype.element_ty), mask=column < columns)


def column_parts(rows: int, columns: int, device: torch.device) -> int:
    """How many partial sums `column_partials` leaves of a (rows, columns) matrix on `device`."""
    most = max(1, PROGRAMS * device_limits(device)[0] // triton.cdiv(columns, COLUMNS))
    return balanced(triton.cdiv(rows, ROWS), most)


def column_partials(x: Tensor, *, partial: Tensor | None = None) -> Tensor:
    """The column sums of `x` in parts, for `reduce_partials`.

    Args:
        x: (T, N) float32, bfloat16 or float16, elements of a row side by side; any row stride.
        partial: (parts, N) float32, contiguous, parts as `column_parts` says: written, all of it. None: a new one.

    Returns:
        (parts, N) float32.
    """
    rows, columns = x.shape
    parts = column_parts(rows, columns, x.device)
    partial = torch.empty(parts, columns, dtype=torch.float32, device=x.device) if partial is None else partial
    assert partial.shape == (parts, columns), f"{tuple(partial.shape)} is not ({parts}, {columns})"
    assert partial.dtype == torch.float32
    assert partial.is_contiguous()
    assert x.dtype in DTYPES, f"no kernel for {x.dtype}"
    assert x.stride(1) == 1 or columns == 1
    strips = triton.cdiv(columns, COLUMNS)
    assert rows + parts * ROWS < 2**31
    column_partials_kernel[(parts * strips,)](
        x,
        partial,
        rows,
        columns,
        x.stride(0),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        KEPT=KEPT,
        STAGES=STAGES,
        num_warps=_warps(THREADS),
    )
    return partial


def reduce_partials(partials: Tensor, dtype: torch.dtype, *, out: Tensor | None = None, add: bool = False) -> Tensor:
    """Adds up what the programs of `column_partials` or `rmsnorm_backward` left, of one sum or of many at once.

    Args:
        partials: (parts, N) or (sums, parts, N), float32, contiguous.
        dtype: of the result.
        out: (N,) or (sums, N), elements of a row side by side. None: a new one.
        add: to what is in `out`, in float32, rounded once.

    Returns:
        (N,) or (sums, N): the sums over the parts, always in the same order.
    """
    parts, columns = partials.shape[-2:]
    shape = (*partials.shape[:-2], columns)
    assert out is not None or not add, "there is nothing to add to"
    out = partials.new_empty(shape, dtype=dtype) if out is None else out
    assert out.shape == shape
    assert out.dtype == dtype
    assert partials.dtype == torch.float32
    assert partials.is_contiguous()
    assert out.stride(-1) == 1 or columns == 1
    few = parts <= FEW
    rows, width = (triton.next_power_of_2(max(1, parts)), FEW_COLUMNS) if few else (REDUCE_ROWS, REDUCE_COLUMNS)
    grid = (triton.cdiv(columns, width), partials[..., 0, 0].numel())
    if 0 not in grid:
        reduce_partials_kernel[grid](
            partials,
            out,
            parts,
            columns,
            out.stride(0),
            ADD=add,
            ROWS=rows,
            COLUMNS=width,
            num_warps=_warps(FEW_THREADS if few else REDUCE_THREADS),
        )
    return out


def column_sums(x: Tensor, dtype: torch.dtype, *, out: Tensor | None = None, add: bool = False) -> Tensor:
    """The sums of the columns of `x`: the gradient of a bias.

    Args:
        x: (T, N) float32, bfloat16 or float16, elements of a row side by side; any row stride.
        dtype: of the result.
        out: (N,). None: a new one.
        add: to what is in `out`.

    Returns:
        (N,).
    """
    return reduce_partials(column_partials(x), dtype, out=out, add=add)


def _warps(threads: int) -> int:
    return threads // (64 if torch.version.hip else 32)
