"""DoRA on the GPU: the scales of all targets by one launch, and two passes over outputs and their gradients.

The math is that of `chronicals/kernels/dora.py`. A row's norm needs the whole row of W, so the launch reads each
adapted weight once, makes a tile of W + s B A in registers, on tensor cores, and keeps its sum of squares; |W|^2 kept
beside would save nothing of it, as W A^T reads W too, and would cancel where B A takes W back. Backward reads dy and z
and writes dz, over one of them if wanted; the magnitude's gradient it leaves in parts, as `column_partials` a bias's.

A GLU behind the scales goes through with them, so that gate and up are read once.

Bytes: W once a micro-batch; y read and written; dy and z read, dz written. Left out: float64; the GLU's gradient and
dz in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from chronicals.kernels.dora import DoRARows
from chronicals.kernels.fused.column_sums import COLUMNS, KEPT, ROWS, STAGES, THREADS, column_parts
from chronicals.kernels.fused.glu import ACTIVATIONS, FORWARD, activate

NORM_ROWS, NORM_COLUMNS, NORM_RANK, NORM_STAGES, NORM_WARPS = 64, 32, 32, 2, 4
SCALE_ROWS, SCALE_COLUMNS, SCALE_THREADS = 4, 1024, 128  # of a tile: 2 KB of a row, and a thread's columns in each row
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
FIELDS = 11  # of a target in the table
_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def dora_scales_kernel(
    # (targets, FIELDS) int64: addresses of W, A, B, m, c, 1 / norm; N, K, r; row strides of W and A, and B's is r
    TARGETS: tl.tensor,
    SCALINGS: tl.tensor,  # (targets,) float32
    TILES: tl.tensor,  # (programs, 2) int32: target, first row
    DTYPE: tl.constexpr,
    MAGNITUDE_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,  # rows of W, A and B begin at multiples of 16 bytes, and are such multiples long
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    target, first = tl.load(TILES + 2 * tl.program_id(0)), tl.load(TILES + 2 * tl.program_id(0) + 1)
    table = TARGETS + _FIELDS * target.to(tl.int64)
    rows, columns, rank = tl.load(table + 6).to(tl.int32), tl.load(table + 7).to(tl.int32), tl.load(table + 8)
    w_stride, a_stride, rank = tl.load(table + 9), tl.load(table + 10), rank.to(tl.int32)
    w = tl.load(table).to(tl.pointer_type(DTYPE))
    a = tl.load(table + 1).to(tl.pointer_type(DTYPE))
    b = tl.load(table + 2).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        w, a, b = tl.multiple_of(w, 16), tl.multiple_of(a, 16), tl.multiple_of(b, 16)
        columns, rank = tl.multiple_of(columns, 8), tl.multiple_of(rank, 8)
        w_stride, a_stride = tl.multiple_of(w_stride, 8), tl.multiple_of(a_stride, 8)
    row = first + tl.arange(0, ROWS)
    scaling = tl.load(SCALINGS + target)
    squares = tl.zeros((ROWS,), tl.float32)
    for begin in tl.range(0, columns, COLUMNS, num_stages=STAGES):
        column = begin + tl.arange(0, COLUMNS)[None, :]
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for low in range(0, rank, RANK):
            inner = low + tl.arange(0, RANK)
            left = tl.load(
                b + row[:, None].to(tl.int64) * rank + inner[None, :],
                mask=(row[:, None] < rows) & (inner[None, :] < rank),
                other=0.0,
            )
            right = tl.load(
                a + inner[:, None] * a_stride + column, mask=(inner[:, None] < rank) & (column < columns), other=0.0
            )
            product = tl.dot(left, right, product, input_precision="ieee")
        mask = (row[:, None] < rows) & (column < columns)
        adapted = tl.load(w + row[:, None] * w_stride + column, mask=mask, other=0.0).to(tl.float32) + scaling * product
        squares += tl.sum(adapted * adapted, axis=1)
    norm = tl.sqrt_rn(squares).to(MAGNITUDE_DTYPE).to(tl.float32)
    magnitude = tl.load(tl.load(table + 3).to(tl.pointer_type(MAGNITUDE_DTYPE)) + row, mask=row < rows, other=0.0)
    inverse = 1 / norm
    tl.store(tl.load(table + 4).to(tl.pointer_type(tl.float32)) + row, magnitude.to(tl.float32) * inverse, row < rows)
    tl.store(tl.load(table + 5).to(tl.pointer_type(tl.float32)) + row, inverse, row < rows)


@triton.jit
def scale_columns_kernel(
    Y: tl.tensor,  # (rows, columns), last stride 1
    C: tl.tensor,  # (columns,) float32
    BIAS: tl.tensor,  # (columns,) or None
    rows: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    strips = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // strips) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % strips) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < columns)
    place = Y + row.to(tl.int64) * stride + column
    y = tl.load(place, mask=mask, other=0.0).to(tl.float32) * tl.load(C + column, mask=column < columns, other=0.0)
    if BIAS is not None:
        y += tl.load(BIAS + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(place, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _scaled(
    place: tl.tensor, C: tl.tensor, BIAS: tl.tensor, column: tl.tensor, mask: tl.tensor
) -> tl.tensor:  # fmt: skip
    """What lies there times its column's scale: rounded, stored and returned in float32."""
    y = tl.load(place, mask=mask, other=0.0).to(tl.float32) * tl.load(C + column, mask=mask, other=0.0)
    if BIAS is not None:
        y += tl.load(BIAS + column, mask=mask, other=0.0).to(tl.float32)
    rounded = y.to(place.dtype.element_ty)
    tl.store(place, rounded, mask=mask)
    return rounded.to(tl.float32)


@triton.jit
def scaled_glu_forward_kernel(
    GATE_UP: tl.tensor,  # (T, 2 width): gate, then up; last stride 1
    C: tl.tensor,  # (2 width,) float32
    BIAS: tl.tensor,  # (2 width,) or None
    OUT: tl.tensor,  # (T, width), last stride 1
    width: tl.tensor,
    gate_up_stride: tl.tensor,
    out_stride: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    place = GATE_UP + row * gate_up_stride + column
    gate = _scaled(place, C, BIAS, column, mask)
    up = _scaled(place + width, C, BIAS, column + width, mask)
    value, _ = activate(gate, ACTIVATION)
    tl.store(OUT + row * out_stride + column, (value * up).to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def dora_backward_kernel(
    D: tl.tensor,  # (rows, columns), last stride 1
    Z: tl.tensor,  # (rows, columns), last stride 1
    C: tl.tensor,  # (columns,) float32
    FACTOR: tl.tensor,  # (columns,) float32
    BIAS: tl.tensor,  # (columns,) or None
    OUT: tl.tensor,  # (rows, columns), last stride 1; may be D or Z
    PARTIAL: tl.tensor,  # (parts, columns) float32
    rows: tl.tensor,
    columns: tl.tensor,
    d_stride: tl.tensor,
    z_stride: tl.tensor,
    out_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEPT: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    strips = tl.cdiv(columns, COLUMNS)
    part, parts = tl.program_id(0) // strips, tl.num_programs(0) // strips
    column = (tl.program_id(0) % strips) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    c = tl.load(C + column, mask=column < columns, other=0.0)
    bias = tl.zeros((1, COLUMNS), tl.float32)
    if BIAS is not None:
        bias = tl.load(BIAS + column, mask=column < columns, other=0.0).to(tl.float32)
    total = tl.zeros((KEPT, COLUMNS), tl.float32)
    for start in tl.range(part * ROWS, rows, parts * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & (column < columns)
        d = tl.load(D + row.to(tl.int64) * d_stride + column, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(Z + row.to(tl.int64) * z_stride + column, mask=mask, other=0.0).to(tl.float32)
        products = d * (z - bias)
        total += tl.sum(products, axis=0, keep_dims=True) if KEPT == 1 else products
        tl.store(OUT + row.to(tl.int64) * out_stride + column, (d * c).to(OUT.dtype.element_ty), mask=mask)
    factor = tl.load(FACTOR + column, mask=column < columns, other=0.0)
    sums = tl.sum(total, axis=0, keep_dims=True) * factor
    tl.store(PARTIAL + part.to(tl.int64) * columns + column, sums, mask=column < columns)


def dora_scales(targets: Sequence[DoRARows]) -> Callable[[], None]:
    """As `chronicals.kernels.dora.dora_scales`; a call of the plan is one launch, however many targets it has."""
    if not targets:
        return lambda: None
    like, held = targets[0], list(targets)  # addresses alone keep no memory alive
    device, fields, tiles = like.weight.device, [], []
    for i, rows in enumerate(targets):
        _check(rows, like)
        tensors = (rows.weight, rows.a, rows.b, rows.magnitude, rows.c, rows.inverse_norm)
        (n, k), rank = rows.weight.shape, len(rows.a)
        fields.append([*(t.data_ptr() for t in tensors), n, k, rank, rows.weight.stride(0), rows.a.stride(0)])
        tiles.append(torch.cartesian_prod(torch.tensor([i]), torch.arange(0, n, NORM_ROWS)))
    table = torch.tensor(fields, dtype=torch.int64, device=device)
    scalings = torch.tensor([rows.scaling for rows in targets], dtype=torch.float32, device=device)
    programs = torch.cat(tiles).int().to(device)
    aligned = all(_aligned(t) for rows in targets for t in (rows.weight, rows.a, rows.b))

    def write() -> None:
        assert held
        dora_scales_kernel[(len(programs),)](
            table, scalings, programs,
            DTYPE=TRITON_DTYPES[like.weight.dtype], MAGNITUDE_DTYPE=TRITON_DTYPES[like.magnitude.dtype],
            ALIGNED=aligned, ROWS=NORM_ROWS, COLUMNS=NORM_COLUMNS, RANK=NORM_RANK, STAGES=NORM_STAGES,
            num_warps=NORM_WARPS,
        )  # fmt: skip

    return write


def scale_columns_(y: Tensor, c: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `chronicals.kernels.dora.scale_columns_`."""
    rows, columns = y.shape
    assert y.stride(1) == 1 or columns == 1
    assert c.dtype == torch.float32 and c.shape == (columns,) and c.is_contiguous()
    assert bias is None or (bias.shape == (columns,) and bias.is_contiguous())
    programs = triton.cdiv(rows, SCALE_ROWS) * triton.cdiv(columns, SCALE_COLUMNS)
    if programs:
        scale_columns_kernel[(programs,)](
            y, c, bias, rows, columns, y.stride(0),
            ROWS=SCALE_ROWS, COLUMNS=SCALE_COLUMNS, num_warps=_warps(SCALE_THREADS),
        )  # fmt: skip
    return y


def scaled_glu_forward_(
    gate_up: Tensor, c: Tensor, bias: Tensor | None, activation: str, *, out: Tensor | None = None
) -> Tensor:
    """As `chronicals.kernels.dora.scaled_glu_forward_`: a pass over gate and up less."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, width) if out is None else out
    assert activation in ACTIVATIONS and out.shape == (tokens, width)
    assert gate_up.stride(1) == out.stride(1) == 1
    assert c.dtype == torch.float32 and c.shape == (2 * width,) and c.is_contiguous()
    assert bias is None or (bias.shape == c.shape and bias.is_contiguous())
    if out.numel():
        scaled_glu_forward_kernel[(tokens * triton.cdiv(width, FORWARD.block),)](
            gate_up, c, bias, out, width, gate_up.stride(0), out.stride(0),
            ACTIVATION=activation, BLOCK=FORWARD.block, num_warps=FORWARD.warps,
        )  # fmt: skip
    return out


def dora_backward(
    d: Tensor,
    z: Tensor,
    c: Tensor,
    factor: Tensor,
    *,
    out: Tensor,
    bias: Tensor | None = None,
    partial: Tensor | None = None,
) -> Tensor:
    """As `chronicals.kernels.dora.dora_backward`; parts as `column_parts` says."""
    rows, columns = d.shape
    parts = column_parts(rows, columns, d.device)
    partial = torch.empty(parts, columns, dtype=torch.float32, device=d.device) if partial is None else partial
    assert partial.shape == (parts, columns), f"{tuple(partial.shape)} is not ({parts}, {columns})"
    assert partial.dtype == torch.float32 and partial.is_contiguous()
    assert z.shape == out.shape == d.shape and z.dtype == out.dtype == d.dtype
    assert columns == 1 or d.stride(1) == z.stride(1) == out.stride(1) == 1
    for vector in (c, factor):
        assert vector.dtype == torch.float32 and vector.shape == (columns,) and vector.is_contiguous()
    assert bias is None or (bias.shape == (columns,) and bias.is_contiguous())
    assert rows + parts * ROWS < 2**31
    dora_backward_kernel[(parts * triton.cdiv(columns, COLUMNS),)](
        d, z, c, factor, bias, out, partial, rows, columns, d.stride(0), z.stride(0), out.stride(0),
        ROWS=ROWS, COLUMNS=COLUMNS, KEPT=KEPT, STAGES=STAGES, num_warps=_warps(THREADS),
    )  # fmt: skip
    return partial


def _check(rows: DoRARows, like: DoRARows) -> None:
    (n, k), rank = rows.weight.shape, len(rows.a)
    assert rows.a.shape == (rank, k) and rows.b.shape == (n, rank)
    assert rows.weight.stride(1) == rows.a.stride(1) == 1 and rows.b.is_contiguous()
    assert rows.weight.dtype == rows.a.dtype == rows.b.dtype == like.weight.dtype
    assert rows.magnitude.dtype == like.magnitude.dtype
    for vector in (rows.magnitude, rows.c, rows.inverse_norm):
        assert vector.shape == (n,) and vector.is_contiguous()
    assert rows.c.dtype == rows.inverse_norm.dtype == torch.float32


def _aligned(matrix: Tensor) -> bool:
    size = matrix.element_size()
    bytes_ = (matrix.data_ptr(), matrix.stride(0) * size, matrix.shape[1] * size)
    return all(number % 16 == 0 for number in bytes_) and matrix.shape[1] % 8 == matrix.stride(0) % 8 == 0


def _warps(threads: int) -> int:
    return threads // (64 if torch.version.hip else 32)
