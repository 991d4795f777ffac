"""The row kernel of linear cross-entropy: logits that cuBLAS made, in; losses and dlogits, over the logits, out.

For one row with raw logits x, z = softcap(logit_scale * x), target t, smoothing e, z-loss weight g over V columns:

    lse = log sum_j exp z_j                         loss = lse - (1 - e) z_t - e mean_j(z_j) + g lse^2
    dlogits_j = scale * ((1 + 2 g lse) exp(z_j - lse) - (1 - e) [j = t] - e / V) * dz_j/dx_j

(docs/math/linear-cross-entropy.md). One launch does both for rows that are whole: the maximum and the sum come out of
one sweep (online softmax, Milakov & Gimelshein 2018), a second sweep overwrites the logits. The floor is one read and
one write of the logits; the second sweep reads again, from L2 where the rows in flight fit there (one program a
multiprocessor, 300 KB a row of 152k bf16 columns: about 40 MB, which is too much for most of it to stay). Where logits
exist a block of columns at a time, each sweep is a launch of its own.

Each lane of a program keeps a maximum and a sum of its own over vectors of `VEC` columns; they meet once, at the end
of the row. So the sweep has no barrier in it, and a maximum is paid once a vector. Exponentials are powers of two, in
float32, and logits are held in units of log 2 (z log2(e)).

Left out: skipping columns whose softmax is negligible. The matmuls on either side are dense and are cuBLAS's, so a
skipped tile would save part of one sweep, which is under a tenth of the time, and cost exactness.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from chronicals.kernels.linear_cross_entropy import IGNORE_INDEX, HeadOptions


class RowConfig(NamedTuple):
    """How a program walks a row: `lanes * vec` columns at a time."""

    lanes: int
    vec: int  # neighbouring columns of a lane: 16 bytes of bf16
    threads: int


# blocks of columns; whole vocabularies, whose rows get a multiprocessor of their own
NARROW, WIDE = RowConfig(256, 8, 256), RowConfig(2048, 8, 1024)
CONFIGS: dict[str, RowConfig] = {"narrow": NARROW, "wide": WIDE}


def config_for(width: int) -> RowConfig:
    """The configuration for rows of `width` columns."""
    return NARROW if width <= 16384 else WIDE


def warps(config: RowConfig) -> int:
    return config.threads // (64 if torch.version.hip else 32)


def constexprs(options: HeadOptions) -> dict[str, float]:
    """The options as they are compiled in."""
    return {
        "SOFTCAP": float(options.softcap or 0.0),
        "LOGIT_SCALE": float(options.logit_scale),
        "SMOOTHING": float(options.label_smoothing),
        "Z_LOSS": float(options.z_loss),
    }


LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.0e38)  # below every logit, and finite: -inf - -inf would be NaN
IGNORE = tl.constexpr(IGNORE_INDEX)


@triton.jit
def _scaled(x: tl.tensor, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr) -> tl.tensor:
    """Raw logits -> z in units of log 2."""
    if SOFTCAP == 0.0:
        z = x * (LOGIT_SCALE * LOG2E)
    else:  # c tanh(y) = c (2 sigmoid(2 y) - 1); the interpreter has no tanh
        z = (2.0 * tl.sigmoid(x * (2.0 * LOGIT_SCALE / SOFTCAP)) - 1.0) * (SOFTCAP * LOG2E)
    return z


@triton.jit
def _add(peak: tl.tensor, total: tl.tensor, z: tl.tensor) -> tl.tensor:
    """One online softmax step: z (LANES, VEC) joins each lane's maximum and sum of exp2(z - maximum)."""
    highest = tl.maximum(peak, tl.max(z, axis=1))
    total = total * tl.exp2(peak - highest) + tl.sum(tl.exp2(z - highest[:, None]), axis=1)
    return highest, total


@triton.jit
def _online_softmax(
    ROW: tl.tensor,
    width: tl.tensor,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
) -> tl.tensor:
    """The maximum, the sum of exp2(z - maximum) and, where smoothing asks for it, the sum of z of one row."""
    BLOCK: tl.constexpr = LANES * VEC
    cols = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    peak = tl.full((LANES,), LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    sums = tl.zeros((LANES,), tl.float32)
    # whole blocks unmasked: a mask that ends at an odd column would break 16-byte loads into single ones
    full = width // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        x = tl.load(ROW + start + cols, eviction_policy="evict_last").to(tl.float32)
        z = _scaled(x, SOFTCAP, LOGIT_SCALE)
        peak, total = _add(peak, total, z)
        if SMOOTHING != 0.0:
            sums += tl.sum(z, axis=1)
    if full < width:
        inside = full + cols < width
        x = tl.load(ROW + full + cols, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        z = _scaled(x, SOFTCAP, LOGIT_SCALE)
        if SMOOTHING != 0.0:
            sums += tl.sum(tl.where(inside, z, 0.0), axis=1)
        peak, total = _add(peak, total, tl.where(inside, z, float("-inf")))
    highest = tl.max(peak, axis=0)
    return highest, tl.sum(total * tl.exp2(peak - highest), axis=0), tl.sum(sums, axis=0)


@triton.jit
def _dlogits(
    x: tl.tensor,
    is_target: tl.tensor,
    lse2: tl.tensor,
    scale: tl.tensor,
    softmax_scale: tl.tensor,
    vocab: tl.tensor,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    SMOOTHING: tl.constexpr,
) -> tl.tensor:
    """Raw logits -> their gradient. `softmax_scale` is scale * (1 + 2 g lse)."""
    z = _scaled(x, SOFTCAP, LOGIT_SCALE)
    d = tl.exp2(z - lse2) * softmax_scale
    if SMOOTHING != 0.0:
        d -= scale * (SMOOTHING / vocab)
    d = tl.where(is_target, d - scale * (1.0 - SMOOTHING), d)
    if SOFTCAP != 0.0:
        share = z * (1.0 / (SOFTCAP * LOG2E))
        d *= 1.0 - share * share
    return d


@triton.jit
def _write_dlogits(
    ROW: tl.tensor,
    width: tl.tensor,
    column: tl.tensor,
    lse2: tl.tensor,
    scale: tl.tensor,
    vocab: tl.tensor,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
) -> None:
    """Overwrites one row of logits by dlogits; `column` is the target's, outside the row where it has none."""
    BLOCK: tl.constexpr = LANES * VEC
    cols = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    softmax_scale = scale * (1.0 + (2.0 * Z_LOSS * LN2) * lse2)
    column = column.to(tl.int32)
    full = width // BLOCK * BLOCK
    if full < width:
        inside = full + cols < width
        x = tl.load(ROW + full + cols, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        is_target = cols == column - full
        d = _dlogits(x, is_target, lse2, scale, softmax_scale, vocab, SOFTCAP, LOGIT_SCALE, SMOOTHING)
        tl.store(ROW + full + cols, d.to(ROW.dtype.element_ty), mask=inside, eviction_policy="evict_first")
    for start in range(0, full, BLOCK):
        x = tl.load(ROW + start + cols, eviction_policy="evict_first").to(tl.float32)
        is_target = cols == column - start
        d = _dlogits(x, is_target, lse2, scale, softmax_scale, vocab, SOFTCAP, LOGIT_SCALE, SMOOTHING)
        tl.store(ROW + start + cols, d.to(ROW.dtype.element_ty), eviction_policy="evict_first")


@triton.jit
def _loss(
    target: tl.tensor,
    vocab: tl.tensor,
    lse2: tl.tensor,
    linear: tl.tensor,
    Z_LOSS: tl.constexpr,
) -> tl.tensor:
    """A row's loss from its log-sum-exp and what is linear in z, both in units of log 2.

    0 where there is no target, NaN for one that no vocabulary has, so that the guard stops the run.
    """
    loss = (lse2 - linear) * LN2  # subtracted first: exactly 0 where the target has all the probability
    if Z_LOSS != 0.0:
        loss += (Z_LOSS * LN2 * LN2) * (lse2 * lse2)
    loss = tl.where((target >= 0) & (target < vocab), loss, float("nan"))
    return tl.where(target == IGNORE, 0.0, loss)


@triton.jit
def cross_entropy_kernel(
    LOGITS: tl.tensor,  # (R, width): columns start to start + width of V; overwritten by dlogits where there is SCALE
    TARGETS: tl.tensor,  # (R,) int64
    LOSS: tl.tensor,  # (R,) float32; before the last block, what of it is linear in z. None: LSE is known
    PEAK: tl.tensor,  # (R,) float32, the maximum so far; None: rows are whole
    TOTAL: tl.tensor,  # (R,) float32, the sum so far; None: rows are whole
    LSE: tl.tensor,  # (R,) float32, in natural units: written by the last block, or known; None: rows are whole
    SCALE: tl.tensor,  # (R,) or (1,) float32; None: no dlogits
    row_stride: tl.tensor,
    start: tl.tensor,
    width: tl.tensor,
    vocab: tl.tensor,
    SCALE_STRIDE: tl.constexpr,  # 0: one scale for all rows
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    ROW = LOGITS + row * row_stride
    target = tl.load(TARGETS + row)
    if LOSS is not None and PEAK is None:  # rows are whole: fewer registers
        start, vocab = 0, width
    column = target - start
    if LOSS is None:
        lse2 = tl.load(LSE + row) * LOG2E
    else:
        here = (column >= 0) & (column < width)
        # before the reductions' barriers, and so before any thread overwrites it
        x_target = tl.load(ROW + column, mask=here, other=0.0).to(tl.float32)
        peak, total, z_sum = _online_softmax(ROW, width, SOFTCAP, LOGIT_SCALE, SMOOTHING, LANES, VEC)
        linear = tl.where(here, (1.0 - SMOOTHING) * _scaled(x_target, SOFTCAP, LOGIT_SCALE), 0.0)
        if SMOOTHING != 0.0:
            linear += z_sum * (SMOOTHING / vocab)
        if PEAK is None:
            lse2 = peak + tl.log2(total)
            tl.store(LOSS + row, _loss(target, vocab, lse2, linear, Z_LOSS))
        else:
            before = tl.load(PEAK + row, mask=start > 0, other=LOWEST)
            highest = tl.maximum(peak, before)
            total = total * tl.exp2(peak - highest)
            total += tl.load(TOTAL + row, mask=start > 0, other=0.0) * tl.exp2(before - highest)
            peak = highest
            linear += tl.load(LOSS + row, mask=start > 0, other=0.0)
            last = start + width == vocab
            lse2 = peak + tl.log2(total)
            tl.store(LOSS + row, tl.where(last, _loss(target, vocab, lse2, linear, Z_LOSS), linear))
            tl.store(PEAK + row, peak)
            tl.store(TOTAL + row, total)
            tl.store(LSE + row, lse2 * LN2, mask=last)
    if SCALE is not None:
        scale = tl.where(target == IGNORE, 0.0, tl.load(SCALE + row * SCALE_STRIDE) * LOGIT_SCALE)
        _write_dlogits(ROW, width, column, lse2, scale, vocab, SOFTCAP, LOGIT_SCALE, SMOOTHING, Z_LOSS, LANES, VEC)


class Softmax(NamedTuple):
    """What is known of each row after some blocks of columns; float32, (R,) each. Any contents before the first."""

    losses: Tensor  # after the last block
    peak: Tensor
    total: Tensor
    lse: Tensor  # natural logarithm; after the last block

    @staticmethod
    def empty(rows: int, device: torch.device) -> Softmax:
        return Softmax(*torch.empty(4, rows, dtype=torch.float32, device=device))


def _launch(
    logits: Tensor,
    targets: Tensor,
    state: tuple[Tensor | None, ...],
    scale: Tensor | None,
    start: int,
    vocab: int,
    options: HeadOptions,
    config: RowConfig | None = None,
) -> None:
    """`state`: losses, peak, total and lse, or None for what is not kept."""
    rows, width = logits.shape
    config = config or config_for(width)
    assert logits.stride(1) == 1 or width == 1, "rows whole"
    cross_entropy_kernel[(rows,)](
        logits,
        targets,
        *state,
        scale,
        logits.stride(0),
        start,
        width,
        vocab,
        SCALE_STRIDE=int(scale is not None and scale.numel() > 1),
        **constexprs(options),
        LANES=config.lanes,
        VEC=config.vec,
        num_warps=warps(config),
    )


def cross_entropy_rows_(
    logits: Tensor,
    targets: Tensor,
    scale: Tensor,
    losses: Tensor,
    options: HeadOptions,
    config: RowConfig | None = None,
) -> None:
    """Turns whole rows of raw logits into their gradients, in place, and writes each row's loss.

    Args:
        logits: (C, V), float32, bf16 or fp16; last stride 1, any row stride. Overwritten.
        targets: (C,) int64 contiguous; -100: loss 0 and dlogits 0. Any other outside [0, V): loss NaN.
        scale: (1,) float32, multiplies the gradients but not the losses.
        losses: (C,) float32 contiguous. Overwritten.
    """
    _launch(logits, targets, (losses, None, None, None), scale, 0, logits.shape[1], options, config)


def losses_of_block(
    logits: Tensor, targets: Tensor, state: Softmax, start: int, vocab: int, options: HeadOptions
) -> None:
    """Joins columns `start` to `start + width` of raw logits (R, width) to `state`, blocks in order from column 0.

    `state.lse` and `state.losses` are there once the block that ends at `vocab` is in.
    """
    _launch(logits, targets, state, None, start, vocab, options)


def dlogits_of_block_(
    logits: Tensor, targets: Tensor, scale: Tensor, lse: Tensor, start: int, vocab: int, options: HeadOptions
) -> None:
    """Overwrites columns `start` to `start + width` of raw logits (R, width) by their gradients.

    Args:
        scale: (R,) or (1,) float32, contiguous.
        lse: (R,) float32, of the whole rows.
    """
    _launch(logits, targets, (None, None, None, lse), scale, start, vocab, options)
