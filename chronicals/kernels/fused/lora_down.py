"""LoRA's t = s x A' and u = s dy B as one Triton kernel, a launch each (lora_thin.py says how sums are split).

- `lora_down` reads x once for the ranks of all adapters, and leaves t in up to two places.
- `lora_up_backward` multiplies each adapter's columns of dy by that adapter's B alone, not by the zeros beside it.

Left out: float32 (lora_thin.py), and dropout (lora_dropout.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from chronicals.kernels.fused.launch import device_limits
from chronicals.kernels.fused.lora_thin import (
    DTYPES,
    LONG,
    Config,
    divisor,
    flat,
    joined,
    of_part,
    stages,
    width_for,
    workspace,
)
from chronicals.kernels.lora_thin import Block

DOWN, DOWN_LONG = Config(64, 128, 4, 3, 1), Config(64, 64, 4, 7, 1)
UP = Config(64, 64, 4, 7, 1)


@triton.jit
def _store_thin(
    total: tl.tensor, OUT: tl.tensor, out_stride: tl.tensor, token: tl.tensor, tokens: tl.tensor, rank: tl.tensor,
    ranks: tl.tensor,
) -> None:  # fmt: skip
    place = OUT + token.to(tl.int64) * out_stride + rank
    tl.store(place, total.to(OUT.dtype.element_ty), mask=(token < tokens) & (rank < ranks))


@triton.jit
def _store_down(
    total: tl.tensor, OUT: tl.tensor, COPY: tl.tensor, SCALES: tl.tensor, ROW_SCALES: tl.tensor, alpha: tl.tensor,
    out_stride: tl.tensor, copy_stride: tl.tensor, token: tl.tensor, tokens: tl.tensor, rank: tl.tensor,
    ranks: tl.tensor,
) -> None:  # fmt: skip
    """`rank`: (1, WIDTH), and `ranks`, behind the last that is stored."""
    total *= alpha
    if SCALES is not None:
        total *= tl.load(SCALES + rank, mask=rank < ranks, other=0.0)
    _store_thin(total, OUT, out_stride, token, tokens, rank, ranks)
    if COPY is not None:
        if ROW_SCALES is not None:
            total *= tl.load(ROW_SCALES + token, mask=token < tokens, other=0.0)
        _store_thin(total, COPY, copy_stride, token, tokens, rank, ranks)


@triton.jit
def lora_down_kernel(
    X: tl.tensor,  # (tokens, ...), last stride 1
    RIGHT: tl.tensor,  # B: (..., ranks), or A (ranks, ...), where ACROSS; last stride 1
    OUT: tl.tensor,  # (tokens, ranks), last stride 1
    COPY: tl.tensor,  # (tokens, ranks), last stride 1, or None
    SCALES: tl.tensor,  # (ranks,) float32, or None
    ROW_SCALES: tl.tensor,  # (tokens,) float32, of COPY alone, or None
    PARTIAL: tl.tensor,  # (programs, ROWS, WIDTH) float32, where SPLIT
    COUNTER: tl.tensor,  # (programs,) int32, zeros, where SPLIT
    alpha: tl.tensor,
    tokens: tl.tensor,
    x_stride: tl.tensor,
    right_stride: tl.tensor,
    out_stride: tl.tensor,
    copy_stride: tl.tensor,
    chunk: tl.tensor,  # columns of a program: a multiple of COLUMNS
    first0: tl.tensor,  # of each part: its columns of X, and its ranks
    columns0: tl.tensor,
    start0: tl.tensor,
    rank0: tl.tensor,
    first1: tl.tensor,
    columns1: tl.tensor,
    start1: tl.tensor,
    rank1: tl.tensor,
    first2: tl.tensor,
    columns2: tl.tensor,
    start2: tl.tensor,
    rank2: tl.tensor,
    ACROSS: tl.constexpr,
    SPLIT: tl.constexpr,
    COLUMN_ALIGN: tl.constexpr,  # divides where parts begin and how wide they are
    RANK_ALIGN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    units0 = tl.cdiv(columns0, chunk) * tl.cdiv(rank0, WIDTH)
    units1 = tl.cdiv(columns1, chunk) * tl.cdiv(rank1, WIDTH)
    units = units0 + units1 + tl.cdiv(columns2, chunk) * tl.cdiv(rank2, WIDTH)
    tile, unit = tl.program_id(0) // units, tl.program_id(0) % units
    part = (unit >= units0).to(tl.int32) + (unit >= units0 + units1).to(tl.int32)
    unit -= tl.where(part > 0, units0, 0) + tl.where(part > 1, units1, 0)
    first = of_part(part, first0, first1, first2, COLUMN_ALIGN)
    columns = of_part(part, columns0, columns1, columns2, COLUMN_ALIGN)
    start = of_part(part, start0, start1, start2, RANK_ALIGN)
    ranks = tl.multiple_of(start + of_part(part, rank0, rank1, rank2, RANK_ALIGN), RANK_ALIGN)
    splits = tl.cdiv(columns, chunk)
    split = unit % splits
    rank = start + unit // splits * WIDTH + tl.arange(0, WIDTH)[None, :]

    row = tl.arange(0, ROWS)[:, None]
    token = tile * ROWS + row
    X += (tile * ROWS).to(tl.int64) * x_stride + first
    RIGHT += first.to(tl.int64) * (1 if ACROSS else right_stride)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    begin = split * chunk
    end = tl.minimum(begin + chunk, columns)
    for at in tl.range(begin, end, COLUMNS, num_stages=STAGES):
        column = at + tl.arange(0, COLUMNS)[None, :]
        x = tl.load(X + row * x_stride + column, mask=(token < tokens) & (column < columns), other=0.0)
        if ACROSS:
            down = tl.trans(rank)
            right = tl.load(RIGHT + down * right_stride + column, mask=(down < ranks) & (column < columns), other=0.0)
            right = tl.trans(right)
        else:
            inner = at + tl.arange(0, COLUMNS)[:, None]
            right = tl.load(RIGHT + inner * right_stride + rank, mask=(inner < columns) & (rank < ranks), other=0.0)
        total = tl.dot(x, right, total)

    mine = True
    if SPLIT:
        program = tl.program_id(0) - split  # the first of those that share this output
        PARTIAL += program.to(tl.int64) * ROWS * WIDTH + row * WIDTH + tl.arange(0, WIDTH)[None, :]
        mine, total = joined(total, PARTIAL, split, splits, ROWS * WIDTH, COUNTER + program)
    if mine:
        _store_down(total, OUT, COPY, SCALES, ROW_SCALES, alpha, out_stride, copy_stride, token, tokens, rank, ranks)


def lora_down(
    x: Tensor, a: Tensor, *, alpha: float, scales: Tensor | None = None, out: Tensor, copy: Tensor | None = None
) -> None:
    """As `chronicals.kernels.lora_thin.lora_down`, in one launch."""
    assert x.dtype in DTYPES, f"no kernel for {x.dtype}"
    config = DOWN_LONG if len(x) >= LONG else DOWN
    launch_down(config, x, a, [Block(0, x.shape[1], 0, a.shape[0])], alpha, scales, out, copy, across=True)


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
    """As `chronicals.kernels.lora_thin.lora_up_backward`, in one launch."""
    assert d_out.dtype in DTYPES, f"no kernel for {d_out.dtype}"
    *others, last = blocks
    blocks = [*others, last._replace(rank=out.shape[1] - last.start)]  # zeros beyond it are its own
    launch_down(UP, d_out, b, blocks, alpha, scales, out, copy, across=False, rows=rows)


def launch_down(
    config: Config,
    x: Tensor,
    right: Tensor,
    blocks: Sequence[Block],
    alpha: float,
    scales: Tensor | None,
    out: Tensor,
    copy: Tensor | None,
    *,
    across: bool,
    rows: Tensor | None = None,
) -> None:
    """`lora_down`, where `across`, or `lora_up_backward`, cut as `config` says."""
    tokens = len(x)
    inner, ranks = right.shape[::-1] if across else right.shape
    assert x.shape[1] == inner and out.shape == (tokens, ranks)
    assert copy is None or copy.shape == out.shape
    assert x.dtype == right.dtype == out.dtype
    assert all(matrix.stride(1) == 1 for matrix in (x, right, out) + (() if copy is None else (copy,)))
    assert all(one is None or one.dtype == torch.float32 for one in (scales, rows))
    width = width_for(max(block.rank for block in blocks))
    tiles = triton.cdiv(tokens, config.rows)
    work = sum(block.columns * triton.cdiv(block.rank, width) for block in blocks)
    wanted = max(1, config.programs * device_limits(x.device)[0] // max(1, tiles))
    chunk = triton.cdiv(triton.cdiv(work, wanted), config.columns) * config.columns
    outputs = [triton.cdiv(block.rank, width) for block in blocks]
    units = [n * triton.cdiv(block.columns, chunk) for n, block in zip(outputs, blocks, strict=True)]
    programs, split = tiles * sum(units), units != outputs
    if programs == 0:
        return
    lora_down_kernel[(programs,)](
        x, right, out, copy, scales, rows, *workspace(x, programs, programs * config.rows * width, split), alpha,
        tokens, x.stride(0), right.stride(0), out.stride(0), 0 if copy is None else copy.stride(0), chunk,
        *flat(blocks), ACROSS=across, SPLIT=split,
        COLUMN_ALIGN=divisor(n for block in blocks for n in (block.first, block.columns)),
        RANK_ALIGN=divisor(n for block in blocks for n in (block.start, block.rank)),
        WIDTH=width, ROWS=config.rows, COLUMNS=config.columns,
        STAGES=stages(config, (config.rows + width) * config.columns * x.element_size(), x.device),
        num_warps=config.warps,
    )  # fmt: skip
