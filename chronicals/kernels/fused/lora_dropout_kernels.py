"""Kernels of `lora_dropout.py`, which says what they are short of.

A call of Philox serves eight consecutive elements, and they are those that a thread has loaded. What goes through
shared memory is x alone, masked, where it is an operand.

dx is made in tiles of 16 rows, a warp 32 columns of them: the warps of a program lie side by side, so that rows of dx
and x are read and written in whole lines, and v, which every strip of columns reads again, is read by few of them.
Tensor cores leave a thread two columns of each eight of its warp's, which are 8 WARPS apart, of a row and of the eighth
behind it. A's columns are read in an order in which those are eight in a row: those that the thread has loaded of x and
dx, and whose masks it draws. A tile is kept as (half, warp, 8 rows) by 32 columns: rows of it that are one behind the
other are one warp's, so that its two axes are shared out as any tile's are. Hardware that does it otherwise is right
too, and slower.
"""

from __future__ import annotations

import triton
import triton.language as tl

from chronicals.kernels.fused.glu import activate
from chronicals.kernels.fused.philox import philox
from chronicals.kernels.lora import LANES
from chronicals.kernels.philox import DROPOUT

_LANES, _DROPOUT = tl.constexpr(LANES), tl.constexpr(DROPOUT)
DX_ROWS, WARP_COLUMNS = 16, 32  # of a tile of dx; of a warp of it
_ROWS, _COLUMNS = tl.constexpr(DX_ROWS), tl.constexpr(WARP_COLUMNS)


@triton.jit
def random_bits(
    call: tl.tensor, stream: tl.tensor, counter: tl.tensor, seed: tl.tensor, PAIRS: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """Those of a tile (rows, columns), uint16, of its calls (rows, columns / LANES)."""
    zero = call * 0
    r0, r1, r2, r3 = philox(seed, call, zero + stream, zero + counter, zero + _DROPOUT)
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3)).to(tl.uint32, bitcast=True)  # (..., 2, 2), in order
    if PAIRS:  # hides that some are half of a product, whose upper 16 bits LLVM would shift out of 64
        words = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [words], dtype=tl.uint32, is_pure=True, pack=1)
    halves = tl.join(words.to(tl.uint16), (words >> 16).to(tl.uint16))
    return tl.reshape(halves, (call.shape[0], call.shape[1] * _LANES))


@triton.jit
def keeps(bits: tl.tensor, limit: tl.tensor) -> tl.tensor:
    return (bits & 0x7FFF) >= limit


@triton.jit
def masked(x: tl.tensor, bits: tl.tensor, limit: tl.tensor, PAIRS: tl.constexpr) -> tl.tensor:
    """x where it is kept, else 0."""
    if PAIRS and x.dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise(
            "{.reg .b32 keep; abs.f16x2 keep, $2; set.geu.u32.f16x2 keep, keep, $3; and.b32 $0, $1, keep;}",
            "=r,r,r,r", [x, bits, _everywhere(limit, bits)], dtype=x.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    return tl.where(keeps(bits, limit), x, 0.0).to(x.dtype)


@triton.jit
def _plus_masked(
    total: tl.tensor, product: tl.tensor, bits: tl.tensor, limit: tl.tensor, scale: tl.tensor, PAIRS: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """`total`, plus `scale` times the product where it is kept: float32."""
    if PAIRS:
        return tl.inline_asm_elementwise(
            "{.reg .b32 size; .reg .pred first, second; abs.f16x2 size, $6; setp.geu.f16x2 first|second, size, $7;"
            " mov.b32 $0, $2; mov.b32 $1, $3;"
            " @first fma.rn.f32 $0, $4, $8, $0; @second fma.rn.f32 $1, $5, $9, $1;}",
            "=&r,=&r,r,r,r,r,r,r,r,r",
            [total, product, bits, _everywhere(limit, bits), tl.zeros_like(total) + scale],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return total + tl.where(keeps(bits, limit), product, 0.0) * scale


@triton.jit
def _everywhere(limit: tl.tensor, like: tl.tensor) -> tl.tensor:
    return tl.zeros_like(like) + limit.to(like.dtype)


@triton.jit
def _piece(
    PIECES: tl.tensor, SCALES: tl.tensor, n: tl.tensor, start: tl.tensor, RANK: tl.constexpr, ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """First row of A, rows, stream, the threshold, and the scale; where all is `WHOLE`, rows are known without the
    table, `start` being the first of the launch, so that loads of A and v do not wait for it."""
    at = PIECES + 4 * n
    stream, limit, scale = tl.load(at + 2), tl.load(at + 3).to(tl.uint16), tl.load(SCALES + n)
    if WHOLE:
        return start + n * RANK, RANK, stream, limit, scale
    first, rank = tl.load(at), tl.load(at + 1)
    if ALIGNED:
        first, rank = tl.multiple_of(first, 8), tl.multiple_of(rank, 8)
    return first, rank, stream, limit, scale


@triton.jit
def _load(at: tl.tensor, mask: tl.tensor, WHOLE: tl.constexpr) -> tl.tensor:
    """A tile, zeros outside of `mask`; where all is `WHOLE`, without the instructions that look."""
    if WHOLE:
        return tl.load(at)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _store(at: tl.tensor, tile: tl.tensor, mask: tl.tensor, WHOLE: tl.constexpr) -> None:
    if WHOLE:
        tl.store(at, tile.to(at.dtype.element_ty))
    else:
        tl.store(at, tile.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _load_a(
    A: tl.tensor, start: tl.tensor, rank: tl.tensor, column: tl.tensor, columns: tl.tensor, a_stride: tl.tensor,
    RANK: tl.constexpr, WHOLE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    row = tl.arange(0, RANK)[:, None]
    return _load(A + (start + row) * a_stride + column, (row < rank) & (column < columns), WHOLE)


@triton.jit
def _load_v(
    V: tl.tensor, row: tl.tensor, tokens: tl.tensor, start: tl.tensor, rank: tl.tensor, v_stride: tl.tensor,
    RANK: tl.constexpr, WHOLE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    at = tl.arange(0, RANK)[None, :]
    return _load(V + row * v_stride + (start + at), (row < tokens) & (at < rank), WHOLE)


@triton.jit
def _scaled(v: tl.tensor, RSTD: tl.tensor, row: tl.tensor, tokens: tl.tensor, WHOLE: tl.constexpr) -> tl.tensor:
    """v, by rows as x was normed, where it was."""
    if RSTD is not None:
        v = (v.to(tl.float32) * _load(RSTD + row, row < tokens, WHOLE)).to(v.dtype)
    return v


@triton.jit
def _store_thin(
    total: tl.tensor, OUT: tl.tensor, stride: tl.tensor, first: tl.tensor, start: tl.tensor, rank: tl.tensor,
    here: tl.tensor,
) -> None:  # fmt: skip
    row, at = tl.arange(0, total.shape[0])[:, None], tl.arange(0, total.shape[1])[None, :]
    OUT += first.to(tl.int64) * stride + start
    tl.store(OUT + row * stride + at, total.to(OUT.dtype.element_ty), mask=here & (at < rank))


@triton.jit
def _store_partial(
    d_a: tl.tensor, PARTIAL: tl.tensor, NORM: tl.tensor, start: tl.tensor, rank: tl.tensor, scale: tl.tensor,
    column: tl.tensor, columns: tl.tensor,
) -> None:  # fmt: skip
    """A part (columns, ranks) of A's gradient."""
    d_a = tl.trans(d_a) * scale
    if NORM is not None:
        d_a *= tl.load(NORM + column, mask=column < columns, other=0.0).to(tl.float32)
    row = tl.arange(0, d_a.shape[0])[:, None]
    place = ((start + row).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * columns + column
    tl.store(PARTIAL + place, d_a, mask=(row < rank) & (column < columns))


@triton.jit
def lora_dropout_down_kernel(
    X: tl.tensor,  # (tokens, columns), last stride 1
    A: tl.tensor,  # (ranks, columns), last stride 1
    OUT: tl.tensor,  # (tokens, ranks), last stride 1
    COPY: tl.tensor,  # (tokens, ranks), last stride 1, or None
    PIECES: tl.tensor,  # (pieces, 4) int32: first row of A, rows, stream, threshold
    SCALES: tl.tensor,  # (pieces,) float32
    SEED: tl.tensor,  # (1,) int64
    COUNTER: tl.tensor,  # (1,) int64
    tokens: tl.tensor,
    columns: tl.tensor,
    x_stride: tl.tensor,
    a_stride: tl.tensor,
    out_stride: tl.tensor,
    copy_stride: tl.tensor,
    first_rank: tl.tensor,  # of the pieces, all
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,  # pieces begin at multiples of 8
    WHOLE: tl.constexpr,  # no tile juts out of its matrix, and pieces have RANK rows, one behind the other
    PAIRS: tl.constexpr,  # two elements of 16 bits an instruction, as CUDA has them
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    piece, first = tl.program_id(0), tl.program_id(1) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    here = row < tokens - first
    seed, counter = tl.load(SEED), tl.load(COUNTER).to(tl.int32)
    start, rank, stream, limit, scale = _piece(PIECES, SCALES, piece, first_rank, RANK, ALIGNED, WHOLE)
    first_call = (first + row) * tl.cdiv(columns, _LANES) + tl.arange(0, COLUMNS // _LANES)[None, :]
    X += first.to(tl.int64) * x_stride
    total = tl.zeros((ROWS, RANK), tl.float32)
    for begin in tl.range(0, columns, COLUMNS, num_stages=STAGES):
        column = begin + tl.arange(0, COLUMNS)[None, :]
        x = _load(X + row * x_stride + column, here & (column < columns), WHOLE)
        a = _load_a(A, start, rank, column, columns, a_stride, RANK, WHOLE)
        bits = random_bits(first_call + begin // _LANES, stream, counter, seed, PAIRS)
        total = tl.dot(masked(x, bits, limit, PAIRS), tl.trans(a), total, input_precision="ieee")
    total *= scale
    _store_thin(total, OUT, out_stride, first, start, rank, here)
    if COPY is not None:
        _store_thin(total, COPY, copy_stride, first, start, rank, here)


@triton.jit
def _column_in_strip(column: tl.tensor, WARPS: tl.constexpr) -> tl.tensor:
    """Where a column of a product is in its strip: (four, warp, thread, two) and (warp, thread, four, two)."""
    return column // 8 % WARPS * 32 + column // 2 % 4 * 8 + column // (8 * WARPS) * 2 + column % 2


@triton.jit
def _as_in_tile(product: tl.tensor, WARPS: tl.constexpr) -> tl.tensor:
    apart = tl.reshape(product, (2, 8, 4, WARPS, 4, 2))
    return tl.reshape(tl.permute(apart, (0, 3, 1, 4, 2, 5)), (_ROWS * WARPS, _COLUMNS))


@triton.jit
def _in_order(tile: tl.tensor, WARPS: tl.constexpr) -> tl.tensor:
    """(rows, columns of the strip)."""
    apart = tl.reshape(tile, (2, WARPS, 8, _COLUMNS))
    return tl.reshape(tl.permute(apart, (0, 2, 1, 3)), (_ROWS, _COLUMNS * WARPS))


@triton.jit
def lora_dropout_up_kernel(
    DX: tl.tensor,  # (tokens, columns), last stride 1, of any dtype: read, and written where there is no ACTIVATION
    X: tl.tensor,  # (tokens, columns), last stride 1; with an ACTIVATION (tokens, 2 columns): gate, then up
    D_X: tl.tensor,  # with an ACTIVATION: of the shape of X, may be X, the gradient of gate and up; else None
    V: tl.tensor,  # (tokens, ranks), last stride 1
    A: tl.tensor,  # (ranks, columns), last stride 1
    RSTD: tl.tensor,  # (tokens,) float32, of rows of V for A's gradients; or None
    NORM: tl.tensor,  # (columns,), of A's gradients; or None
    PARTIAL: tl.tensor,  # (ranks, parts, columns) float32: of A's gradient; or None, for dx alone
    PIECES: tl.tensor,  # (pieces, 4) int32: first row of A, rows, stream, threshold
    SCALES: tl.tensor,  # (pieces,) float32
    SEED: tl.tensor,  # (1,) int64
    COUNTER: tl.tensor,  # (1,) int64
    tokens: tl.tensor,
    columns: tl.tensor,
    dx_stride: tl.tensor,
    x_stride: tl.tensor,
    d_x_stride: tl.tensor,
    v_stride: tl.tensor,
    a_stride: tl.tensor,
    first_rank: tl.tensor,
    ACTIVATION: tl.constexpr,  # None: X is x
    N_PIECES: tl.constexpr,
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
    PAIRS: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
) -> None:
    seed, counter = tl.load(SEED), tl.load(COUNTER).to(tl.int32)
    first_column = tl.program_id(0) * (_COLUMNS * WARPS)
    strip = tl.arange(0, _COLUMNS * WARPS)[None, :]
    token, tile = tl.arange(0, _ROWS)[:, None], tl.arange(0, _ROWS * WARPS)[:, None]
    row, beside = tile // (8 * WARPS) * 8 + tile % 8, tile // 8 % WARPS * _COLUMNS
    column = first_column + beside + tl.arange(0, _COLUMNS)[None, :]
    calls = tl.cdiv(columns, _LANES)
    first_call = row * calls + (first_column + beside) // _LANES + tl.arange(0, _COLUMNS // _LANES)[None, :]
    pieces: tl.tuple = ()
    a: tl.tuple = ()
    d_a: tl.tuple = ()
    for n in tl.static_range(N_PIECES):
        pieces += (_piece(PIECES, SCALES, n, first_rank, RANK, ALIGNED, WHOLE),)
        summed = first_column + _column_in_strip(strip, WARPS)
        a += (_load_a(A, pieces[n][0], pieces[n][1], summed, columns, a_stride, RANK, WHOLE),)
        d_a += (tl.zeros((_COLUMNS * WARPS, RANK), tl.float32),)
    for begin in tl.range(tl.program_id(1) * _ROWS, tokens, tl.num_programs(1) * _ROWS, num_stages=STAGES):
        first, left = tl.full((), 0, tl.int64) + begin, tokens - begin
        mask = (row < left) & (column < columns)
        v: tl.tuple = ()
        bits: tl.tuple = ()
        for n in tl.static_range(N_PIECES):
            start, rank, stream, _, _ = pieces[n]
            v += (_load_v(V + first * v_stride, token, left, start, rank, v_stride, RANK, WHOLE),)
            bits += (random_bits(first_call + begin * calls, stream, counter, seed, PAIRS),)
        dx_at = (DX + first * dx_stride) + (row * dx_stride + column)
        dx = _load(dx_at, mask, WHOLE).to(tl.float32)
        for n in tl.static_range(N_PIECES):
            product = _as_in_tile(tl.dot(v[n], a[n], input_precision="ieee"), WARPS)
            dx = _plus_masked(dx, product, bits[n], pieces[n][3], pieces[n][4], PAIRS)
        if ACTIVATION is None:
            _store(dx_at, dx, mask, WHOLE)
        if PARTIAL is not None:  # behind dx, so that gate, up and slope do not wait for it in registers
            x_at = (X + first * x_stride) + (row * x_stride + column)
            x = _load(x_at, mask, WHOLE)
            if ACTIVATION is not None:
                up = _load(x_at + columns, mask, WHOLE).to(tl.float32)
                value, slope = activate(x.to(tl.float32), ACTIVATION)
                d_x_at = (D_X + first * d_x_stride) + (row * d_x_stride + column)
                _store(d_x_at, dx * up * slope, mask, WHOLE)
                _store(d_x_at + columns, dx * value, mask, WHOLE)
                x = (value * up).to(V.dtype.element_ty)
            sums: tl.tuple = ()
            for n in tl.static_range(N_PIECES):
                dropped = _in_order(masked(x, bits[n], pieces[n][3], PAIRS), WARPS)
                scaled = _scaled(v[n], None if RSTD is None else RSTD + first, token, left, WHOLE)
                sums += (tl.dot(tl.trans(dropped), scaled, d_a[n], input_precision="ieee"),)
            d_a = sums
    if PARTIAL is not None:
        for n in tl.static_range(N_PIECES):
            start, rank, _, _, scale = pieces[n]
            _store_partial(d_a[n], PARTIAL, NORM, start, rank, scale, first_column + strip, columns)


@triton.jit
def lora_dropout_grad_kernel(
    X: tl.tensor,  # as of `lora_dropout_up_kernel`, all of these
    V: tl.tensor,
    RSTD: tl.tensor,
    NORM: tl.tensor,
    PARTIAL: tl.tensor,
    PIECES: tl.tensor,
    SCALES: tl.tensor,
    SEED: tl.tensor,
    COUNTER: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    x_stride: tl.tensor,
    v_stride: tl.tensor,
    first_rank: tl.tensor,
    N_PIECES: tl.constexpr,
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """The gradients of A alone."""
    seed, counter = tl.load(SEED), tl.load(COUNTER).to(tl.int32)
    row = tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    calls = tl.cdiv(columns, _LANES)
    first_call = row * calls + tl.program_id(0) * (COLUMNS // _LANES) + tl.arange(0, COLUMNS // _LANES)[None, :]
    pieces: tl.tuple = ()
    d_a: tl.tuple = ()
    for n in tl.static_range(N_PIECES):
        pieces += (_piece(PIECES, SCALES, n, first_rank, RANK, ALIGNED, WHOLE),)
        d_a += (tl.zeros((COLUMNS, RANK), tl.float32),)
    for begin in tl.range(tl.program_id(1) * ROWS, tokens, tl.num_programs(1) * ROWS, num_stages=STAGES):
        first, left = tl.full((), 0, tl.int64) + begin, tokens - begin
        x = _load((X + first * x_stride) + (row * x_stride + column), (row < left) & (column < columns), WHOLE)
        v: tl.tuple = ()
        for n in tl.static_range(N_PIECES):
            v += (_load_v(V + first * v_stride, row, left, pieces[n][0], pieces[n][1], v_stride, RANK, WHOLE),)
        sums: tl.tuple = ()
        for n in tl.static_range(N_PIECES):
            _, _, stream, limit, _ = pieces[n]
            dropped = masked(x, random_bits(first_call + begin * calls, stream, counter, seed, PAIRS), limit, PAIRS)
            scaled = _scaled(v[n], None if RSTD is None else RSTD + first, row, left, WHOLE)
            sums += (tl.dot(tl.trans(dropped), scaled, d_a[n], input_precision="ieee"),)
        d_a = sums
    for n in tl.static_range(N_PIECES):
        start, rank, _, _, scale = pieces[n]
        _store_partial(d_a[n], PARTIAL, NORM, start, rank, scale, column, columns)
