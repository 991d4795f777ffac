"""Dropout of adapters' inputs, fused with the thin matmuls around it: masks live in registers and are never stored.

The masks are those of `dropout_mask` (chronicals/kernels/lora.py), each adapter's its own. What this is short of are
instructions that may run: Philox is a chain of integer work (docs/math/lora.md counts it), and registers for several
masks at once leave few warps to fill the waits. So a call of Philox serves eight consecutive elements, and they are
those that a thread has loaded; and a program has one adapter, in forward and for the gradient of A: those of a fused
projection read x one behind the other, out of the cache. dx is one pass for all adapters, whose masks are drawn by the
threads that have their products. One adapter by itself takes one pass for both; where x is a GLU's product, that pass
makes it again from gate and up and goes on through the GLU: neither product nor dx is written.

Adapters are cut in pieces of at most `MOST_RANK` rows, and dx takes `MOST_PIECES` of them a launch; ranks are padded to
a power of two of at least 16 inside, for tensor cores. Nothing is atomic: the bits are the same every time on one kind
of GPU.

Left out: float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from chronicals.kernels.fused import glu
from chronicals.kernels.fused.glu import activate
from chronicals.kernels.fused.launch import balanced, device_limits
from chronicals.kernels.fused.philox import philox
from chronicals.kernels.glu_matmul import MatmulThenGLU
from chronicals.kernels.lora import LANES, MOST_CALLS, LoRADropout, Part, threshold
from chronicals.kernels.philox import DROPOUT

MOST_RANK, MOST_PIECES, MOST_RANKS = 128, 3, 192  # of a piece; of a launch; padded ranks of a launch
ROWS, STAGES = 64, 3
COLUMNS = 64  # of a tile in forward and for gradients of A alone: as many as a warp group's tensor cores take
DX_COLUMNS = 32  # where dx is made: more of them spill
FLOAT32_ROWS = 16  # whose products are exact, and therefore not tensor cores': right, and slow
WARPS = 4
# programs of a multiprocessor, each with several tiles: both halves of backward, dx alone, the gradients of A alone,
# both halves and a GLU
PROGRAMS, DX_PROGRAMS, A_PROGRAMS, GLU_PROGRAMS = 3, 8, 5, 16

_LANES, _DROPOUT = tl.constexpr(LANES), tl.constexpr(DROPOUT)


@triton.jit
def keeps(
    call: tl.tensor, stream: tl.tensor, counter: tl.tensor, seed: tl.tensor, limit: tl.tensor
) -> tl.tensor:  # fmt: skip
    """The mask (rows, columns) of a tile's calls (rows, columns / LANES); `limit` is the threshold in the upper half of
    a word, as it is compared."""
    zero = call * 0
    r0, r1, r2, r3 = philox(seed, call, zero + stream, zero + counter, zero + _DROPOUT)
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3)).to(tl.uint32, bitcast=True)  # (..., 2, 2), in order
    return tl.reshape(tl.join(words << 16, words) >= limit, (call.shape[0], call.shape[1] * _LANES))


@triton.jit
def _piece(PIECES: tl.tensor, SCALES: tl.tensor, n: tl.tensor, ALIGNED: tl.constexpr) -> tl.tensor:
    """First row of A, rows, stream, the threshold in the upper half of a word, and the scale."""
    at = PIECES + 4 * n
    start, rank = tl.load(at), tl.load(at + 1)
    if ALIGNED:
        start, rank = tl.multiple_of(start, 8), tl.multiple_of(rank, 8)
    return start, rank, tl.load(at + 2), tl.load(at + 3).to(tl.uint32) << 16, tl.load(SCALES + n)


@triton.jit
def _load_a(
    A: tl.tensor, start: tl.tensor, rank: tl.tensor, column: tl.tensor, columns: tl.tensor, a_stride: tl.tensor,
    RANK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    row = tl.arange(0, RANK)[:, None]
    return tl.load(A + (start + row) * a_stride + column, mask=(row < rank) & (column < columns), other=0.0)


@triton.jit
def _store_thin(
    total: tl.tensor, OUT: tl.tensor, stride: tl.tensor, first: tl.tensor, start: tl.tensor, rank: tl.tensor,
    here: tl.tensor,
) -> None:  # fmt: skip
    row, at = tl.arange(0, total.shape[0])[:, None], tl.arange(0, total.shape[1])[None, :]
    OUT += first.to(tl.int64) * stride + start
    tl.store(OUT + row * stride + at, total.to(OUT.dtype.element_ty), mask=here & (at < rank))


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
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,  # pieces begin at multiples of 8
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    piece, first = tl.program_id(0), tl.program_id(1) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    here = row < tokens - first
    seed, counter = tl.load(SEED), tl.load(COUNTER).to(tl.int32)
    start, rank, stream, limit, scale = _piece(PIECES, SCALES, piece, ALIGNED)
    first_call = (first + row) * tl.cdiv(columns, _LANES) + tl.arange(0, COLUMNS // _LANES)[None, :]
    X += first.to(tl.int64) * x_stride
    total = tl.zeros((ROWS, RANK), tl.float32)
    for begin in tl.range(0, columns, COLUMNS, num_stages=STAGES):
        column = begin + tl.arange(0, COLUMNS)[None, :]
        x = tl.load(X + row * x_stride + column, mask=here & (column < columns), other=0.0)
        a = _load_a(A, start, rank, column, columns, a_stride, RANK)
        keep = keeps(first_call + begin // _LANES, stream, counter, seed, limit)
        total = tl.dot(tl.where(keep, x, 0.0).to(x.dtype), tl.trans(a), total, input_precision="ieee")
    total *= scale
    _store_thin(total, OUT, out_stride, first, start, rank, here)
    if COPY is not None:
        _store_thin(total, COPY, copy_stride, first, start, rank, here)


# Tensor cores leave a thread two columns of each eight, of a row and of the eighth behind it. v's rows and A's columns
# are read in another order, so that a thread gets eight columns in a row: those that it has loaded of x and dx, and
# whose masks it draws. Of 16 WARPS rows: (warp, half, 8) in the sum, (half, warp, 8) in the tile; of 32 columns
# (four, thread, two) and (thread, four, two). Hardware that does it otherwise is right too, and slower.


@triton.jit
def _row_in_tile(row: tl.tensor, WARPS: tl.constexpr) -> tl.tensor:
    """Where a row of the sum is in the tile."""
    return row // (16 * WARPS) * (16 * WARPS) + row // 8 % 2 * (8 * WARPS) + row // 16 % WARPS * 8 + row % 8


@triton.jit
def _column_in_tile(column: tl.tensor) -> tl.tensor:
    return column // 32 * 32 + column // 2 % 4 * 8 + column // 8 % 4 * 2 + column % 2


@triton.jit
def _rows_as_summed(tile: tl.tensor, WARPS: tl.constexpr) -> tl.tensor:
    groups: tl.constexpr = tile.shape[0] // (16 * WARPS)
    apart = tl.reshape(tile, (groups, 2, WARPS, 8, tile.shape[1]))
    return tl.reshape(tl.permute(apart, (0, 2, 1, 3, 4)), tile.shape)


@triton.jit
def _as_in_tile(total: tl.tensor, WARPS: tl.constexpr) -> tl.tensor:
    groups: tl.constexpr = total.shape[0] // (16 * WARPS)
    apart = tl.reshape(total, (groups, WARPS, 2, 8, total.shape[1] // 32, 4, 4, 2))
    return tl.reshape(tl.permute(apart, (0, 2, 1, 3, 4, 6, 5, 7)), total.shape)


@triton.jit
def _up(
    d_a: tl.tensor, dx: tl.tensor, x: tl.tensor, a: tl.tensor, v_at: tl.tensor, here: tl.tensor, rstd: tl.tensor,
    piece: tl.tensor, call: tl.tensor, counter: tl.tensor, seed: tl.tensor, RANK: tl.constexpr, WARPS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Adds one piece's shares: of dx where there is an a, and of its A's gradient (columns, ranks), or across, where
    there is an x; the latter without its scale."""
    start, rank, stream, limit, scale = piece
    at = tl.arange(0, RANK)[None, :]
    v = tl.load(v_at + (start + at), mask=here & (at < rank), other=0.0)
    keep = keeps(call, stream, counter, seed, limit)
    if a is not None:
        product = tl.dot(v, a, input_precision="ieee")
        if WARPS:
            product = _as_in_tile(product, WARPS)
        dx = tl.where(keep, dx + product * scale, dx)
    if x is not None:
        if rstd is not None:
            v = (v.to(tl.float32) * rstd).to(v.dtype)
        masked = tl.where(keep, x, 0.0).to(x.dtype)
        if a is not None and WARPS:
            masked = _rows_as_summed(masked, WARPS)
        if x.shape[1] >= 64:  # a warp group's tensor cores make 64 rows of a sum
            d_a = tl.dot(tl.trans(masked), v, d_a, input_precision="ieee")
        else:
            d_a = tl.dot(tl.trans(v), masked, d_a, input_precision="ieee")
    return d_a, dx


@triton.jit
def _store_partial(
    d_a: tl.tensor, PARTIAL: tl.tensor, NORM: tl.tensor, piece: tl.tensor, column: tl.tensor, columns: tl.tensor,
    RANK: tl.constexpr,
) -> None:  # fmt: skip
    start, rank, _, _, scale = piece
    row = tl.arange(0, RANK)[:, None]
    if column.shape[1] >= 64:
        d_a = tl.trans(d_a)
    d_a *= scale
    if NORM is not None:
        d_a *= tl.load(NORM + column, mask=column < columns, other=0.0).to(tl.float32)
    place = ((start + row).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * columns + column
    tl.store(PARTIAL + place, d_a, mask=(row < rank) & (column < columns))


@triton.jit
def lora_dropout_up_kernel(
    DX: tl.tensor,  # (tokens, columns), last stride 1, of any dtype: read, and written where there is no ACTIVATION; or
    # None, for A's gradients alone: a program then has one piece
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
    ACTIVATION: tl.constexpr,  # None: X is x
    N_PIECES: tl.constexpr,  # of a program
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,  # 0: sums are taken as they come
) -> None:
    first_column = tl.program_id(0) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    seed, counter = tl.load(SEED), tl.load(COUNTER).to(tl.int32)
    calls = tl.cdiv(columns, _LANES)
    first_call = row * calls + tl.program_id(0) * (COLUMNS // _LANES) + tl.arange(0, COLUMNS // _LANES)[None, :]
    piece0 = _piece(PIECES, SCALES, tl.program_id(2), ALIGNED)
    piece1 = _piece(PIECES, SCALES, 1 if N_PIECES > 1 else 0, ALIGNED)
    piece2 = _piece(PIECES, SCALES, 2 if N_PIECES > 2 else 0, ALIGNED)
    turn = row
    a0, a1, a2 = None, None, None
    if DX is not None:
        summed = column
        if WARPS:
            summed = first_column + _column_in_tile(tl.arange(0, COLUMNS)[None, :])
            turn = _row_in_tile(row, WARPS)
        a0 = _load_a(A, piece0[0], piece0[1], summed, columns, a_stride, RANK)
        if N_PIECES > 1:
            a1 = _load_a(A, piece1[0], piece1[1], summed, columns, a_stride, RANK)
        if N_PIECES > 2:
            a2 = _load_a(A, piece2[0], piece2[1], summed, columns, a_stride, RANK)
    if COLUMNS >= 64:
        d0 = tl.zeros((COLUMNS, RANK), tl.float32)
    else:
        d0 = tl.zeros((RANK, COLUMNS), tl.float32)
    d1, d2 = d0, d0
    for begin in tl.range(tl.program_id(1) * ROWS, tokens, tl.num_programs(1) * ROWS, num_stages=STAGES):
        first = tl.full((), 0, tl.int64) + begin
        mask = (row < tokens - begin) & (column < columns)
        x, rstd, dx = None, None, 0.0
        call, here = first_call + begin * calls, turn < tokens - begin
        if PARTIAL is not None:
            x_at = (X + first * x_stride) + (row * x_stride + column)
            x = tl.load(x_at, mask=mask, other=0.0)
            if ACTIVATION is not None:
                up = tl.load(x_at + columns, mask=mask, other=0.0).to(tl.float32)
                value, slope = activate(x.to(tl.float32), ACTIVATION)
                x = (value * up).to(x.dtype)
            if RSTD is not None:
                rstd = tl.load(RSTD + first + turn, mask=here, other=0.0)
        if DX is not None:
            out = (DX + first * dx_stride) + (row * dx_stride + column)
            dx = tl.load(out, mask=mask, other=0.0).to(tl.float32)
        v_at = (V + first * v_stride) + turn * v_stride
        d0, dx = _up(d0, dx, x, a0, v_at, here, rstd, piece0, call, counter, seed, RANK, WARPS)
        if N_PIECES > 1:
            d1, dx = _up(d1, dx, x, a1, v_at, here, rstd, piece1, call, counter, seed, RANK, WARPS)
        if N_PIECES > 2:
            d2, dx = _up(d2, dx, x, a2, v_at, here, rstd, piece2, call, counter, seed, RANK, WARPS)
        if DX is not None:
            dx = dx.to(DX.dtype.element_ty)
            if ACTIVATION is None:
                tl.store(out, dx, mask=mask)
            else:
                d = dx.to(tl.float32)
                gate_at = (D_X + first * d_x_stride) + (row * d_x_stride + column)
                tl.store(gate_at, (d * up * slope).to(D_X.dtype.element_ty), mask=mask)
                tl.store(gate_at + columns, (d * value).to(D_X.dtype.element_ty), mask=mask)
    if PARTIAL is not None:
        _store_partial(d0, PARTIAL, NORM, piece0, column, columns, RANK)
        if N_PIECES > 1:
            _store_partial(d1, PARTIAL, NORM, piece1, column, columns, RANK)
        if N_PIECES > 2:
            _store_partial(d2, PARTIAL, NORM, piece2, column, columns, RANK)


class FusedLoRADropout(LoRADropout):
    """As `chronicals.kernels.lora.LoRADropout`: a launch each way; two in backward where there are several adapters,
    and more where ranks are high."""

    passes = MatmulThenGLU(glu.glu_forward, glu.glu_backward)

    def __init__(self, parts: Sequence[Part], p: float, *, seed: int, device: torch.device | str) -> None:
        super().__init__(parts, p, seed=seed, device=device)
        self._seed = torch.tensor([(seed + 2**63) % 2**64 - 2**63], device=device)  # as a signed number
        self._launches = [_Launch(pieces, p, self.factor, device) for pieces in in_launches(parts)]

    def down(self, x: Tensor, a: Tensor, counter: Tensor, *, out: Tensor, copy: Tensor | None = None) -> Tensor:
        tokens, columns = x.shape
        _check(x, a.shape[1], a, counter)
        for thin in (out,) if copy is None else (out, copy):
            assert thin.shape == (tokens, a.shape[0])
            assert thin.stride(1) == 1
        for launch in self._launches if tokens else ():
            rows = FLOAT32_ROWS if x.dtype == torch.float32 else down_rows(tokens, launch.count, x.device)
            lora_dropout_down_kernel[(launch.count, triton.cdiv(tokens, rows))](
                x, a, out, copy, launch.pieces, launch.scales, self._seed, counter,
                tokens, columns, x.stride(0), a.stride(0), out.stride(0), 0 if copy is None else copy.stride(0),
                RANK=launch.rank, ALIGNED=launch.aligned, ROWS=rows, COLUMNS=COLUMNS, STAGES=STAGES, num_warps=WARPS,
            )  # fmt: skip
        return out

    def up_(
        self,
        dx: Tensor | None,
        x: Tensor,
        v: Tensor,
        a: Tensor,
        counter: Tensor,
        *,
        rstd: Tensor | None = None,
        norm: Tensor | None = None,
    ) -> Tensor:
        apart = len(self.parts) > 1 or dx is None
        total = dx.float() if dx is not None and len(self._launches) > 1 else dx  # is rounded once, whoever adds to it
        width, programs = (COLUMNS, A_PROGRAMS) if apart else (DX_COLUMNS, PROGRAMS)
        partials = self._partials(x, a, width, programs, max(launch.count for launch in self._launches) if apart else 1)
        norms = rstd, norm
        for launch in self._launches:
            if apart:
                if total is not None:
                    self._up(launch, total, None, None, v, a, None, counter)
                self._up(launch, None, x, None, v, a, partials, counter, norms)
            else:
                self._up(launch, total, x, None, v, a, partials, counter, norms)
        if dx is not None and total is not None and total is not dx:
            dx.copy_(total)
        return partials

    def up_glu(
        self,
        d: Tensor,
        gate_up: Tensor,
        activation: str,
        v: Tensor,
        a: Tensor,
        counter: Tensor,
        *,
        d_gate_up: Tensor,
    ) -> Tensor:
        if len(self._launches) > 1:  # d is whole behind the last alone
            return super().up_glu(d, gate_up, activation, v, a, counter, d_gate_up=d_gate_up)
        assert d_gate_up.shape == gate_up.shape == (len(d), 2 * d.shape[1])
        assert d_gate_up.dtype == gate_up.dtype and d_gate_up.stride(1) == 1
        partials = self._partials(d, a, DX_COLUMNS, GLU_PROGRAMS, 1)
        self._up(self._launches[0], d, gate_up, d_gate_up, v, a, partials, counter, activation=activation)
        return partials

    def _partials(self, x: Tensor, a: Tensor, width: int, programs: int, pieces: int) -> Tensor:
        tokens, columns = x.shape
        parts = up_parts(tokens, triton.cdiv(columns, width) * pieces, x.device, programs)
        return torch.empty(a.shape[0], parts, columns, dtype=torch.float32, device=x.device)

    def _up(
        self,
        launch: _Launch,
        dx: Tensor | None,
        x: Tensor | None,
        d_x: Tensor | None,
        v: Tensor,
        a: Tensor,
        partials: Tensor | None,
        counter: Tensor,
        norms: tuple[Tensor | None, Tensor | None] = (None, None),
        activation: str | None = None,
    ) -> None:
        """Both halves, or without `x` and `partials` dx alone, or without `dx` the gradients of A alone."""
        tokens, columns = len(v), a.shape[1]
        _check(v, a.shape[0], a, counter)
        if x is not None:
            _check(x, columns * (1 if activation is None else 2), a, counter)
            assert len(x) == tokens
        assert dx is None or (dx.shape == (tokens, columns) and dx.stride(1) == 1)
        for factors, size in zip(norms, (tokens, columns), strict=True):
            assert factors is None or (factors.shape == (size,) and factors.is_contiguous())
        half = v.dtype != torch.float32
        width = COLUMNS if dx is None else DX_COLUMNS
        strips = triton.cdiv(columns, width)
        parts = up_parts(tokens, strips, v.device, DX_PROGRAMS) if partials is None else partials.shape[1]
        pieces, together = (launch.count, 1) if dx is None else (1, launch.count)
        strides = [0 if tensor is None else tensor.stride(0) for tensor in (dx, x, d_x)]
        lora_dropout_up_kernel[(strips, parts, pieces)](
            dx, x, d_x, v, a, *norms, partials, launch.pieces, launch.scales, self._seed, counter,
            tokens, columns, *strides, v.stride(0), a.stride(0),
            ACTIVATION=activation, N_PIECES=together, RANK=launch.rank, ALIGNED=launch.aligned,
            ROWS=ROWS if half else FLOAT32_ROWS, COLUMNS=width, STAGES=STAGES, WARPS=WARPS if half else 0,
            num_warps=WARPS,
        )  # fmt: skip


class _Launch:
    """Pieces that share a launch, and their table on the device."""

    def __init__(self, pieces: Sequence[Part], p: float, factor: float, device: torch.device | str) -> None:
        rows = [(part.start, part.rank, part.stream, threshold(p)) for part in pieces]
        self.pieces = torch.tensor(rows, dtype=torch.int32, device=device)
        self.scales = torch.tensor([part.scale * factor for part in pieces], dtype=torch.float32, device=device)
        self.count, self.rank = len(pieces), padded(max(part.rank for part in pieces))
        self.aligned = all(part.start % 8 == part.rank % 8 == 0 for part in pieces)


def in_launches(parts: Sequence[Part]) -> list[list[Part]]:
    """Pieces of at most `MOST_RANK` rows, together as far as registers go."""
    launches: list[list[Part]] = []
    for part in parts:
        for first in range(0, part.rank, MOST_RANK):
            rank = min(MOST_RANK, part.rank - first)
            piece = replace(part, start=part.start + first, rank=rank)
            together = [*(launches[-1] if launches else ()), piece]
            if not launches or len(together) > MOST_PIECES or ranks(together) > MOST_RANKS:
                launches.append([piece])
            else:
                launches[-1] = together
    return launches


def ranks(pieces: Sequence[Part]) -> int:
    """Rows of sums that a program holds."""
    return len(pieces) * padded(max(piece.rank for piece in pieces))


def padded(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def down_rows(tokens: int, pieces: int, device: torch.device) -> int:
    """Tokens of a program: many, unless multiprocessors would go without."""
    enough = device_limits(device)[0]
    return next((rows for rows in (64, 32) if pieces * triton.cdiv(tokens, rows) >= enough), 16)


def up_parts(tokens: int, strips: int, device: torch.device, programs: int) -> int:
    """Programs that share a strip of columns, each of which leaves a part of the gradients; `programs` of a
    multiprocessor."""
    return balanced(triton.cdiv(tokens, ROWS), max(1, programs * device_limits(device)[0] // strips))


def _check(like: Tensor, width: int, a: Tensor, counter: Tensor) -> None:
    """`like`: (tokens, width), of the dtype of `a`."""
    assert like.shape[1] == width
    assert like.dtype == a.dtype
    assert like.stride(1) == a.stride(1) == 1
    assert counter.dtype == torch.int64 and counter.numel() == 1
    calls = triton.cdiv(a.shape[1], LANES)
    assert len(like) * calls < MOST_CALLS, f"no mask of {len(like)} x {a.shape[1]}"
