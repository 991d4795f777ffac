"""Dropout of adapters' inputs, fused with the thin matmuls around it: masks live in registers and are never stored.

The masks are those of `dropout_mask` (chronicals/kernels/lora.py), each adapter's its own. Forward reads x once for
all adapters of a fused projection, backward reads x and dx once: dx takes what comes back through the adapters, and the
gradients of all A come out in parts, from one run of Philox each. Where x is a GLU's product, backward makes it again
from gate and up and goes on through the GLU: neither product nor dx is written. Integer instructions are what this is
short of on fast memory (docs/math/lora.md counts them), so a call of Philox serves eight consecutive elements, and they
are those that a thread has loaded.

Adapters go through a launch in pieces of at most `MOST_RANK` rows and `MOST_PIECES` pieces; ranks are padded to a power
of two of at least 16 inside, for tensor cores. Nothing is atomic: the bits are the same every time on one kind of GPU.

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
DOWN_COLUMNS, UP_ROWS, UP_COLUMNS, STAGES = 64, 64, 32, 3
FLOAT32_ROWS = 16  # whose products are exact, and therefore not tensor cores': right, and slow
PROGRAMS = 3  # of a multiprocessor, in backward
# through a GLU a thread of four warps would hold 214 registers; of eight, two programs fit, and several take turns
GLU_WARPS, GLU_PROGRAMS = 8, 16

_LANES, _DROPOUT = tl.constexpr(LANES), tl.constexpr(DROPOUT)


@triton.jit
def draw(call: tl.tensor, stream: tl.tensor, counter: tl.tensor, seed: tl.tensor) -> tl.tensor:
    """Of a tile's calls (rows, columns / LANES) four words each; an element is kept whose half is at least `limit`."""
    zero = call * 0
    r0, r1, r2, r3 = philox(seed, call, zero + stream, zero + counter, zero + _DROPOUT)
    return (
        r0.to(tl.uint32, bitcast=True),
        r1.to(tl.uint32, bitcast=True),
        r2.to(tl.uint32, bitcast=True),
        r3.to(tl.uint32, bitcast=True),
    )


@triton.jit
def masked(x: tl.tensor, r0: tl.tensor, r1: tl.tensor, r2: tl.tensor, r3: tl.tensor, limit: tl.tensor) -> tl.tensor:
    """A tile of x where it is kept, zero elsewhere. What is compared is the upper half of a word."""
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # (..., 2, 2), in order
    keep = tl.reshape(tl.join(words << 16, words) >= limit, x.shape)
    return tl.where(keep, x, 0.0).to(x.dtype)


@triton.jit
def _bit(word: tl.tensor, limit: tl.tensor, LANE: tl.constexpr) -> tl.tensor:
    return tl.where(word << 16 >= limit, 1 << LANE, 0) | tl.where(word >= limit, 2 << LANE, 0)


@triton.jit
def _row_masks(r0: tl.tensor, r1: tl.tensor, r2: tl.tensor, r3: tl.tensor, limit: tl.tensor) -> tl.tensor:
    """Of 32 columns, the mask of a row in one word: (rows, 1) int32."""
    bits = _bit(r0, limit, 0) | _bit(r1, limit, 2) | _bit(r2, limit, 4) | _bit(r3, limit, 6)
    return tl.sum(bits << (8 * tl.arange(0, 4)[None, :]), axis=1)[:, None]


@triton.jit
def _piece(PIECES: tl.tensor, n: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """First row of A, rows, stream, and the threshold in the upper half of a word."""
    at = PIECES + 4 * n
    start, rank = tl.load(at), tl.load(at + 1)
    if ALIGNED:
        start, rank = tl.multiple_of(start, 8), tl.multiple_of(rank, 8)
    return start, rank, tl.load(at + 2), tl.load(at + 3).to(tl.uint32) << 16


@triton.jit
def _load_a(
    A: tl.tensor, start: tl.tensor, rank: tl.tensor, column: tl.tensor, columns: tl.tensor, a_stride: tl.tensor,
    RANK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    row = tl.arange(0, RANK)[:, None]
    return tl.load(A + (start + row) * a_stride + column, mask=(row < rank) & (column < columns), other=0.0)


@triton.jit
def _down(
    total: tl.tensor, x: tl.tensor, A: tl.tensor, start: tl.tensor, rank: tl.tensor, stream: tl.tensor,
    limit: tl.tensor, call: tl.tensor, column: tl.tensor, counter: tl.tensor, seed: tl.tensor, columns: tl.tensor,
    a_stride: tl.tensor, RANK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Adds the product of a tile of x, masked for one piece, and the piece's A."""
    a = _load_a(A, start, rank, column, columns, a_stride, RANK)
    r0, r1, r2, r3 = draw(call, stream, counter, seed)
    return tl.dot(masked(x, r0, r1, r2, r3, limit), tl.trans(a), total, input_precision="ieee")


@triton.jit
def _store_down(
    total: tl.tensor, OUT: tl.tensor, start: tl.tensor, rank: tl.tensor, token: tl.tensor, tokens: tl.tensor,
    out_stride: tl.tensor, RANK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.arange(0, RANK)[None, :]
    out = OUT + token.to(tl.int64) * out_stride + start + row
    tl.store(out, total.to(OUT.dtype.element_ty), mask=(token < tokens) & (row < rank))


@triton.jit
def lora_dropout_down_kernel(
    X: tl.tensor,  # (tokens, columns), last stride 1
    A: tl.tensor,  # (ranks, columns), last stride 1
    OUT: tl.tensor,  # (tokens, ranks), last stride 1
    PIECES: tl.tensor,  # (pieces, 4) int32: first row of A, rows, stream, threshold
    SCALES: tl.tensor,  # (pieces,) float32
    SEED: tl.tensor,  # (1,) int64
    COUNTER: tl.tensor,  # (1,) int64
    tokens: tl.tensor,
    columns: tl.tensor,
    x_stride: tl.tensor,
    a_stride: tl.tensor,
    out_stride: tl.tensor,
    N_PIECES: tl.constexpr,
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,  # pieces begin at multiples of 8
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    seed, counter = tl.load(SEED), tl.load(COUNTER).to(tl.int32)
    start0, rank0, stream0, limit0 = _piece(PIECES, 0, ALIGNED)
    start1, rank1, stream1, limit1 = _piece(PIECES, 1 if N_PIECES > 1 else 0, ALIGNED)
    start2, rank2, stream2, limit2 = _piece(PIECES, 2 if N_PIECES > 2 else 0, ALIGNED)
    first_call = token * tl.cdiv(columns, _LANES) + tl.arange(0, COLUMNS // _LANES)[None, :]
    t0 = tl.zeros((ROWS, RANK), tl.float32)
    t1, t2 = t0, t0
    for begin in tl.range(0, columns, COLUMNS, num_stages=STAGES):
        column = begin + tl.arange(0, COLUMNS)[None, :]
        mask = (token < tokens) & (column < columns)
        x = tl.load(X + token.to(tl.int64) * x_stride + column, mask=mask, other=0.0)
        call = first_call + begin // _LANES
        t0 = _down(t0, x, A, start0, rank0, stream0, limit0, call, column, counter, seed, columns, a_stride, RANK)
        if N_PIECES > 1:
            t1 = _down(t1, x, A, start1, rank1, stream1, limit1, call, column, counter, seed, columns, a_stride, RANK)
        if N_PIECES > 2:
            t2 = _down(t2, x, A, start2, rank2, stream2, limit2, call, column, counter, seed, columns, a_stride, RANK)
    _store_down(t0 * tl.load(SCALES), OUT, start0, rank0, token, tokens, out_stride, RANK)
    if N_PIECES > 1:
        _store_down(t1 * tl.load(SCALES + 1), OUT, start1, rank1, token, tokens, out_stride, RANK)
    if N_PIECES > 2:
        _store_down(t2 * tl.load(SCALES + 2), OUT, start2, rank2, token, tokens, out_stride, RANK)


@triton.jit
def _up(
    d_a: tl.tensor, dx: tl.tensor, x: tl.tensor, a: tl.tensor, U: tl.tensor, start: tl.tensor, rank: tl.tensor,
    stream: tl.tensor, limit: tl.tensor, call: tl.tensor, token: tl.tensor, tokens: tl.tensor, counter: tl.tensor,
    seed: tl.tensor, u_stride: tl.tensor, RANK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Adds one piece's shares: of its A's gradient and of dx, both times the probability of keeping."""
    row = tl.arange(0, RANK)[None, :]
    u = tl.load(U + token.to(tl.int64) * u_stride + start + row, mask=(token < tokens) & (row < rank), other=0.0)
    r0, r1, r2, r3 = draw(call, stream, counter, seed)
    d_a = tl.dot(tl.trans(u), masked(x, r0, r1, r2, r3, limit), d_a, input_precision="ieee")
    # tensor cores leave this product to other threads than those that drew the mask: a word a row tells them
    product, word = tl.dot(u, a, input_precision="ieee"), _row_masks(r0, r1, r2, r3, limit)
    keep = (word >> tl.arange(0, x.shape[1])[None, :] & 1) != 0
    return d_a, dx + tl.where(keep, product, 0.0)


@triton.jit
def _store_partial(
    d_a: tl.tensor, PARTIAL: tl.tensor, start: tl.tensor, rank: tl.tensor, column: tl.tensor, columns: tl.tensor,
    RANK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.arange(0, RANK)[:, None]
    place = ((start + row).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * columns + column
    tl.store(PARTIAL + place, d_a, mask=(row < rank) & (column < columns))


@triton.jit
def lora_dropout_up_kernel(
    DX: tl.tensor,  # (tokens, columns), last stride 1, of any dtype: read, and written where there is no ACTIVATION
    X: tl.tensor,  # (tokens, columns), last stride 1; with an ACTIVATION (tokens, 2 columns): gate, then up
    D_X: tl.tensor,  # with an ACTIVATION: of the shape of X, may be X, the gradient of gate and up; else None
    U: tl.tensor,  # (tokens, ranks), last stride 1
    A: tl.tensor,  # (ranks, columns), last stride 1
    PARTIAL: tl.tensor,  # (ranks, parts, columns) float32: of A's gradient
    PIECES: tl.tensor,  # (pieces, 4) int32: first row of A, rows, stream, threshold
    SEED: tl.tensor,  # (1,) int64
    COUNTER: tl.tensor,  # (1,) int64
    factor: tl.tensor,  # 1 / the probability of keeping
    tokens: tl.tensor,
    columns: tl.tensor,
    dx_stride: tl.tensor,
    x_stride: tl.tensor,
    d_x_stride: tl.tensor,
    u_stride: tl.tensor,
    a_stride: tl.tensor,
    ACTIVATION: tl.constexpr,  # None: X is x
    N_PIECES: tl.constexpr,
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # 32
    STAGES: tl.constexpr,
) -> None:
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    seed, counter = tl.load(SEED), tl.load(COUNTER).to(tl.int32)
    first_call = tl.program_id(0) * (COLUMNS // _LANES) + tl.arange(0, COLUMNS // _LANES)[None, :]
    calls = tl.cdiv(columns, _LANES)
    start0, rank0, stream0, limit0 = _piece(PIECES, 0, ALIGNED)
    start1, rank1, stream1, limit1 = _piece(PIECES, 1 if N_PIECES > 1 else 0, ALIGNED)
    start2, rank2, stream2, limit2 = _piece(PIECES, 2 if N_PIECES > 2 else 0, ALIGNED)
    a0 = _load_a(A, start0, rank0, column, columns, a_stride, RANK)
    a1, a2 = a0, a0
    if N_PIECES > 1:
        a1 = _load_a(A, start1, rank1, column, columns, a_stride, RANK)
    if N_PIECES > 2:
        a2 = _load_a(A, start2, rank2, column, columns, a_stride, RANK)
    d0 = tl.zeros((RANK, COLUMNS), tl.float32)
    d1, d2 = d0, d0
    for begin in tl.range(tl.program_id(1) * ROWS, tokens, tl.num_programs(1) * ROWS, num_stages=STAGES):
        token = begin + tl.arange(0, ROWS)[:, None]
        mask = (token < tokens) & (column < columns)
        x_at = X + token.to(tl.int64) * x_stride + column
        x = tl.load(x_at, mask=mask, other=0.0)
        if ACTIVATION is not None:
            up = tl.load(x_at + columns, mask=mask, other=0.0).to(tl.float32)
            value, slope = activate(x.to(tl.float32), ACTIVATION)
            x = (value * up).to(x.dtype)
        out = DX + token.to(tl.int64) * dx_stride + column
        given = tl.load(out, mask=mask, other=0.0).to(tl.float32)
        call = token * calls + first_call
        dx = tl.zeros((ROWS, COLUMNS), tl.float32)
        d0, dx = _up(
            d0, dx, x, a0, U, start0, rank0, stream0, limit0, call, token, tokens, counter, seed, u_stride, RANK
        )  # fmt: skip
        if N_PIECES > 1:
            d1, dx = _up(
                d1, dx, x, a1, U, start1, rank1, stream1, limit1, call, token, tokens, counter, seed, u_stride, RANK
            )  # fmt: skip
        if N_PIECES > 2:
            d2, dx = _up(
                d2, dx, x, a2, U, start2, rank2, stream2, limit2, call, token, tokens, counter, seed, u_stride, RANK
            )  # fmt: skip
        dx = (given + dx * factor).to(DX.dtype.element_ty)
        if ACTIVATION is None:
            tl.store(out, dx, mask=mask)
        else:
            d = dx.to(tl.float32)
            gate_at = D_X + token.to(tl.int64) * d_x_stride + column
            tl.store(gate_at, (d * up * slope).to(D_X.dtype.element_ty), mask=mask)
            tl.store(gate_at + columns, (d * value).to(D_X.dtype.element_ty), mask=mask)
    _store_partial(d0 * factor, PARTIAL, start0, rank0, column, columns, RANK)
    if N_PIECES > 1:
        _store_partial(d1 * factor, PARTIAL, start1, rank1, column, columns, RANK)
    if N_PIECES > 2:
        _store_partial(d2 * factor, PARTIAL, start2, rank2, column, columns, RANK)


class FusedLoRADropout(LoRADropout):
    """As `chronicals.kernels.lora.LoRADropout`: a launch each way, or a few where ranks are high."""

    passes = MatmulThenGLU(glu.glu_forward, glu.glu_backward)

    def __init__(self, parts: Sequence[Part], p: float, *, seed: int, device: torch.device | str) -> None:
        super().__init__(parts, p, seed=seed, device=device)
        self._seed = torch.tensor([(seed + 2**63) % 2**64 - 2**63], device=device)  # as a signed number
        self._launches = [_Launch(pieces, p, self.factor, device) for pieces in in_launches(parts)]

    def down(self, x: Tensor, a: Tensor, counter: Tensor, *, out: Tensor) -> Tensor:
        tokens, columns = x.shape
        _check(x, x, a, counter)
        assert out.shape == (tokens, a.shape[0])
        assert out.stride(1) == 1
        rows = FLOAT32_ROWS if x.dtype == torch.float32 else down_rows(tokens, x.device)
        for launch in self._launches if tokens else ():
            lora_dropout_down_kernel[(triton.cdiv(tokens, rows),)](
                x, a, out, launch.pieces, launch.scales, self._seed, counter,
                tokens, columns, x.stride(0), a.stride(0), out.stride(0),
                N_PIECES=launch.count, RANK=launch.rank, ALIGNED=launch.aligned,
                ROWS=rows, COLUMNS=DOWN_COLUMNS, STAGES=STAGES, num_warps=launch.warps,
            )  # fmt: skip
        return out

    def up_(self, dx: Tensor, x: Tensor, u: Tensor, a: Tensor, counter: Tensor) -> Tensor:
        assert dx.shape == x.shape
        partials = self._partials(x, a, PROGRAMS)
        total = dx.float() if len(self._launches) > 1 else dx  # is rounded once, however many add to it
        for launch in self._launches:
            self._up(launch, total, x, None, u, a, partials, counter, None)
        if total is not dx:
            dx.copy_(total)
        return partials

    def up_glu(
        self,
        d: Tensor,
        gate_up: Tensor,
        activation: str,
        u: Tensor,
        a: Tensor,
        counter: Tensor,
        *,
        d_gate_up: Tensor,
    ) -> Tensor:
        if len(self._launches) > 1:  # d is whole behind the last alone
            return super().up_glu(d, gate_up, activation, u, a, counter, d_gate_up=d_gate_up)
        assert d_gate_up.shape == gate_up.shape == (len(d), 2 * d.shape[1])
        assert d_gate_up.dtype == gate_up.dtype and d_gate_up.stride(1) == 1
        partials = self._partials(d, a, GLU_PROGRAMS)
        self._up(self._launches[0], d, gate_up, d_gate_up, u, a, partials, counter, activation)
        return partials

    def _partials(self, x: Tensor, a: Tensor, programs: int) -> Tensor:
        tokens, columns = x.shape
        parts = up_parts(tokens, columns, x.device, programs)
        return torch.empty(a.shape[0], parts, columns, dtype=torch.float32, device=x.device)

    def _up(
        self,
        launch: _Launch,
        dx: Tensor,
        x: Tensor,
        d_x: Tensor | None,
        u: Tensor,
        a: Tensor,
        partials: Tensor,
        counter: Tensor,
        activation: str | None,
    ) -> None:
        tokens, columns = dx.shape
        _check(dx, x, a, counter)
        assert u.shape == (tokens, a.shape[0])
        assert u.dtype == x.dtype
        assert dx.stride(1) == u.stride(1) == 1
        rows = FLOAT32_ROWS if x.dtype == torch.float32 else UP_ROWS
        lora_dropout_up_kernel[(triton.cdiv(columns, UP_COLUMNS), partials.shape[1])](
            dx, x, d_x, u, a, partials, launch.pieces, self._seed, counter, self.factor,
            tokens, columns, dx.stride(0), x.stride(0), 0 if d_x is None else d_x.stride(0), u.stride(0), a.stride(0),
            ACTIVATION=activation, N_PIECES=launch.count, RANK=launch.rank, ALIGNED=launch.aligned,
            ROWS=rows, COLUMNS=UP_COLUMNS, STAGES=STAGES, num_warps=GLU_WARPS if activation else launch.warps,
        )  # fmt: skip


class _Launch:
    """Pieces that share a launch, and their table on the device."""

    def __init__(self, pieces: Sequence[Part], p: float, factor: float, device: torch.device | str) -> None:
        rows = [(part.start, part.rank, part.stream, threshold(p)) for part in pieces]
        self.pieces = torch.tensor(rows, dtype=torch.int32, device=device)
        self.scales = torch.tensor([part.scale * factor for part in pieces], dtype=torch.float32, device=device)
        self.count, self.rank = len(pieces), padded(max(part.rank for part in pieces))
        self.aligned = all(part.start % 8 == part.rank % 8 == 0 for part in pieces)
        self.warps = warps(self.rank)


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


def warps(rank: int) -> int:
    return 4 if rank <= 32 else 8


def down_rows(tokens: int, device: torch.device) -> int:
    """Tokens of a program: many, unless multiprocessors would go without."""
    return next((rows for rows in (64, 32) if triton.cdiv(tokens, rows) >= device_limits(device)[0]), 16)


def up_parts(tokens: int, columns: int, device: torch.device, programs: int) -> int:
    """Programs that share a strip of columns, each of which leaves a part of the gradients; `programs` of a
    multiprocessor."""
    most = programs * device_limits(device)[0] // triton.cdiv(columns, UP_COLUMNS)
    return balanced(triton.cdiv(tokens, UP_ROWS), max(1, most))


def _check(like: Tensor, x: Tensor, a: Tensor, counter: Tensor) -> None:
    """`like`: of the shape of what is masked."""
    tokens, columns = like.shape
    assert len(x) == tokens
    assert a.shape[1] == columns
    assert x.dtype == a.dtype
    assert x.stride(1) == a.stride(1) == 1
    assert counter.dtype == torch.int64 and counter.numel() == 1
    assert tokens * triton.cdiv(columns, LANES) < MOST_CALLS, f"no mask of {tokens} x {columns}"
