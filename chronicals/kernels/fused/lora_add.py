"""LoRA's `y += v R` behind a matmul that made y and v at once, as one Triton kernel: v scaled by s on the way.

One pass over y; the thin v and R come from the second cache. Left out: float32 (lora_thin.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from chronicals.kernels.fused.lora_thin import DTYPES, width_for


class Config(NamedTuple):
    """How a launch is cut."""

    rows: int  # tokens of a tile
    columns: int  # of y, of a tile
    warps: int


ADD = Config(64, 128, 4)


@triton.jit
def lora_add_kernel(
    Y: tl.tensor,  # (tokens, columns), last stride 1
    THIN: tl.tensor,  # (tokens, ranks), last stride 1
    RIGHT: tl.tensor,  # (ranks, columns)
    KEPT: tl.tensor,  # (tokens, ranks), last stride 1: gets what THIN is behind its scale
    SCALES: tl.tensor,  # (ranks,) float32, or None
    ROW_SCALES: tl.tensor,  # (tokens,) float32, of KEPT alone, or None
    alpha: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    y_stride: tl.tensor,
    thin_stride: tl.tensor,
    right_rank: tl.tensor,  # RIGHT's strides
    right_column: tl.tensor,
    kept_stride: tl.tensor,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    strips = tl.cdiv(columns, COLUMNS)
    tile, strip = tl.program_id(0) // strips, tl.program_id(0) % strips
    token = tile * ROWS + tl.arange(0, ROWS)[:, None]
    column = strip * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    Y += token.to(tl.int64) * y_stride + column
    mask = (token < tokens) & (column < columns)
    y = tl.load(Y, mask=mask, other=0.0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.static_range(0, RANKS, WIDTH):
        rank, inner = start + tl.arange(0, WIDTH)[None, :], start + tl.arange(0, WIDTH)[:, None]
        here = (token < tokens) & (rank < RANKS)
        thin = tl.load(THIN + token.to(tl.int64) * thin_stride + rank, mask=here, other=0.0).to(tl.float32) * alpha
        if SCALES is not None:
            thin *= tl.load(SCALES + rank, mask=rank < RANKS, other=0.0)
        if strip == 0:
            kept = thin
            if ROW_SCALES is not None:
                row = tile * ROWS + tl.arange(0, ROWS)  # not `token`, of which each thread would load its copies
                kept *= tl.load(ROW_SCALES + row, mask=row < tokens, other=0.0)[:, None]
            tl.store(KEPT + token.to(tl.int64) * kept_stride + rank, kept.to(Y.dtype.element_ty), mask=here)
        thin = thin.to(Y.dtype.element_ty)
        at = RIGHT + inner.to(tl.int64) * right_rank + column.to(tl.int64) * right_column
        total = tl.dot(thin, tl.load(at, mask=(inner < RANKS) & (column < columns), other=0.0), total)
    tl.store(Y, (y.to(tl.float32) + total).to(Y.dtype.element_ty), mask=mask)


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
    """As `chronicals.kernels.lora_thin.lora_add_`, in one launch."""
    assert y.dtype in DTYPES, f"no kernel for {y.dtype}"
    return launch_add(ADD, y, thin, right, alpha, scales, kept, rows)


def launch_add(
    config: Config,
    y: Tensor,
    thin: Tensor,
    right: Tensor,
    alpha: float,
    scales: Tensor | None,
    kept: Tensor,
    rows: Tensor | None = None,
) -> Tensor:
    """`lora_add_`, cut as `config` says."""
    (tokens, columns), ranks = y.shape, len(right)
    assert thin.shape == kept.shape == (tokens, ranks) and right.shape[1] == columns
    assert y.dtype == thin.dtype == right.dtype == kept.dtype
    assert y.stride(1) == thin.stride(1) == kept.stride(1) == 1
    assert kept.data_ptr() != thin.data_ptr() or not tokens, "programs read thin while one writes kept"
    assert all(one is None or one.dtype == torch.float32 for one in (scales, rows))
    programs = triton.cdiv(tokens, config.rows) * triton.cdiv(columns, config.columns)
    if programs:
        lora_add_kernel[(programs,)](
            y, thin, right, kept, scales, rows, alpha, tokens, columns,
            y.stride(0), thin.stride(0), right.stride(0), right.stride(1), kept.stride(0),
            RANKS=ranks, WIDTH=width_for(ranks), ROWS=config.rows, COLUMNS=config.columns, num_warps=config.warps,
        )  # fmt: skip
    return y
