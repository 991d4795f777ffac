"""LoRA's gradients as a Triton kernel: dA and dB of all adapters of a projection in one launch.

Its programs are of two kinds: tiles of dy for dB, and tiles of x for dA. lora_thin.py says how their sums over tokens
are split.

Left out: float32 (lora_thin.py), and dropout (lora_dropout.py).
"""

from __future__ import annotations

from collections.abc import Sequence

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

GRADS, GRADS_LONG = Config(128, 64, 4, 3, 1), Config(64, 128, 4, 4, 1)


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
def lora_grads_kernel(
    D: tl.tensor,  # (tokens, ...), last stride 1, as all four
    U: tl.tensor,  # (tokens, ranks)
    X: tl.tensor,  # (tokens, inputs)
    T: tl.tensor,  # (tokens, ranks)
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
) -> None:
    tiles_a = tl.cdiv(inputs, COLUMNS) * tl.cdiv(ranks, A_WIDTH)
    tiles0 = tl.cdiv(columns0, COLUMNS) * tl.cdiv(rank0, B_WIDTH)
    tiles1 = tl.cdiv(columns1, COLUMNS) * tl.cdiv(rank1, B_WIDTH)
    tiles = tiles_a + tiles0 + tiles1 + tl.cdiv(columns2, COLUMNS) * tl.cdiv(rank2, B_WIDTH)
    # programs that run at the same time have the same tokens: rows are read as they lie
    split, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    splits = tl.cdiv(tokens, chunk)
    begin = split * chunk
    end = tl.minimum(begin + chunk, tokens)
    across = tl.arange(0, COLUMNS)[None, :]
    distance = tiles.to(tl.int64) * COLUMNS * (A_WIDTH if A_WIDTH > B_WIDTH else B_WIDTH)  # to the next split's tile
    if SPLIT:
        PARTIAL += tile.to(tl.int64) * COLUMNS * (A_WIDTH if A_WIDTH > B_WIDTH else B_WIDTH)
        COUNTER += tile

    # what differs in shape has a name of its own in each branch
    if tile < tiles_a:
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
    u: Tensor,
    x: Tensor,
    t: Tensor,
    blocks: Sequence[Block],
    d_a: Sequence[Tensor | None],
    d_b: Sequence[Tensor | None],
    *,
    add: bool,
    norm: Tensor | None = None,
) -> None:
    """As `chronicals.kernels.lora_thin.lora_grads`, in one launch."""
    assert x.dtype in DTYPES, f"no kernel for {x.dtype}"
    config = GRADS_LONG if len(x) >= LONG else GRADS
    launch_grads(config, d_out, u, x, t, blocks, d_a, d_b, add=add, norm=norm)


def launch_grads(
    config: Config,
    d_out: Tensor,
    u: Tensor,
    x: Tensor,
    t: Tensor,
    blocks: Sequence[Block],
    d_a: Sequence[Tensor | None],
    d_b: Sequence[Tensor | None],
    *,
    add: bool,
    norm: Tensor | None = None,
) -> None:
    """`lora_grads`, cut as `config` says."""
    tokens, inputs = x.shape
    assert d_out.shape[0] == u.shape[0] == t.shape[0] == tokens
    assert d_out.dtype == u.dtype == x.dtype == t.dtype
    assert all(matrix.stride(1) == 1 for matrix in (d_out, u, x, t))
    for block, da, db in zip(blocks, d_a, d_b, strict=True):
        assert da is None or (da.shape == (block.rank, inputs) and da.is_contiguous())
        assert db is None or (db.shape == (block.columns, block.rank) and db.is_contiguous())
    assert norm is None or (norm.shape == (inputs,) and norm.is_contiguous())
    ranks = blocks[-1].start + blocks[-1].rank
    if all(da is None for da in d_a):
        inputs = 0
    wanted = [block if db is not None else block._replace(columns=0) for block, db in zip(blocks, d_b, strict=True)]
    a_width, b_width = width_for(ranks), width_for(max(block.rank for block in blocks))
    strips = [triton.cdiv(block.columns, config.columns) * triton.cdiv(block.rank, b_width) for block in wanted]
    tiles = triton.cdiv(inputs, config.columns) * triton.cdiv(ranks, a_width) + sum(strips)
    if tiles == 0:
        return
    most = max(1, config.programs * device_limits(x.device)[0] // tiles)
    chunk = max(1, triton.cdiv(triton.cdiv(tokens, config.rows), most)) * config.rows
    splits = max(1, triton.cdiv(tokens, chunk))
    wider = max(a_width, b_width)
    outs = [out for pair in zip(d_a, d_b, strict=True) for out in pair]
    lora_grads_kernel[(tiles * splits,)](
        d_out, u, x, t, norm, *outs, *[None] * (2 * MOST_PARTS - len(outs)),
        *workspace(x, tiles, splits * tiles * config.columns * wider, splits > 1),
        tokens, d_out.stride(0), u.stride(0), x.stride(0), t.stride(0), chunk, inputs, ranks,
        *flat(wanted), ADD=add, SPLIT=splits > 1,
        COLUMN_ALIGN=divisor(n for block in wanted for n in (block.first, block.columns)),
        RANK_ALIGN=divisor(n for block in blocks for n in (block.start, block.rank)),
        A_WIDTH=a_width, B_WIDTH=b_width, ROWS=config.rows, COLUMNS=config.columns,
        STAGES=stages(config, (config.columns + wider) * config.rows * x.element_size(), x.device),
        num_warps=config.warps,
    )  # fmt: skip
