"""AdamW on the GPU: one launch over a table of pointers, clipping, weight decay and zeroing of gradients folded in.

The update, the formats and the rule of stochastic rounding are those of `chronicals/kernels/adamw.py` (and
docs/math/adamw.md). A parameter is read and written once: 14 bytes with bfloat16 weights, gradients and moments, 10.06
with 8-bit moments, 28 with a float32 master and moments and bfloat16 gradients and weights. Learning rate, clipping
and step are read from the device, so that a captured graph follows the schedule; where `written` is 0 nothing is
written but zeros into the gradients.

A program works on `TILE` consecutive elements of one tensor, `LANES` at a time: one for each word of a Philox call.
A part is (rows, BLOCK) elements, so that a row is a block of 8-bit moments. Tensors whose size is not a multiple of 16,
or that share a table with an unaligned address, go element by element: right, and slow. Left out: float16 moments;
tensors that are not contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from chronicals.kernels.adamw import (
    BLOCK,
    FIRST_BASE,
    FIRST_LOWEST,
    FIRST_SPAN,
    KEPT,
    LANES,
    PHILOX_ROUNDS,
    SECOND_BASE,
    AdamWSlot,
)
from chronicals.kernels.fused.pointers import PointerTable

TILE = 4 * LANES  # of a program: one Philox call
# rows of the table of addresses
WEIGHT, MASTER, GRAD, FIRST, SECOND, FIRST_SCALE, SECOND_SCALE = range(7)
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_ROWS = tl.constexpr(LANES // BLOCK)
_BLOCK = tl.constexpr(BLOCK)
_LANES = tl.constexpr(LANES)
_ROUNDS = tl.constexpr(PHILOX_ROUNDS)
_FIRST_BASE, _FIRST_LOWEST = tl.constexpr(FIRST_BASE), tl.constexpr(FIRST_LOWEST)
_FIRST_SPAN, _FIRST_UNSPAN = tl.constexpr(FIRST_SPAN), tl.constexpr(1 / FIRST_SPAN)
_SECOND_BASE, _KEPT, _UNKEPT = tl.constexpr(SECOND_BASE), tl.constexpr(KEPT), tl.constexpr(1 / KEPT)


@triton.jit
def _pointer(
    ADDRESSES: tl.tensor,
    row: tl.constexpr,
    tensor: tl.tensor,
    tensors: tl.tensor,
    start: tl.tensor,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """To element `start` of a piece of `tensor`."""
    pointer = tl.load(ADDRESSES + row * tensors + tensor).to(tl.pointer_type(DTYPE)) + start
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _one_minus_power(t: tl.tensor, LOG_BETA: tl.constexpr) -> tl.tensor:
    """1 - beta^t without the cancellation that costs a float32 its digits where beta^t is near 1."""
    x = t * LOG_BETA
    series = 1.0 + x * (1.0 / 8.0)
    for i in tl.static_range(6):
        series = 1.0 + x * (1.0 / (7.0 - i)) * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _round(x: tl.tensor, r: tl.tensor, KEEP_NAN: tl.constexpr) -> tl.tensor:
    """float32 to bfloat16, up in magnitude with probability (dropped bits) / 2^16, which may carry NaN to zero."""
    bits = x.to(tl.int32, bitcast=True)
    if KEEP_NAN:
        bits = tl.where(x == x, bits, 0x7FC00000)
    return ((bits + r) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _scale(P: tl.tensor, rows: tl.tensor, mask: tl.tensor, factor: tl.constexpr) -> tl.tensor:
    """(rows, 1): loaded as a vector, since (rows, 1) would be loaded once for each element."""
    return (tl.load(P + rows, mask=mask, other=0) * factor)[:, None]


@triton.jit
def _largest(x: tl.tensor, factor: tl.constexpr) -> tl.tensor:
    """Per row: the largest magnitude, and what takes magnitudes to `factor` at most, as (rows, 1)."""
    scale = tl.max(tl.abs(x), axis=1)
    return scale, tl.where(scale > 0, factor / scale, 0.0)[:, None]


@triton.jit
def _part(
    weight: tl.tensor, master: tl.tensor, grad: tl.tensor, first: tl.tensor, second: tl.tensor,
    first_scale: tl.tensor, second_scale: tl.tensor, part: tl.constexpr, bits: tl.tensor, left: tl.tensor,
    clip: tl.tensor, clip_second: tl.tensor, decay: tl.tensor, rate: tl.tensor, root: tl.tensor,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
    HAS_MASTER: tl.constexpr, STATE: tl.constexpr, ZERO: tl.constexpr,
) -> None:  # fmt: skip
    row = part * _ROWS + tl.arange(0, _ROWS)[:, None]
    at = row * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    mask, rows = at < left, part * _ROWS + tl.arange(0, _ROWS)
    has_row = rows * _BLOCK < left
    # zeros beyond the end, so that nothing there is a block's maximum
    g = tl.load(grad + at, mask=mask, other=0).to(tl.float32)
    m, v = tl.load(first + at, mask=mask, other=0), tl.load(second + at, mask=mask, other=0)
    if STATE == "int8":
        m, v = m.to(tl.int32), v.to(tl.int32)
        size = (((m & 127) | _FIRST_BASE) << 20).to(tl.float32, bitcast=True) - _FIRST_LOWEST
        m = (size.to(tl.int32, bitcast=True) | ((m << 24) & -0x80000000)).to(tl.float32, bitcast=True)
        m *= _scale(first_scale, rows, has_row, BETA1 * _FIRST_UNSPAN)
        v = ((v + _SECOND_BASE) << 20).to(tl.float32, bitcast=True)
        v *= _scale(second_scale, rows, has_row, BETA2 * _UNKEPT)
    else:
        m, v = BETA1 * m.to(tl.float32), BETA2 * v.to(tl.float32)
    m += g * clip
    scaled = g * clip_second
    v += scaled * scaled
    trained = master if HAS_MASTER else weight
    p = tl.load(trained + at, mask=mask).to(tl.float32)
    inverse = tl.rsqrt(tl.sqrt(v) * root + EPS)  # its square: two instructions, where a division takes eight
    p -= p * decay  # not p (1 - decay): the rounding of that factor would add up over steps
    p -= m * rate * inverse * inverse
    if HAS_MASTER:
        tl.store(master + at, p, mask=mask)
        tl.store(weight + at, p.to(weight.dtype.element_ty), mask=mask)
    elif weight.dtype.element_ty == tl.bfloat16:
        tl.store(weight + at, _round(p, bits & 0xFFFF, True), mask=mask)
    else:
        tl.store(weight + at, p, mask=mask)
    if STATE == "int8":
        scale, inverse = _largest(m, _FIRST_SPAN)
        size = (tl.abs(m) * inverse + _FIRST_LOWEST).to(tl.int32, bitcast=True)
        code = ((size + (bits & 0xFFFFF)) >> 20) & 127
        tl.store(first + at, (code | ((m.to(tl.int32, bitcast=True) >> 24) & -128)).to(tl.uint8), mask=mask)
        tl.store(first_scale + rows, scale, mask=has_row)
        scale, inverse = _largest(v, _KEPT)
        size = (v * inverse).to(tl.int32, bitcast=True) + ((bits >> 12) & 0xFFFFF) - (_SECOND_BASE << 20)
        tl.store(second + at, tl.maximum(size >> 20, 0).to(tl.uint8), mask=mask)
        tl.store(second_scale + rows, scale, mask=has_row)
    elif STATE == "bfloat16":
        tl.store(first + at, _round(m, (bits >> 4) & 0xFFFF, False), mask=mask)
        tl.store(second + at, _round(v, (bits >> 16) & 0xFFFF, False), mask=mask)
    else:
        tl.store(first + at, m, mask=mask)
        tl.store(second + at, v, mask=mask)
    if ZERO:
        tl.debug_barrier()  # the thread that stores an element need not be the one that loads it
        tl.store(grad + at, tl.zeros_like(g).to(grad.dtype.element_ty), mask=mask)


@triton.jit
def adamw_kernel(
    ADDRESSES: tl.tensor,  # (7, tensors) int64, rows as above
    SIZES: tl.tensor,  # (tensors,) int64
    RATES: tl.tensor,  # (2, tensors) float32: what multiplies the learning rate, weight decay
    STREAMS: tl.tensor,  # (tensors,) int32: the tensor's number in its random counter
    TILES: tl.tensor,  # (programs, 2) int32
    LR: tl.tensor,  # () float32, as the next three
    CLIP: tl.tensor,
    STEP: tl.tensor,
    WRITTEN: tl.tensor,
    seed: tl.tensor,
    tensors: tl.tensor,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    ROOT_BETA2: tl.constexpr,  # of 1 - BETA2
    EPS: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    ZERO: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    tensor, tile = tl.load(TILES + 2 * program), tl.load(TILES + 2 * program + 1).to(tl.int64)
    start = tile * TILE
    left = tl.minimum(tl.load(SIZES + tensor) - start, TILE).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, 16)  # or masks of unknown length would stop vectorised access
    grad = _pointer(ADDRESSES, 2, tensor, tensors, start, GRAD_DTYPE, ALIGNED)
    if tl.load(WRITTEN) == 0:
        if ZERO:
            for part in range(TILE // _LANES):
                at = part * _LANES + tl.arange(0, _LANES)
                tl.store(grad + at, tl.zeros((_LANES,), GRAD_DTYPE), mask=at < left)
    else:
        KIND: tl.constexpr = tl.float32 if STATE == "float32" else (tl.bfloat16 if STATE == "bfloat16" else tl.uint8)
        weight = _pointer(ADDRESSES, 0, tensor, tensors, start, WEIGHT_DTYPE, ALIGNED)
        master = _pointer(ADDRESSES, 1, tensor, tensors, start, tl.float32, ALIGNED)
        first = _pointer(ADDRESSES, 3, tensor, tensors, start, KIND, ALIGNED)
        second = _pointer(ADDRESSES, 4, tensor, tensors, start, KIND, ALIGNED)
        first_scale = _pointer(ADDRESSES, 5, tensor, tensors, start // _BLOCK, tl.float32, False)
        second_scale = _pointer(ADDRESSES, 6, tensor, tensors, start // _BLOCK, tl.float32, False)
        step, clip = tl.load(STEP), tl.load(CLIP)
        lr = tl.load(LR) * tl.load(RATES + tensor)
        decay = lr * tl.load(RATES + tensors + tensor)
        rate = lr / _one_minus_power(step, LOG_BETA1)
        root = tl.rsqrt(_one_minus_power(step, LOG_BETA2))
        stream = tl.load(STREAMS + tensor)
        lane = tl.arange(0, _ROWS)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        for i in range(TILE // (4 * _LANES)):
            at = i * 4 * _LANES
            w0, w1, w2, w3 = lane, lane, lane, lane
            if STATE != "float32" or (tl.bfloat16 == WEIGHT_DTYPE and not HAS_MASTER):
                # reads nothing: a load settles the layout of what is made from it, or Philox would run for two layouts
                anchor = tl.load(weight + lane, mask=lane < 0, other=0).to(tl.int32)
                counter = ((tile * (TILE // 4)).to(tl.int32) + i * _LANES) + lane + anchor
                zero = counter * 0
                c0, c1, c2, c3 = tl.philox(
                    seed, counter, zero + stream, zero + step.to(tl.int32), zero, n_rounds=_ROUNDS
                )
                w0, w1 = c0.to(tl.int32, bitcast=True), c1.to(tl.int32, bitcast=True)
                w2, w3 = c2.to(tl.int32, bitcast=True), c3.to(tl.int32, bitcast=True)
            for part in tl.static_range(4):
                bits = w0 if part == 0 else (w1 if part == 1 else (w2 if part == 2 else w3))
                _part(
                    weight + at, master + at, grad + at, first + at, second + at,
                    first_scale + at // _BLOCK, second_scale + at // _BLOCK,
                    part, bits, left - at, clip * (1.0 - BETA1), clip * ROOT_BETA2, decay, rate, root,
                    BETA1, BETA2, EPS, HAS_MASTER, STATE, ZERO,
                )  # fmt: skip


def constexprs(
    slot: AdamWSlot, grad: torch.dtype, *, betas: tuple[float, float], eps: float, zero: bool, aligned: bool
) -> dict[str, Any]:
    """The kernel's compile-time arguments for tensors like `slot`."""
    state = "int8" if slot.exp_avg_scale is not None else str(slot.exp_avg.dtype).removeprefix("torch.")
    return {
        "BETA1": betas[0],
        "BETA2": betas[1],
        "LOG_BETA1": math.log(max(betas[0], 1e-30)),
        "LOG_BETA2": math.log(max(betas[1], 1e-30)),
        "ROOT_BETA2": math.sqrt(1 - betas[1]),
        "EPS": eps,
        "WEIGHT_DTYPE": TRITON_DTYPES[slot.weight.dtype],
        "GRAD_DTYPE": TRITON_DTYPES[grad],
        "STATE": state,
        "HAS_MASTER": slot.master is not None,
        "ZERO": zero,
        "ALIGNED": aligned,
        "TILE": TILE,
    }


def launch_options(slot: AdamWSlot, grad: torch.dtype) -> dict[str, int]:
    """With 8-bit moments a warp has a block of 256, so that its maximum needs no other warp; otherwise a thread has 8
    elements of 16 bits, or 4 where something is float32: the most of one access, so that layouts need no conversion."""
    wide = torch.float32 in (slot.weight.dtype, slot.exp_avg.dtype, grad) or slot.master is not None
    return {"num_warps": 8 if wide and slot.exp_avg_scale is None else 4}


class FusedAdamW:
    """The update of all of a run's tensors, in one launch where they have one dtype and sizes divisible by 16.

    Args:
        slots: the tensors with their state, on one device, contiguous; their order numbers the random streams.
        betas, eps: as in the paper.
        seed: of stochastic rounding, 0 .. 2^63 - 1.
    """

    def __init__(self, slots: Sequence[AdamWSlot], *, betas: tuple[float, float], eps: float, seed: int = 0) -> None:
        self.slots, self.betas, self.eps, self.seed = list(slots), betas, eps, seed
        numbers: dict[tuple[torch.dtype, bool], list[int]] = {}
        for number, slot in enumerate(self.slots):
            assert all(t is None or t.is_contiguous() for t in _pieces(slot)), "the kernel walks tensors side by side"
            numbers.setdefault((slot.weight.dtype, slot.weight.numel() % 16 == 0), []).append(number)
        self._groups = [_Group(self.slots, members) for members in numbers.values()]

    def bind(self, grads: Sequence[Tensor]) -> None:
        """Read gradients from `grads` from now on; `step` does it too, but may not while a graph is captured."""
        for group in self._groups:
            group.table.set(GRAD, [grads[i] for i in group.members])

    def step(
        self,
        grads: Sequence[Tensor],
        lr: Tensor,
        clip_scale: Tensor,
        step: Tensor,
        written: Tensor,
        *,
        zero_grads: bool = False,
    ) -> None:
        """One update of every slot.

        Args:
            grads: contiguous, in the slots' order; those of one weight dtype have one dtype.
            lr, clip_scale, step: one float32 each on the device; `step` counts from 1.
            written: one float32 on the device; 0: no weight and no state is written.
            zero_grads: leave zeros in `grads`, written or not.
        """
        assert all(t.dtype == torch.float32 and t.numel() == 1 for t in (lr, clip_scale, step, written))
        assert all(g.is_contiguous() and g.shape == s.weight.shape for g, s in zip(grads, self.slots, strict=True))
        self.bind(grads)
        for group in self._groups:
            dtype = grads[group.members[0]].dtype
            assert all(grads[i].dtype == dtype for i in group.members), "gradients of different dtypes"
            if group.table.programs:
                adamw_kernel[(group.table.programs,)](
                    group.table.addresses, group.table.sizes, group.rates, group.streams, group.table.tiles,
                    lr, clip_scale, step, written, self.seed, len(group.members),
                    **constexprs(
                        self.slots[group.members[0]], dtype,
                        betas=self.betas, eps=self.eps, zero=zero_grads, aligned=group.aligned,
                    ),
                    **launch_options(self.slots[group.members[0]], dtype),
                )  # fmt: skip


class _Group:
    def __init__(self, slots: Sequence[AdamWSlot], members: list[int]) -> None:
        mine = [slots[i] for i in members]
        device = mine[0].weight.device
        self.members, self.regular = members, mine[0].weight.numel() % 16 == 0
        rows = [list(row) for row in zip(*map(_pieces, mine), strict=True)]
        self.table = PointerTable(rows, [s.weight.numel() for s in mine], TILE)
        self.rates = torch.tensor([[s.rate for s in mine], [s.decay for s in mine]], device=device)
        self.streams = torch.tensor(members, dtype=torch.int32, device=device)

    @property
    def aligned(self) -> bool:
        """Whether accesses can be vectorised: every address and every size is a multiple of 16 (members are alike)."""
        return self.regular and self.table.aligned


def _pieces(slot: AdamWSlot) -> tuple[Tensor | None, ...]:
    """In the order of the table's rows; the gradient comes with each step."""
    return (
        slot.weight,
        slot.master,
        None,
        slot.exp_avg,
        slot.exp_avg_sq,
        slot.exp_avg_scale,
        slot.exp_avg_sq_scale,
    )
