"""Dropout of adapters' inputs, fused with the thin matmuls around it: masks live in registers and are never stored.

The masks are those of `dropout_mask` (chronicals/kernels/lora.py), each adapter's its own. What this is short of are
instructions that may run, and warps to fill the waits: Philox is a chain of integer work (docs/math/lora.md counts
it), and sums of several adapters take registers. In forward a program has one adapter: those of a fused projection
read x one behind the other, out of the cache. Backward makes dx of all adapters and the gradients of their A in one
pass, as far as registers go, else in one each; where x is a GLU's product, that pass makes it again from gate and up
and goes on through the GLU: neither product nor dx is written.

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
from torch import Tensor

from chronicals.kernels.fused import glu
from chronicals.kernels.fused.launch import balanced, device_limits
from chronicals.kernels.fused.lora_dropout_kernels import (
    DX_ROWS,
    WARP_COLUMNS,
    lora_dropout_down_kernel,
    lora_dropout_grad_kernel,
    lora_dropout_up_kernel,
)
from chronicals.kernels.glu_matmul import MatmulThenGLU
from chronicals.kernels.lora import LANES, MOST_CALLS, LoRADropout, Part, threshold

MOST_RANK, MOST_PIECES, MOST_RANKS = 128, 3, 192  # of a piece; of a launch; padded ranks of a launch
TOGETHER = 64  # padded ranks of which a program makes dx and the gradients of A
WARPS, STAGES = 4, 3
DX_STAGES = 4  # of 16 bits, where dx is made, but for a GLU, which has more to load
INFINITY = 0x7C00  # as a float16
ROWS, COLUMNS = 64, 64  # of a tile in forward and for gradients of A alone
WIDE_RANK = 64  # up to which tiles of forward may be twice as wide
FLOAT32_ROWS = 16  # of the same, in float32: exact products are not tensor cores', and therefore slow
STRIP = WARP_COLUMNS * WARPS  # columns of a program that makes dx
# programs of a multiprocessor, each with several tiles: for dx alone, for dx and A's gradients, for these alone, and
# where dx goes on through a GLU
PROGRAMS, TOGETHER_PROGRAMS, A_PROGRAMS, GLU_PROGRAMS = 4, 2, 2, 6


class FusedLoRADropout(LoRADropout):
    """As `chronicals.kernels.lora.LoRADropout`: a launch each way, and more where ranks are high."""

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
            rows, width = down_tile(tokens, launch, x.device)
            if x.dtype == torch.float32:
                rows, width = FLOAT32_ROWS, COLUMNS
            lora_dropout_down_kernel[(launch.count, triton.cdiv(tokens, rows))](
                x, a, out, copy, launch.pieces, launch.scales, self._seed, counter,
                tokens, columns, x.stride(0), a.stride(0), out.stride(0), 0 if copy is None else copy.stride(0),
                launch.start,
                **launch.constants(tokens, rows, columns, width), ROWS=rows, COLUMNS=width, STAGES=STAGES,
                num_warps=WARPS,
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
        total = dx.float() if dx is not None and len(self._launches) > 1 else dx  # is rounded once, whoever adds to it
        together = total is not None and all(launch.count * launch.rank <= TOGETHER for launch in self._launches)
        if together:
            partials = _partials(x, a, DX_ROWS, STRIP, TOGETHER_PROGRAMS)
        else:
            partials = _partials(x, a, _rows(x), COLUMNS, A_PROGRAMS)
        for launch in self._launches:
            if total is not None:
                sums = (x, partials, rstd, norm) if together else (None, None, None, None)
                self._up(launch, total, None, v, a, counter, None, *sums)
            if not together:
                self._grads(launch, x, v, a, counter, partials, rstd, norm)
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
        partials = _partials(d, a, DX_ROWS, STRIP, GLU_PROGRAMS)
        self._up(self._launches[0], d, d_gate_up, v, a, counter, activation, gate_up, partials)
        return partials

    def _up(
        self,
        launch: _Launch,
        dx: Tensor,
        d_x: Tensor | None,
        v: Tensor,
        a: Tensor,
        counter: Tensor,
        activation: str | None,
        x: Tensor | None,
        partials: Tensor | None,
        rstd: Tensor | None = None,
        norm: Tensor | None = None,
    ) -> None:
        """dx, and with `x` and `partials` the gradients of A."""
        tokens, columns = dx.shape
        _check(v, a.shape[0], a, counter)
        if x is not None:
            _check(x, columns * (1 if activation is None else 2), a, counter)
        assert a.shape[1] == columns and len(v) == tokens and dx.stride(1) == 1
        _check_norm(rstd, norm, tokens, columns)
        strips = triton.cdiv(columns, STRIP)
        parts = up_parts(tokens, DX_ROWS, strips, dx.device, PROGRAMS) if partials is None else partials.shape[1]
        strides = [0 if tensor is None else tensor.stride(0) for tensor in (dx, x, d_x)]
        stages = DX_STAGES if activation is None and v.element_size() == 2 else STAGES
        lora_dropout_up_kernel[(strips, parts)](
            dx, x, d_x, v, a, rstd, norm, partials, launch.pieces, launch.scales, self._seed, counter,
            tokens, columns, *strides, v.stride(0), a.stride(0), launch.start,
            ACTIVATION=activation, N_PIECES=launch.count, **launch.constants(tokens, DX_ROWS, columns, STRIP),
            STAGES=stages, WARPS=WARPS, num_warps=WARPS,
        )  # fmt: skip

    def _grads(
        self,
        launch: _Launch,
        x: Tensor,
        v: Tensor,
        a: Tensor,
        counter: Tensor,
        partials: Tensor,
        rstd: Tensor | None,
        norm: Tensor | None,
    ) -> None:
        """The gradients of A alone."""
        tokens, columns = x.shape
        _check(x, a.shape[1], a, counter)
        _check(v, a.shape[0], a, counter)
        _check_norm(rstd, norm, tokens, columns)
        rows = _rows(x)
        lora_dropout_grad_kernel[(triton.cdiv(columns, COLUMNS), partials.shape[1])](
            x, v, rstd, norm, partials, launch.pieces, launch.scales, self._seed, counter,
            tokens, columns, x.stride(0), v.stride(0), launch.start,
            N_PIECES=launch.count, **launch.constants(tokens, rows, columns, COLUMNS), ROWS=rows, COLUMNS=COLUMNS,
            STAGES=STAGES, num_warps=WARPS,
        )  # fmt: skip


class _Launch:
    """Pieces that share a launch, and their table on the device."""

    def __init__(self, pieces: Sequence[Part], p: float, factor: float, device: torch.device | str) -> None:
        table = [(part.start, part.rank, part.stream, threshold(p)) for part in pieces]
        self.pieces = torch.tensor(table, dtype=torch.int32, device=device)
        self.scales = torch.tensor([part.scale * factor for part in pieces], dtype=torch.float32, device=device)
        self.count, self.rank = len(pieces), padded(max(part.rank for part in pieces))
        self.aligned = all(part.start % 8 == part.rank % 8 == 0 for part in pieces)
        self.start = pieces[0].start
        rows = [(self.start + n * self.rank, self.rank) for n in range(self.count)]
        self.full = rows == [(part.start, part.rank) for part in pieces]
        self.pairs = takes_pairs(torch.device(device), p)

    def constants(self, tokens: int, rows: int, columns: int, width: int) -> dict[str, int | bool]:
        """Of a kernel whose tiles have `rows` and `width`."""
        whole = self.full and tokens % rows == columns % width == 0
        return {"RANK": self.rank, "ALIGNED": self.aligned, "WHOLE": whole, "PAIRS": self.pairs}


def takes_pairs(device: torch.device, p: float) -> bool:
    """Whether random bits are compared in pairs, as numbers of 16 bits: where CUDA's instructions are; not with NaN."""
    return device.type == "cuda" and torch.version.hip is None and threshold(p) <= INFINITY


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


def down_tile(tokens: int, launch: _Launch, device: torch.device) -> tuple[int, int]:
    """Tokens of a program and columns of a tile: many tokens, unless multiprocessors would go without. One adapter
    takes wider tiles of fewer, where they have room: it has few programs."""
    enough = device_limits(device)[0]
    most = (64, 32) if launch.count > 1 or launch.rank > WIDE_RANK else (32,)
    rows = next((rows for rows in most if launch.count * triton.cdiv(tokens, rows) >= enough), 16)
    return rows, 2 * COLUMNS if most == (32,) else COLUMNS


def up_parts(tokens: int, rows: int, strips: int, device: torch.device, programs: int) -> int:
    """Programs that share a strip of columns, in tiles of `rows`, each of which leaves a part of the gradients;
    `programs` of a multiprocessor."""
    return balanced(triton.cdiv(tokens, rows), max(1, programs * device_limits(device)[0] // strips))


def _partials(x: Tensor, a: Tensor, rows: int, width: int, programs: int) -> Tensor:
    """Of A's gradient, for tiles of `rows` and `width`."""
    tokens, columns = x.shape
    parts = up_parts(tokens, rows, triton.cdiv(columns, width), x.device, programs)
    return torch.empty(a.shape[0], parts, columns, dtype=torch.float32, device=x.device)


def _rows(x: Tensor) -> int:
    return FLOAT32_ROWS if x.dtype == torch.float32 else ROWS


def _check_norm(rstd: Tensor | None, norm: Tensor | None, tokens: int, columns: int) -> None:
    for factors, size in ((rstd, tokens), (norm, columns)):
        assert factors is None or (factors.shape == (size,) and factors.is_contiguous())


def _check(like: Tensor, width: int, a: Tensor, counter: Tensor) -> None:
    """`like`: (tokens, width), of the dtype of `a`."""
    assert like.shape[1] == width
    assert like.dtype == a.dtype
    assert like.stride(1) == a.stride(1) == 1
    assert counter.dtype == torch.int64 and counter.numel() == 1
    calls = triton.cdiv(a.shape[1], LANES)
    assert len(like) * calls < MOST_CALLS, f"no mask of {len(like)} x {a.shape[1]}"
