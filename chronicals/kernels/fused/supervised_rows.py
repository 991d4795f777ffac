"""The rows around linear cross-entropy: gathered before the matmuls, scattered after them, scaled only if they must be.

`target_rows` names the R rows of (T, H) that predict something; padding entries have the target -100. Gathering reads
only rows with a target and fills the others with zero, so that NaN in a row that nobody supervises goes nowhere.
Each moves R rows once, in and out: a thousandth of what the matmuls cost.

Left out: rows with several targets (scattering writes, it does not add, so no atomics).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns a program handles
IGNORE = tl.constexpr(-100)


@triton.jit
def gather_rows_kernel(
    HIDDEN: tl.tensor,  # (T, H), last stride 1
    ROWS: tl.tensor,  # (R,) int32 or int64
    TARGETS: tl.tensor,  # (R,) int64
    OUT: tl.tensor,  # (R, H) contiguous; zero where there is no target
    tokens: tl.tensor,
    hidden: tl.tensor,
    hidden_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    slot = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ROWS + slot).to(tl.int64)
    read = (tl.load(TARGETS + slot) != IGNORE) & (row >= 0) & (row < tokens)
    x = tl.load(HIDDEN + row * hidden_stride + cols, mask=cols < tl.where(read, hidden, 0), other=0.0)
    tl.store(OUT + slot * hidden + cols, x, mask=cols < hidden)


@triton.jit
def scatter_rows_kernel(
    D_ROWS: tl.tensor,  # (R, H) contiguous
    ROWS: tl.tensor,  # (R,) int32 or int64, each at most once where there is a target
    TARGETS: tl.tensor,  # (R,) int64
    D_HIDDEN: tl.tensor,  # (T, H), last stride 1; only supervised rows are written
    tokens: tl.tensor,
    hidden: tl.tensor,
    d_hidden_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    slot = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ROWS + slot).to(tl.int64)
    written = (tl.load(TARGETS + slot) != IGNORE) & (row >= 0) & (row < tokens)
    mask = cols < tl.where(written, hidden, 0)
    d = tl.load(D_ROWS + slot * hidden + cols, mask=mask, other=0.0)
    tl.store(D_HIDDEN + row * d_hidden_stride + cols, d.to(D_HIDDEN.dtype.element_ty), mask=mask)


@triton.jit
def scale_kernel(
    X: tl.tensor,  # (size,), multiplied in place
    FACTOR: tl.tensor,  # () float32
    size: tl.tensor,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    factor = tl.load(FACTOR)
    if factor != 1.0:  # nothing is read or written in the usual case
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, PROGRAMS * BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(X + at, mask=at < size, other=0.0).to(tl.float32)
            tl.store(X + at, (x * factor).to(X.dtype.element_ty), mask=at < size)


def gather_rows(hidden: Tensor, target_rows: Tensor, targets: Tensor, out: Tensor) -> None:
    """`out[i] = hidden[target_rows[i]]`, zero where `targets[i]` is -100; hidden (T, H), out (R, H) contiguous."""
    rows, features = out.shape
    gather_rows_kernel[(rows, triton.cdiv(features, BLOCK))](
        hidden, target_rows, targets, out, len(hidden), features, hidden.stride(0), BLOCK=BLOCK
    )


def scatter_rows(d_rows: Tensor, target_rows: Tensor, targets: Tensor, d_hidden: Tensor) -> None:
    """`d_hidden[target_rows[i]] = d_rows[i]` where `targets[i]` is not -100; other rows are left as they are."""
    rows, features = d_rows.shape
    scatter_rows_kernel[(rows, triton.cdiv(features, BLOCK))](
        d_rows, target_rows, targets, d_hidden, len(d_hidden), features, d_hidden.stride(0), BLOCK=BLOCK
    )


def scale_(x: Tensor, factor: Tensor, programs: int = 1024) -> None:
    """Multiplies contiguous `x` by `factor` () float32 in place; a launch that does nothing where it is 1."""
    assert x.is_contiguous()
    if x.numel():
        scale_kernel[(programs,)](x, factor, x.numel(), PROGRAMS=programs, BLOCK=BLOCK)
