"""LoRA's gradients as a Triton kernel: dA and dB of all adapters of a projection in one launch.

Its programs are of two kinds: tiles of dy for dB, and tiles of x for dA. lora_thin.py says how their sums over tokens
are split. Where dropout's pass has left dA in parts (lora_dropout.py), programs of a third kind add these up: beside
dB's, which wait for memory, that costs no launch and little time.

Left out: float32 (lora_thin.py).
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
    MOST_PARTS,
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

GRADS, GRADS_LONG = Config(128, 64, 4, 3, 1), Config(64, 64, 4, 5, 1)
SUM_RANKS, SUM_COLUMNS, SUM_PARTS = 4, 128, 32  # of dA, a program that adds up parts; parts read at a time


@triton.jit
def _product(
    M: tl.tensor, m_stride: tl.tensor, column: tl.tensor, columns: tl.tensor, V: tl.tensor, v_stride: tl.tensor,
    rank: tl.tensor, ranks: tl.tensor, begin: tl.tensor, end: tl.tensor, PARTIAL: tl.tensor, split: tl.tensor,
    splits: tl.tensor, distance: tl.tensor, COUNTER: tl.tensor, SPLIT: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """`M' V` of some columns of M (1, COLUMNS) and some of V (1, WIDTH), over the tokens from `begin` to `end`; joined
    with those of the other splits, and whether it is this program's to store."""
    total = tl.zeros((column.shape[1], rank.shape[1]), tl.float32)
    row = tl.arange(0, ROWS)[:, None]
    M += begin.to(tl.int64) * m_stride
    V += begin.to(tl.int64) * v_stride
    for at in tl.range(begin, end, ROWS, num_stages=STAGES):
        here = at + row < end
        m = tl.load(M + (row * m_stride + column), mask=here & (column < columns), other=0.0)
        v = tl.load(V + (row * v_stride + rank), mask=here & (rank < ranks), other=0.0)
        M += ROWS * m_stride
        V += ROWS * v_stride
        total = tl.dot(tl.trans(m), v, total)
    mine = True
    if SPLIT:
        place = tl.arange(0, column.shape[1])[:, None] * rank.shape[1] + tl.arange(0, rank.shape[1])[None, :]
        mine, total = joined(total, PARTIAL + place, split, splits, distance, COUNTER)
    return mine, total


@triton.jit
def _store_grad(
    total: tl.tensor, OUT: tl.tensor, row: tl.tensor, rows: tl.tensor, column: tl.tensor, columns: tl.tensor,
    ADD: tl.constexpr,
) -> None:  # fmt: skip
    """Into OUT (rows, columns), contiguous, or None; what lies outside is left."""
    if OUT is not None:
        place = OUT + row.to(tl.int64) * columns + column
        mask = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        if ADD:
            total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
        tl.store(place, total.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def _sum_of_parts(
    PARTS: tl.tensor, parts: tl.tensor, rank: tl.tensor, ranks: tl.tensor, column: tl.tensor, columns: tl.tensor,
    AT_ONCE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Of PARTS (ranks, parts, columns), contiguous, some ranks (SUM_RANKS, 1) and columns (1, SUM_COLUMNS)."""
    inside = (rank < ranks) & (column < columns)
    at = PARTS + rank.to(tl.int64) * parts * columns + column
    total = tl.zeros((rank.shape[0], column.shape[1]), tl.float32)
    for begin in range(0, parts, AT_ONCE):
        for i in tl.static_range(AT_ONCE):  # their loads do not wait for each other
            total += tl.load(at + i * columns, mask=inside & (begin + i < parts), other=0.0)
        at += AT_ONCE * columns
    return total


@triton.jit
def lora_grads_kernel(
    D: tl.tensor,  # (tokens, ...), last stride 1, as all four
    U: tl.tensor,  # (tokens, ranks), or None, as X, with PARTS
    X: tl.tensor,  # (tokens, inputs)
    T: tl.tensor,  # (tokens, ranks)
    PARTS: tl.tensor,  # (ranks, parts, inputs) float32, contiguous: DA's sums; or None
    NORM: tl.tensor,  # (inputs,), times which columns of DA are, or None
    DA0: tl.tensor,  # of each part: (rank, inputs), and (columns, rank), contiguous, or None
    DB0: tl.tensor,
    DA1: tl.tensor,
    DB1: tl.tensor,
    DA2: tl.tensor,
    DB2: tl.tensor,
    PARTIAL: tl.tensor,  # (splits, tiles, COLUMNS * the wider) float32, where SPLIT
    COUNTER: tl.tensor,  # (tiles,) int32, zeros, where SPLIT
    tokens: tl.tensor,
    parts: tl.tensor,
    d_stride: tl.tensor,
    u_stride: tl.tensor,
    x_stride: tl.tensor,
    t_stride: tl.tensor,
    chunk: tl.tensor,  # tokens of a program: a multiple of ROWS
    inputs: tl.tensor,  # 0 where no DA is wanted
    ranks: tl.tensor,
    first0: tl.tensor,  # of each part: its columns of D, none where DB is not wanted, and its ranks
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
    ADD: tl.constexpr,
    SPLIT: tl.constexpr,
    COLUMN_ALIGN: tl.constexpr,  # divides where parts begin and how wide they are
    RANK_ALIGN: tl.constexpr,
    A_WIDTH: tl.constexpr,
    B_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    SUM_RANKS: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    SUM_PARTS: tl.constexpr,
) -> None:
    tiles_a = tl.cdiv(inputs, COLUMNS) * tl.cdiv(ranks, A_WIDTH) if PARTS is None else 0
    tiles0 = tl.cdiv(columns0, COLUMNS) * tl.cdiv(rank0, B_WIDTH)
    tiles1 = tl.cdiv(columns1, COLUMNS) * tl.cdiv(rank1, B_WIDTH)
    tiles = tiles_a + tiles0 + tiles1 + tl.cdiv(columns2, COLUMNS) * tl.cdiv(rank2, B_WIDTH)
    splits = tl.maximum(tl.cdiv(tokens, chunk), 1)
    if PARTS is not None:
        program = tl.program_id(0) - tiles * splits
        if program >= 0:
            strips = tl.cdiv(inputs, SUM_COLUMNS)
            # what differs in shape has a name of its own in each branch
            summed = program % strips * SUM_COLUMNS + tl.arange(0, SUM_COLUMNS)[None, :]
            rank = program // strips * SUM_RANKS + tl.arange(0, SUM_RANKS)[:, None]
            total = _sum_of_parts(PARTS, parts, rank, ranks, summed, inputs, SUM_PARTS)
            _store_grad(total, DA0, rank - start0, rank0, summed, inputs, ADD)
            _store_grad(total, DA1, rank - start1, rank1, summed, inputs, ADD)
            _store_grad(total, DA2, rank - start2, rank2, summed, inputs, ADD)
            return
    # programs that run at the same time have the same tokens: rows are read as they lie
    split, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    begin = split * chunk
    end = tl.minimum(begin + chunk, tokens)
    across = tl.arange(0, COLUMNS)[None, :]
    distance = tiles.to(tl.int64) * COLUMNS * (A_WIDTH if A_WIDTH > B_WIDTH else B_WIDTH)  # to the next split's tile
    if SPLIT:
        PARTIAL += tile.to(tl.int64) * COLUMNS * (A_WIDTH if A_WIDTH > B_WIDTH else B_WIDTH)
        COUNTER += tile

    if tile < tiles_a if PARTS is None else False:
        strips = tl.cdiv(inputs, COLUMNS)
        column, rank_a = tile % strips * COLUMNS + across, tile // strips * A_WIDTH + tl.arange(0, A_WIDTH)[None, :]
        mine, d_at = _product(
            X, x_stride, column, inputs, U, u_stride, rank_a, ranks, begin, end, PARTIAL, split, splits, distance,
            COUNTER, SPLIT, ROWS, STAGES,
        )  # fmt: skip
        if mine:
            d_a, row_a = tl.trans(d_at), tl.trans(rank_a)
            if NORM is not None:
                d_a *= tl.load(NORM + column, mask=column < inputs, other=0.0).to(tl.float32)
            _store_grad(d_a, DA0, row_a - start0, rank0, column, inputs, ADD)
            _store_grad(d_a, DA1, row_a - start1, rank1, column, inputs, ADD)
            _store_grad(d_a, DA2, row_a - start2, rank2, column, inputs, ADD)
    else:
        tile -= tiles_a
        part = (tile >= tiles0).to(tl.int32) + (tile >= tiles0 + tiles1).to(tl.int32)
        tile -= tl.where(part > 0, tiles0, 0) + tl.where(part > 1, tiles1, 0)
        first = of_part(part, first0, first1, first2, COLUMN_ALIGN)
        columns = of_part(part, columns0, columns1, columns2, COLUMN_ALIGN)
        start = of_part(part, start0, start1, start2, RANK_ALIGN)
        part_ranks = of_part(part, rank0, rank1, rank2, RANK_ALIGN)
        strips = tl.cdiv(columns, COLUMNS)
        column, rank_b = tile % strips * COLUMNS + across, tile // strips * B_WIDTH + tl.arange(0, B_WIDTH)[None, :]
        mine, d_b = _product(
            D + first, d_stride, column, columns, T + start, t_stride, rank_b, part_ranks, begin, end, PARTIAL, split,
            splits, distance, COUNTER, SPLIT, ROWS, STAGES,
        )  # fmt: skip
        if mine:
            row_b = tl.trans(column)
            if part == 0:
                _store_grad(d_b, DB0, row_b, columns, rank_b, part_ranks, ADD)
            elif part == 1:
                _store_grad(d_b, DB1, row_b, columns, rank_b, part_ranks, ADD)
            else:
                _store_grad(d_b, DB2, row_b, columns, rank_b, part_ranks, ADD)


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
    """As `chronicals.kernels.lora_thin.lora_grads`, in one launch."""
    assert d_out.dtype in DTYPES, f"no kernel for {d_out.dtype}"
    config = GRADS_LONG if len(d_out) >= LONG else GRADS
    launch_grads(config, d_out, u, x, t, blocks, d_a, d_b, add=add, norm=norm, parts=parts)


def launch_grads(
    config: Config,
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
    """`lora_grads`, cut as `config` says."""
    ranks, tokens = blocks[-1].start + blocks[-1].rank, len(d_out)
    if parts is not None:
        assert u is x is norm is None, "dA is there, in parts"
        assert parts.shape[0] >= ranks and parts.dtype == torch.float32 and parts.is_contiguous()
        inputs = parts.shape[2]
    else:
        assert u is not None and x is not None
        assert u.shape[0] == x.shape[0] == tokens
        inputs = x.shape[1]
    wide = [matrix for matrix in (d_out, u, x, t) if matrix is not None]
    assert len(t) == tokens
    assert all(matrix.dtype == d_out.dtype and matrix.stride(1) == 1 for matrix in wide)
    for block, da, db in zip(blocks, d_a, d_b, strict=True):
        assert da is None or (da.shape == (block.rank, inputs) and da.is_contiguous())
        assert db is None or (db.shape == (block.columns, block.rank) and db.is_contiguous())
    assert norm is None or (norm.shape == (inputs,) and norm.is_contiguous())
    if all(da is None for da in d_a):
        inputs = 0
    wanted = [block if db is not None else block._replace(columns=0) for block, db in zip(blocks, d_b, strict=True)]
    a_width, b_width = width_for(ranks), width_for(max(block.rank for block in blocks))
    strips = [triton.cdiv(block.columns, config.columns) * triton.cdiv(block.rank, b_width) for block in wanted]
    tiles, sums = sum(strips), 0
    if parts is None:
        tiles += triton.cdiv(inputs, config.columns) * triton.cdiv(ranks, a_width)
    else:
        sums = triton.cdiv(inputs, SUM_COLUMNS) * triton.cdiv(ranks, SUM_RANKS)
    if tiles + sums == 0:
        return
    most = max(1, config.programs * device_limits(d_out.device)[0] // max(1, tiles))
    chunk = max(1, triton.cdiv(triton.cdiv(tokens, config.rows), most)) * config.rows
    splits = max(1, triton.cdiv(tokens, chunk))
    wider = max(a_width, b_width)
    outs = [out for pair in zip(d_a, d_b, strict=True) for out in pair]
    lora_grads_kernel[(tiles * splits + sums,)](
        d_out, u, x, t, parts, norm, *outs, *[None] * (2 * MOST_PARTS - len(outs)),
        *workspace(d_out, tiles, splits * tiles * config.columns * wider, splits > 1),
        tokens, 0 if parts is None else parts.shape[1], d_out.stride(0), 0 if u is None else u.stride(0),
        0 if x is None else x.stride(0), t.stride(0), chunk, inputs, ranks,
        *flat(wanted), ADD=add, SPLIT=splits > 1,
        COLUMN_ALIGN=divisor(n for block in wanted for n in (block.first, block.columns)),
        RANK_ALIGN=divisor(n for block in blocks for n in (block.start, block.rank)),
        A_WIDTH=a_width, B_WIDTH=b_width, ROWS=config.rows, COLUMNS=config.columns,
        STAGES=stages(config, (config.columns + wider) * config.rows * t.element_size(), t.device),
        SUM_RANKS=SUM_RANKS, SUM_COLUMNS=SUM_COLUMNS, SUM_PARTS=SUM_PARTS, num_warps=config.warps,
    )  # fmt: skip
