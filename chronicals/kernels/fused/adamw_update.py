"""The kernels of AdamW: what is done to a tile of a tensor and its state; adamw.py launches them.

The update, the formats and the rule of stochastic rounding are those of `chronicals/kernels/adamw.py` (and
docs/math/adamw.md), with clipping, weight decay and zeroing of gradients folded in. What all elements share is computed
once, by a launch of one program before.

Instructions, not bytes, are what 8-bit moments are short of, so elements come in pairs: a lane reads one word with two
of them in 16 bits (or two words in 32), and the codes of its two pairs are one word. A program works on `TILE`
consecutive elements of one tensor, a part of (8, LANES) lanes at a time, so that a row is a block of 8-bit moments.
Whole tiles need no masks and have a path of their own. Tensors whose size is not a multiple of 16, or that share a
table with an unaligned address, go element by element: right, and slow. Left out: float16 moments.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from chronicals.kernels.adamw import BLOCK, CALLS, LANES, TILE, UNIT, AdamWSlot
from chronicals.kernels.fused.adamw_words import (
    block_exponent,
    first_code,
    first_word,
    larger_bits,
    load_masked,
    load_pair,
    next_word,
    raised,
    raised_second,
    raised_weight,
    second_code,
    second_word,
    store_pair,
)
from chronicals.kernels.fused.philox import philox
from chronicals.kernels.philox import ROUNDING

# rows of the table of addresses
WEIGHT, MASTER, GRAD, FIRST, SECOND, EXPONENTS = range(6)
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_TILE, _BLOCK, _LANES, _CALLS = tl.constexpr(TILE), tl.constexpr(BLOCK), tl.constexpr(LANES), tl.constexpr(CALLS)
_ROUNDING = tl.constexpr(ROUNDING)
_ROWS = tl.constexpr(CALLS // LANES)  # the elements that share a call's word lie so many blocks apart


@triton.jit
def _one_minus_power(t: tl.tensor, LOG_BETA: tl.constexpr) -> tl.tensor:
    """1 - beta^t without the cancellation that costs a float32 its digits where beta^t is near 1."""
    x = t * LOG_BETA
    series = 1.0 + x * (1.0 / 8.0)
    for i in tl.static_range(6):
        series = 1.0 + x * (1.0 / (7.0 - i)) * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def adamw_scalars_kernel(
    LR: tl.tensor,  # () float32, as the next two
    CLIP: tl.tensor,
    STEP: tl.tensor,
    SCALARS: tl.tensor,  # (5,) float32, written: what every program needs
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    ROOT_BETA2: tl.constexpr,  # of 1 - BETA2
    UNIT: tl.constexpr,  # in which first moments are counted
) -> None:
    lr, clip, step = tl.load(LR), tl.load(CLIP), tl.load(STEP)
    tl.store(SCALARS, lr)
    tl.store(SCALARS + 1, lr / _one_minus_power(step, LOG_BETA1) * UNIT)
    tl.store(SCALARS + 2, tl.rsqrt(_one_minus_power(step, LOG_BETA2)))
    tl.store(SCALARS + 3, clip * ((1.0 - BETA1) / UNIT))
    tl.store(SCALARS + 4, clip * ROOT_BETA2)


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
def _moments(
    g: tl.tensor, m: tl.tensor, v: tl.tensor, clip: tl.tensor, clip_root: tl.tensor
) -> tl.tensor:  # of decayed ones
    scaled = g * clip_root
    return m + g * clip, v + scaled * scaled


@triton.jit
def _moved(p: tl.tensor, m: tl.tensor, v: tl.tensor, decay: tl.tensor, root: tl.tensor, eps: tl.tensor) -> tl.tensor:
    # the square of this is rate / (sqrt(v) + eps): two instructions, where a division takes eight
    inverse = tl.rsqrt(tl.sqrt(v) * root + eps)
    p -= p * decay  # not p (1 - decay): the rounding of that factor would add up over steps
    return p - m * inverse * inverse


@triton.jit
def _part(
    weight: tl.tensor, master: tl.tensor, grad: tl.tensor, first: tl.tensor, second: tl.tensor, exponents: tl.tensor,
    part: tl.tensor, left: tl.tensor, r0: tl.tensor, r1: tl.tensor, r2: tl.tensor, r3: tl.tensor,
    clip: tl.tensor, clip_root: tl.tensor, decay: tl.tensor, root: tl.tensor, eps: tl.tensor,
    BETA1: tl.constexpr, BETA2: tl.constexpr, WEIGHT_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr, HAS_MASTER: tl.constexpr, ZERO: tl.constexpr,
    ALIGNED: tl.constexpr, FULL: tl.constexpr,
) -> None:  # fmt: skip
    """One row a block of BLOCK elements, a lane of it the pairs `lane` and LANES + `lane`."""
    row, lane = part * _ROWS + tl.arange(0, _ROWS), tl.arange(0, _LANES)[None, :]
    rows = part * _ROWS + tl.arange(0, _ROWS)[:, None]
    here, there, word = rows * (2 * _LANES) + lane, rows * (2 * _LANES) + (_LANES + lane), rows * _LANES + lane
    inside = row >= 0 if FULL else row * _BLOCK < left
    all_inside = rows >= 0 if FULL else rows * _BLOCK < left
    g0, g1 = load_pair(grad, here, left, GRAD_DTYPE, ALIGNED, FULL)
    g2, g3 = load_pair(grad, there, left, GRAD_DTYPE, ALIGNED, FULL)
    if tl.int32 == STATE_DTYPE:
        both = load_masked(exponents + row, inside, FULL).to(tl.int32)[:, None]
        # codes are numbers below 2^-111; 8 bits a moment, the second's above
        scale = (((both & 0xFF) << 23) + (112 << 23)).to(tl.float32, bitcast=True) * BETA1
        codes = load_masked(first + word, all_inside, FULL)
        m0, m1 = first_code(codes, 0) * scale, first_code(codes, 1) * scale
        m2, m3 = first_code(codes, 2) * scale, first_code(codes, 3) * scale
        scale = ((both << 15) & 0x7F800000).to(tl.float32, bitcast=True) * BETA2
        codes = load_masked(second + word, all_inside, FULL)
        v0, v1 = second_code(codes, 0) * scale, second_code(codes, 1) * scale
        v2, v3 = second_code(codes, 2) * scale, second_code(codes, 3) * scale
    else:
        m0, m1 = load_pair(first, here, left, STATE_DTYPE, ALIGNED, FULL)
        m2, m3 = load_pair(first, there, left, STATE_DTYPE, ALIGNED, FULL)
        v0, v1 = load_pair(second, here, left, STATE_DTYPE, ALIGNED, FULL)
        v2, v3 = load_pair(second, there, left, STATE_DTYPE, ALIGNED, FULL)
        m0, m1, m2, m3 = BETA1 * m0, BETA1 * m1, BETA1 * m2, BETA1 * m3
        v0, v1, v2, v3 = BETA2 * v0, BETA2 * v1, BETA2 * v2, BETA2 * v3
    m0, v0 = _moments(g0, m0, v0, clip, clip_root)
    m1, v1 = _moments(g1, m1, v1, clip, clip_root)
    m2, v2 = _moments(g2, m2, v2, clip, clip_root)
    m3, v3 = _moments(g3, m3, v3, clip, clip_root)

    trained = master if HAS_MASTER else weight
    DTYPE: tl.constexpr = tl.float32 if HAS_MASTER else WEIGHT_DTYPE
    p0, p1 = load_pair(trained, here, left, DTYPE, ALIGNED, FULL)
    p2, p3 = load_pair(trained, there, left, DTYPE, ALIGNED, FULL)
    p0, p1 = _moved(p0, m0, v0, decay, root, eps), _moved(p1, m1, v1, decay, root, eps)
    p2, p3 = _moved(p2, m2, v2, decay, root, eps), _moved(p3, m3, v3, decay, root, eps)
    if HAS_MASTER:
        store_pair(master, here, left, p0, p1, tl.float32, ALIGNED, FULL)
        store_pair(master, there, left, p2, p3, tl.float32, ALIGNED, FULL)
    elif tl.bfloat16 == WEIGHT_DTYPE:
        p0, p1, p2, p3 = (
            raised_weight(p0, r2),
            raised_weight(p1, r3),
            raised_weight(p2, r0),
            raised_weight(p3, r1),
        )
    store_pair(weight, here, left, p0, p1, WEIGHT_DTYPE, ALIGNED, FULL)
    store_pair(weight, there, left, p2, p3, WEIGHT_DTYPE, ALIGNED, FULL)

    if tl.int32 == STATE_DTYPE:
        largest = tl.maximum(tl.maximum(tl.abs(m0), tl.abs(m1)), tl.maximum(tl.abs(m2), tl.abs(m3)))
        of_first = block_exponent(largest.to(tl.int32, bitcast=True))
        of_second = block_exponent(larger_bits(larger_bits(v0, v1), larger_bits(v2, v3)))
        tl.store(exponents + row, ((of_first >> 23) | (of_second >> 15)).to(tl.int16), mask=inside)
        scale = (0x47000000 - of_first).to(tl.float32, bitcast=True)[:, None]  # 2^15 / (the power of two) / 2^127
        t0, t1 = raised(m0 * scale, r1, 20), raised(m1 * scale, r2, 20)
        t2, t3 = raised(m2 * scale, r3, 20), raised(m3 * scale, r0, 20)
        tl.store(first + word, first_word(t0, t1, t2, t3), mask=all_inside)
        scale = (0x7F000000 - of_second).to(tl.float32, bitcast=True)[:, None]
        t0, t1 = raised_second(v0 * scale, r0), raised_second(v1 * scale, r1)
        t2, t3 = raised_second(v2 * scale, r2), raised_second(v3 * scale, r3)
        tl.store(second + word, second_word(t0, t1, t2, t3), mask=all_inside)
    else:
        if tl.bfloat16 == STATE_DTYPE:
            m0, m1, m2, m3 = (
                raised(m0, r1, 16),
                raised(m1, r2, 16),
                raised(m2, r3, 16),
                raised(m3, r0, 16),
            )
            v0, v1, v2, v3 = (
                raised(v0, r0, 16),
                raised(v1, r1, 16),
                raised(v2, r2, 16),
                raised(v3, r3, 16),
            )
        store_pair(first, here, left, m0, m1, STATE_DTYPE, ALIGNED, FULL)
        store_pair(first, there, left, m2, m3, STATE_DTYPE, ALIGNED, FULL)
        store_pair(second, here, left, v0, v1, STATE_DTYPE, ALIGNED, FULL)
        store_pair(second, there, left, v2, v3, STATE_DTYPE, ALIGNED, FULL)
    if ZERO:
        tl.debug_barrier()  # the thread that stores an element need not be the one that loads it
        zero = tl.zeros_like(g0)
        store_pair(grad, here, left, zero, zero, GRAD_DTYPE, ALIGNED, FULL)
        store_pair(grad, there, left, zero, zero, GRAD_DTYPE, ALIGNED, FULL)


@triton.jit
def _parts(
    weight: tl.tensor, master: tl.tensor, grad: tl.tensor, first: tl.tensor, second: tl.tensor, exponents: tl.tensor,
    left: tl.tensor, r0: tl.tensor, r1: tl.tensor, r2: tl.tensor, r3: tl.tensor,
    clip: tl.tensor, clip_root: tl.tensor, decay: tl.tensor, root: tl.tensor, eps: tl.tensor,
    BETA1: tl.constexpr, BETA2: tl.constexpr, WEIGHT_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr, HAS_MASTER: tl.constexpr, ZERO: tl.constexpr,
    ALIGNED: tl.constexpr, FULL: tl.constexpr,
) -> None:  # fmt: skip
    """All the elements that share words. Only whole tiles, which are nearly all, are worth the time that the compiler
    takes for four copies."""
    if FULL:
        for part in tl.static_range(_TILE // (_ROWS * _BLOCK)):
            _part(
                weight, master, grad, first, second, exponents, part, left, r0, r1, r2, r3,
                clip, clip_root, decay, root, eps, BETA1, BETA2, WEIGHT_DTYPE, GRAD_DTYPE, STATE_DTYPE,
                HAS_MASTER, ZERO, ALIGNED, FULL,
            )  # fmt: skip
            r0, r1, r2, r3 = next_word(r0), next_word(r1), next_word(r2), next_word(r3)
    else:
        for part in range(_TILE // (_ROWS * _BLOCK)):
            _part(
                weight, master, grad, first, second, exponents, part, left, r0, r1, r2, r3,
                clip, clip_root, decay, root, eps, BETA1, BETA2, WEIGHT_DTYPE, GRAD_DTYPE, STATE_DTYPE,
                HAS_MASTER, ZERO, ALIGNED, FULL,
            )  # fmt: skip
            r0, r1, r2, r3 = next_word(r0), next_word(r1), next_word(r2), next_word(r3)


@triton.jit(do_not_specialize=["tensors"])
def adamw_kernel(
    ADDRESSES: tl.tensor,  # (6, tensors) int64, rows as above
    SIZES: tl.tensor,  # (tensors,) int64
    RATES: tl.tensor,  # (2, tensors) float32: what multiplies the learning rate, weight decay
    STREAMS: tl.tensor,  # (tensors,) int32: the tensor's number in its random counter
    TILES: tl.tensor,  # (programs, 2) int32
    SCALARS: tl.tensor,  # (5,) float32, of the kernel above
    STEP: tl.tensor,  # () float32, as the next
    WRITTEN: tl.tensor,
    SEED: tl.tensor,  # () int64
    tensors: tl.tensor,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,  # int32: words of four codes
    HAS_MASTER: tl.constexpr,
    ZERO: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    tensor, tile = tl.load(TILES + 2 * program), tl.load(TILES + 2 * program + 1).to(tl.int64)
    start = tile * _TILE
    left = tl.minimum(tl.load(SIZES + tensor) - start, _TILE).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, 16)  # or masks of unknown length would stop vectorised access
    grad = _pointer(ADDRESSES, 2, tensor, tensors, start, GRAD_DTYPE, ALIGNED)
    if tl.load(WRITTEN) == 0:
        if ZERO:
            for part in range(_TILE // 1024):
                at = part * 1024 + tl.arange(0, 1024)
                tl.store(grad + at, tl.zeros((1024,), GRAD_DTYPE), mask=at < left)
    else:
        CODED: tl.constexpr = tl.int32 == STATE_DTYPE
        weight = _pointer(ADDRESSES, 0, tensor, tensors, start, WEIGHT_DTYPE, ALIGNED)
        master = _pointer(ADDRESSES, 1, tensor, tensors, start, tl.float32, ALIGNED)
        begin = start // 4 if CODED else start
        first = _pointer(ADDRESSES, 3, tensor, tensors, begin, STATE_DTYPE, ALIGNED or CODED)
        second = _pointer(ADDRESSES, 4, tensor, tensors, begin, STATE_DTYPE, ALIGNED or CODED)
        exponents = _pointer(ADDRESSES, 5, tensor, tensors, start // _BLOCK, tl.int16, False)
        factor = tl.load(RATES + tensor)
        decay = tl.load(SCALARS) * factor * tl.load(RATES + tensors + tensor)
        rate, root = tl.load(SCALARS + 1) * factor, tl.load(SCALARS + 2)
        root, eps = root / tl.maximum(rate, 1e-36), EPS / rate  # rate 0: eps is infinite, and the update 0
        clip, clip_root = tl.load(SCALARS + 3), tl.load(SCALARS + 4)
        stream, step = tl.load(STREAMS + tensor), tl.load(STEP).to(tl.int32)
        call = tl.arange(0, _ROWS)[:, None] * _LANES + tl.arange(0, _LANES)[None, :]
        r0, r1, r2, r3 = call, call, call, call
        if tl.float32 != STATE_DTYPE or (tl.bfloat16 == WEIGHT_DTYPE and not HAS_MASTER):
            # reads nothing: a load settles the layout of what is made from it, or Philox would run for two layouts
            anchor = tl.load(first + call, mask=call < 0, other=0).to(tl.int32)
            counter = (tile * _CALLS).to(tl.int32) + call + anchor
            r0, r1, r2, r3 = philox(
                tl.load(SEED), counter, counter * 0 + stream, counter * 0 + step, counter * 0 + _ROUNDING
            )
        if left == _TILE:
            _parts(
                weight, master, grad, first, second, exponents, left, r0, r1, r2, r3, clip, clip_root, decay, root, eps,
                BETA1, BETA2, WEIGHT_DTYPE, GRAD_DTYPE, STATE_DTYPE, HAS_MASTER, ZERO, ALIGNED, ALIGNED,
            )  # fmt: skip
        else:
            _parts(
                weight, master, grad, first, second, exponents, left, r0, r1, r2, r3, clip, clip_root, decay, root, eps,
                BETA1, BETA2, WEIGHT_DTYPE, GRAD_DTYPE, STATE_DTYPE, HAS_MASTER, ZERO, ALIGNED, False,
            )  # fmt: skip


def constexprs(
    slot: AdamWSlot, grad: torch.dtype, *, betas: tuple[float, float], eps: float, zero: bool, aligned: bool
) -> dict[str, Any]:
    """The update's compile-time arguments for tensors like `slot`."""
    coded = slot.exponents is not None
    return {
        "BETA1": betas[0],
        "BETA2": betas[1],
        "EPS": eps,
        "WEIGHT_DTYPE": TRITON_DTYPES[slot.weight.dtype],
        "GRAD_DTYPE": TRITON_DTYPES[grad],
        "STATE_DTYPE": tl.int32 if coded else TRITON_DTYPES[slot.exp_avg.dtype],
        "HAS_MASTER": slot.master is not None,
        "ZERO": zero,
        "ALIGNED": aligned,
    }


def scalar_constexprs(*, betas: tuple[float, float], coded: bool) -> dict[str, float]:
    """The compile-time arguments of the launch before it."""
    return {
        "BETA1": betas[0],
        "BETA2": betas[1],
        "LOG_BETA1": math.log(max(betas[0], 1e-30)),
        "LOG_BETA2": math.log(max(betas[1], 1e-30)),
        "ROOT_BETA2": math.sqrt(1 - betas[1]),
        "UNIT": UNIT if coded else 1.0,
    }


def num_warps(slot: AdamWSlot, grad: torch.dtype) -> int:
    """A thread has two lanes, with 8-bit moments a warp a block; where all is 16 bits wide a thread has four lanes: the
    most of one access of 16 bytes, so that layouts need no conversion."""
    narrow = slot.weight.dtype.itemsize == slot.exp_avg.dtype.itemsize == grad.itemsize == 2 and slot.master is None
    return 4 if narrow else 8
