"""LoRA's thin matmuls as Triton kernels, one launch each: t, u, and all gradients of a projection's adapters.

A thin matmul makes a small output from much input, so an output has too few tiles to fill a GPU, and its long inner
dimension is split over programs. Each leaves its part in a workspace; the last to come, which a counter tells, adds all
parts in order and writes the output. The only atomic is that integer counter: bits do not depend on who comes last.
Where there are enough tiles nothing is split, and nothing but the output is written.

- `lora_down` reads x once for the ranks of all adapters, and leaves t in up to two places.
- `lora_up_backward` multiplies each adapter's columns of dy by that adapter's B alone, not by the zeros beside it.
- `lora_grads` has programs of two kinds in one launch: tiles of dy for dB, and tiles of x for dA.

Counters are zero between launches: a program that was last sets its own back. They are one buffer for a device, so
launches of these kernels must not overlap: one stream, as a training step has.

Ranks are padded to a power of two of at least 16 inside, for tensor cores; more than `WIDEST` take several tiles.
Left out: float64, and dropout (lora_dropout.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from chronicals.kernels.fused.launch import device_limits
from chronicals.kernels.lora_thin import Block

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 128  # ranks of a tile
MOST_PARTS = 3  # adapters of a projection: q, k, v
COUNTERS = 2**16  # of a device: programs of a launch that splits


class Config(NamedTuple):
    """How a launch is cut."""

    rows: int  # tokens of a tile
    columns: int  # of x or dy, of a tile
    warps: int
    stages: int
    programs: int  # of a multiprocessor, at most, where the inner dimension is split for them


LONG = 8192  # tokens from which on a launch has much to do
DOWN, DOWN_LONG = Config(64, 128, 4, 3, 1), Config(64, 64, 4, 7, 1)
UP = Config(64, 64, 4, 7, 1)
GRADS, GRADS_LONG = Config(128, 64, 4, 3, 1), Config(64, 128, 4, 4, 1)
FLOAT32 = Config(32, 32, 4, 2, 1)  # whose products are exact, and therefore not tensor cores': right, and slow


@triton.jit
def _is_last(COUNTER: tl.tensor, splits: tl.tensor) -> tl.tensor:
    """Whether this program is the last of `splits` to come here. If so, it sees what the others stored before."""
    tl.debug_barrier()  # the atomic is one thread's, and releases what all threads have stored
    last = tl.atomic_add(COUNTER, 1, sem="acq_rel", scope="gpu") == splits - 1
    if last:
        tl.store(COUNTER, 0)
    return last


@triton.jit
def _joined(
    total: tl.tensor, PLACE: tl.tensor, split: tl.tensor, splits: tl.tensor, distance: tl.tensor, COUNTER: tl.tensor
) -> tl.tensor:  # fmt: skip
    """Whether this program is the last of `splits` that share an output. If so, the sum of all their `total`, in order.

    PLACE: pointers to where the first leaves its own; the next does `distance` elements behind it.
    """
    tl.store(PLACE + split * distance, total)
    last = _is_last(COUNTER, splits)
    if last:
        total = tl.load(PLACE)
        for _ in range(1, splits):
            PLACE += distance
            total += tl.load(PLACE)
    return last, total


@triton.jit
def _of_part(part: tl.tensor, a: tl.tensor, b: tl.tensor, c: tl.tensor, ALIGN: tl.constexpr) -> tl.tensor:
    return tl.multiple_of(tl.where(part == 0, a, tl.where(part == 1, b, c)), ALIGN)


@triton.jit
def _store_thin(
    total: tl.tensor, OUT: tl.tensor, out_stride: tl.tensor, token: tl.tensor, tokens: tl.tensor, rank: tl.tensor,
    ranks: tl.tensor,
) -> None:  # fmt: skip
    place = OUT + token.to(tl.int64) * out_stride + rank
    tl.store(place, total.to(OUT.dtype.element_ty), mask=(token < tokens) & (rank < ranks))


@triton.jit
def _store_down(
    total: tl.tensor, OUT: tl.tensor, COPY: tl.tensor, SCALES: tl.tensor, alpha: tl.tensor, out_stride: tl.tensor,
    copy_stride: tl.tensor, token: tl.tensor, tokens: tl.tensor, rank: tl.tensor, ranks: tl.tensor,
) -> None:  # fmt: skip
    """`rank`: (1, WIDTH), and `ranks`, behind the last that is stored."""
    total *= alpha
    if SCALES is not None:
        total *= tl.load(SCALES + rank, mask=rank < ranks, other=0.0)
    _store_thin(total, OUT, out_stride, token, tokens, rank, ranks)
    if COPY is not None:
        _store_thin(total, COPY, copy_stride, token, tokens, rank, ranks)


@triton.jit
def lora_down_kernel(
    X: tl.tensor,  # (tokens, ...), last stride 1
    RIGHT: tl.tensor,  # B: (..., ranks), or A (ranks, ...), where ACROSS; last stride 1
    OUT: tl.tensor,  # (tokens, ranks), last stride 1
    COPY: tl.tensor,  # (tokens, ranks), last stride 1, or None
    SCALES: tl.tensor,  # (ranks,) float32, or None
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
    first = _of_part(part, first0, first1, first2, COLUMN_ALIGN)
    columns = _of_part(part, columns0, columns1, columns2, COLUMN_ALIGN)
    start = _of_part(part, start0, start1, start2, RANK_ALIGN)
    ranks = tl.multiple_of(start + _of_part(part, rank0, rank1, rank2, RANK_ALIGN), RANK_ALIGN)
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
        total = tl.dot(x, right, total, input_precision="ieee")

    mine = True
    if SPLIT:
        program = tl.program_id(0) - split  # the first of those that share this output
        PARTIAL += program.to(tl.int64) * ROWS * WIDTH + row * WIDTH + tl.arange(0, WIDTH)[None, :]
        mine, total = _joined(total, PARTIAL, split, splits, ROWS * WIDTH, COUNTER + program)
    if mine:
        _store_down(total, OUT, COPY, SCALES, alpha, out_stride, copy_stride, token, tokens, rank, ranks)


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
        total = tl.dot(tl.trans(m), v, total, input_precision="ieee")
    mine = True
    if SPLIT:
        place = tl.arange(0, column.shape[1])[:, None] * rank.shape[1] + tl.arange(0, rank.shape[1])[None, :]
        mine, total = _joined(total, PARTIAL + place, split, splits, distance, COUNTER)
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
            _store_grad(d_a, DA0, row_a - start0, rank0, column, inputs, ADD)
            _store_grad(d_a, DA1, row_a - start1, rank1, column, inputs, ADD)
            _store_grad(d_a, DA2, row_a - start2, rank2, column, inputs, ADD)
    else:
        tile -= tiles_a
        part = (tile >= tiles0).to(tl.int32) + (tile >= tiles0 + tiles1).to(tl.int32)
        tile -= tl.where(part > 0, tiles0, 0) + tl.where(part > 1, tiles1, 0)
        first = _of_part(part, first0, first1, first2, COLUMN_ALIGN)
        columns = _of_part(part, columns0, columns1, columns2, COLUMN_ALIGN)
        start = _of_part(part, start0, start1, start2, RANK_ALIGN)
        part_ranks = _of_part(part, rank0, rank1, rank2, RANK_ALIGN)
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


def lora_down(
    x: Tensor, a: Tensor, *, alpha: float, scales: Tensor | None = None, out: Tensor, copy: Tensor | None = None
) -> None:
    """As `chronicals.kernels.lora_thin.lora_down`, in one launch."""
    config = FLOAT32 if x.dtype == torch.float32 else DOWN_LONG if len(x) >= LONG else DOWN
    launch_down(config, x, a, [Block(0, x.shape[1], 0, a.shape[0])], alpha, scales, out, copy, across=True)


def lora_up_backward(
    d_out: Tensor, b: Tensor, blocks: Sequence[Block], *, alpha: float, scales: Tensor | None = None, out: Tensor
) -> None:
    """As `chronicals.kernels.lora_thin.lora_up_backward`, in one launch."""
    config = FLOAT32 if d_out.dtype == torch.float32 else UP
    *others, last = blocks
    blocks = [*others, last._replace(rank=out.shape[1] - last.start)]  # zeros beyond it are its own
    launch_down(config, d_out, b, blocks, alpha, scales, out, None, across=False)


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
) -> None:
    """`lora_down`, where `across`, or `lora_up_backward`, cut as `config` says."""
    tokens = len(x)
    inner, ranks = right.shape[::-1] if across else right.shape
    assert x.shape[1] == inner and out.shape == (tokens, ranks)
    assert copy is None or copy.shape == out.shape
    assert x.dtype == right.dtype == out.dtype and x.dtype in DTYPES, f"no kernel for {x.dtype}"
    assert all(matrix.stride(1) == 1 for matrix in (x, right, out) + (() if copy is None else (copy,)))
    assert scales is None or scales.dtype == torch.float32
    width = _width(max(block.rank for block in blocks))
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
        x, right, out, copy, scales, *_workspace(x, programs, programs * config.rows * width, split), alpha,
        tokens, x.stride(0), right.stride(0), out.stride(0), 0 if copy is None else copy.stride(0), chunk,
        *_flat(blocks), ACROSS=across, SPLIT=split,
        COLUMN_ALIGN=_divisor(n for block in blocks for n in (block.first, block.columns)),
        RANK_ALIGN=_divisor(n for block in blocks for n in (block.start, block.rank)),
        WIDTH=width, ROWS=config.rows, COLUMNS=config.columns,
        STAGES=_stages(config, (config.rows + width) * config.columns * x.element_size(), x.device),
        num_warps=config.warps,
    )  # fmt: skip


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
) -> None:
    """As `chronicals.kernels.lora_thin.lora_grads`, in one launch."""
    config = FLOAT32 if x.dtype == torch.float32 else GRADS_LONG if len(x) >= LONG else GRADS
    launch_grads(config, d_out, u, x, t, blocks, d_a, d_b, add=add)


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
) -> None:
    """`lora_grads`, cut as `config` says."""
    tokens, inputs = x.shape
    assert d_out.shape[0] == u.shape[0] == t.shape[0] == tokens
    assert d_out.dtype == u.dtype == x.dtype == t.dtype and x.dtype in DTYPES, f"no kernel for {x.dtype}"
    assert all(matrix.stride(1) == 1 for matrix in (d_out, u, x, t))
    for block, da, db in zip(blocks, d_a, d_b, strict=True):
        assert da is None or (da.shape == (block.rank, inputs) and da.is_contiguous())
        assert db is None or (db.shape == (block.columns, block.rank) and db.is_contiguous())
    ranks = blocks[-1].start + blocks[-1].rank
    if all(da is None for da in d_a):
        inputs = 0
    wanted = [block if db is not None else block._replace(columns=0) for block, db in zip(blocks, d_b, strict=True)]
    a_width, b_width = _width(ranks), _width(max(block.rank for block in blocks))
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
        d_out, u, x, t, *outs, *[None] * (2 * MOST_PARTS - len(outs)),
        *_workspace(x, tiles, splits * tiles * config.columns * wider, splits > 1),
        tokens, d_out.stride(0), u.stride(0), x.stride(0), t.stride(0), chunk, inputs, ranks,
        *_flat(wanted), ADD=add, SPLIT=splits > 1,
        COLUMN_ALIGN=_divisor(n for block in wanted for n in (block.first, block.columns)),
        RANK_ALIGN=_divisor(n for block in blocks for n in (block.start, block.rank)),
        A_WIDTH=a_width, B_WIDTH=b_width, ROWS=config.rows, COLUMNS=config.columns,
        STAGES=_stages(config, (config.columns + wider) * config.rows * x.element_size(), x.device),
        num_warps=config.warps,
    )  # fmt: skip


@functools.cache
def _counters(device: torch.device) -> Tensor:
    """Zeros, whenever no launch runs."""
    assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing(), "run once before the capture"
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def _workspace(like: Tensor, counters: int, partials: int, split: bool) -> tuple[Tensor | None, Tensor | None]:
    if not split:
        return None, None
    assert counters <= COUNTERS, f"{counters} outputs are enough without a split"
    return torch.empty(partials, dtype=torch.float32, device=like.device), _counters(like.device)


def _flat(blocks: Sequence[Block]) -> list[int]:
    assert len(blocks) <= MOST_PARTS
    return [number for block in (*blocks, *[Block(0, 0, 0, 0)] * (MOST_PARTS - len(blocks))) for number in block]


def _width(ranks: int) -> int:
    return min(WIDEST, max(16, triton.next_power_of_2(ranks)))


def _divisor(numbers: Iterable[int]) -> int:
    """The largest power of two, at most 16, that divides all."""
    return math.gcd(16, *numbers)


def _stages(config: Config, size: int, device: torch.device) -> int:
    """Of loads, `size` bytes each: as many as shared memory has room for."""
    return max(1, min(config.stages, device_limits(device)[1] // size))
