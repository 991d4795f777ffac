"""Dropout of one adapter's input as a pass of its own, for adapters that are not joined with their weight: x read and
x' written once, the mask drawn in registers.

The masks are those of `dropout_mask` (chronicals/kernels/lora.py). In plain PyTorch they cost some hundred passes over
64-bit integers: with DoRA and dropout on `lora05`, by count, 1.3 s a step. Left out: float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chronicals.kernels.fused.lora_dropout import takes_pairs
from chronicals.kernels.fused.lora_dropout_kernels import masked, random_bits
from chronicals.kernels.fused.rows import DTYPES
from chronicals.kernels.lora import LANES, MOST_CALLS, threshold

ROWS, COLUMNS, WARPS = 16, 128, 4

_LANES = tl.constexpr(LANES)


@triton.jit(do_not_specialize=["low", "high", "stream", "limit"])
def dropout_kernel(
    X: tl.tensor,  # (tokens, columns), last stride 1
    OUT: tl.tensor,  # (tokens, columns), contiguous
    COUNTER: tl.tensor,  # (1,) int64
    low: tl.tensor,  # the seed's halves
    high: tl.tensor,
    stream: tl.tensor,
    limit: tl.tensor,  # an element whose bits are below it is dropped
    factor: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    x_stride: tl.tensor,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    strips = tl.cdiv(columns, COLUMNS)
    token = tl.program_id(0) // strips * ROWS + tl.arange(0, ROWS)[:, None]
    begin = tl.program_id(0) % strips * COLUMNS
    column = begin + tl.arange(0, COLUMNS)[None, :]
    mask = (token < tokens) & (column < columns)
    x = tl.load(X + token.to(tl.int64) * x_stride + column, mask=mask, other=0.0)
    call = token * tl.cdiv(columns, _LANES) + begin // _LANES + tl.arange(0, COLUMNS // _LANES)[None, :]
    seed = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    bits = random_bits(call, stream, tl.load(COUNTER).to(tl.int32), seed, PAIRS)
    kept = masked(x, bits, limit.to(tl.uint16), PAIRS)
    out = OUT + token.to(tl.int64) * columns + column
    tl.store(out, (kept.to(tl.float32) * factor).to(OUT.dtype.element_ty), mask=mask)


def dropout(x: Tensor, p: float, *, seed: int, stream: int, counter: Tensor) -> Tensor:
    """As `chronicals.kernels.lora.dropout`, in one launch."""
    tokens, columns = x.shape
    assert x.dtype in DTYPES, f"no kernel for {x.dtype}"
    assert x.stride(1) == 1 or columns == 1
    assert counter.dtype == torch.int64 and counter.numel() == 1
    assert tokens * triton.cdiv(columns, LANES) < MOST_CALLS, f"no mask of {tokens} x {columns}"
    out = x.new_empty(tokens, columns)
    programs = triton.cdiv(tokens, ROWS) * triton.cdiv(columns, COLUMNS)
    if programs:
        dropout_kernel[(programs,)](
            x, out, counter, _signed(seed), _signed(seed >> 32), stream, threshold(p), 1 / (1 - p),
            tokens, columns, x.stride(0), PAIRS=takes_pairs(x.device, p), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
    return out


def _signed(word: int) -> int:
    """The lower 32 bits, as a signed number."""
    return (word + 2**31) % 2**32 - 2**31
