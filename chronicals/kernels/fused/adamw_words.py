"""What the fused AdamW does to words: pairs of numbers in and out of memory, stochastic rounding, codes.

Formats and random words are those of `chronicals/kernels/adamw.py`. Everything here is written for the fewest
instructions an element: a shift and a mask unpack a number, one addition with a shift rounds one, and no byte is moved
alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from chronicals.kernels.adamw import LCG_ADD, LCG_MULTIPLY, TOP

_LCG_MULTIPLY, _LCG_ADD = tl.constexpr(LCG_MULTIPLY - 2**32), tl.constexpr(LCG_ADD)  # as signed numbers
_ROOM = tl.constexpr((1 << 23) - TOP)
_UPPER = tl.constexpr(-65536)  # the mask of a word's upper half


@triton.jit
def load_masked(pointer: tl.tensor, mask: tl.tensor, FULL: tl.constexpr) -> tl.tensor:
    """Zeros beyond the end, so that nothing there is a block's maximum."""
    return tl.load(pointer) if FULL else tl.load(pointer, mask=mask, other=0)


@triton.jit
def load_pair(
    P: tl.tensor, pair: tl.tensor, left: tl.tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr
) -> tl.tensor:
    """Elements 2 pair and 2 pair + 1 as float32."""
    at = 2 * pair
    if not ALIGNED:
        return (
            load_masked(P + at, at < left, False).to(tl.float32),
            load_masked(P + at + 1, at + 1 < left, False).to(tl.float32),
        )
    elif tl.float32 == DTYPE:
        words = load_masked(P.to(tl.pointer_type(tl.int64)) + pair, at < left, FULL)
        return words.to(tl.int32).to(DTYPE, bitcast=True), (words >> 32).to(tl.int32).to(DTYPE, bitcast=True)
    else:
        word = load_masked(P.to(tl.pointer_type(tl.int32)) + pair, at < left, FULL)
        if tl.bfloat16 == DTYPE:
            return (word << 16).to(tl.float32, bitcast=True), (word & _UPPER).to(tl.float32, bitcast=True)
        else:
            low, high = word.to(tl.int16), (word >> 16).to(tl.int16)
            return low.to(DTYPE, bitcast=True).to(tl.float32), high.to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def store_pair(
    P: tl.tensor, pair: tl.tensor, left: tl.tensor, low: tl.tensor, high: tl.tensor,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
) -> None:  # fmt: skip
    """The inverse, rounded to nearest; int32 `low` and `high` are bits of float32, cut off to bfloat16."""
    CUT: tl.constexpr = low.dtype == tl.int32
    at = 2 * pair
    inside = pair >= 0 if FULL else at < left
    if not ALIGNED:
        if CUT:
            low, high = (
                (low >> 16).to(tl.int16).to(DTYPE, bitcast=True),
                (high >> 16).to(tl.int16).to(DTYPE, bitcast=True),
            )
        tl.store(P + at, low.to(DTYPE), mask=at < left)
        tl.store(P + at + 1, high.to(DTYPE), mask=at + 1 < left)
    elif tl.float32 == DTYPE:
        low, high = low.to(tl.uint32, bitcast=True).to(tl.uint64), high.to(tl.uint32, bitcast=True).to(tl.uint64)
        tl.store(P.to(tl.pointer_type(tl.uint64)) + pair, low | (high << 32), mask=inside)
    elif CUT:
        tl.store(P.to(tl.pointer_type(tl.int32)) + pair, upper_halves(low, high), mask=inside)
    else:
        low, high = low.to(DTYPE).to(tl.uint16, bitcast=True), high.to(DTYPE).to(tl.uint16, bitcast=True)
        word = low.to(tl.uint32) | (high.to(tl.uint32) << 16)
        tl.store(P.to(tl.pointer_type(tl.uint32)) + pair, word, mask=inside)


@triton.jit
def upper_halves(low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """The upper halves of two words as one."""
    return ((low >> 16) & 0xFFFF) | (high & _UPPER)


@triton.jit
def raised(x: tl.tensor, r: tl.tensor, DROPPED: tl.constexpr) -> tl.tensor:
    """The bits of `x`, of which DROPPED will go, after adding a random number of so many bits."""
    return x.to(tl.int32, bitcast=True) + (r.to(tl.uint32, bitcast=True) >> (32 - DROPPED)).to(tl.int32, bitcast=True)


@triton.jit
def raised_weight(x: tl.tensor, r: tl.tensor) -> tl.tensor:
    # NaN of a GPU, 0x7fffffff, would carry to zero: above the bits of infinity there is only NaN
    bits = tl.minimum(x.to(tl.int32, bitcast=True), 0x7F800000)
    return raised(bits.to(tl.float32, bitcast=True), r, 16)


@triton.jit
def raised_second(y: tl.tensor, r: tl.tensor) -> tl.tensor:
    return tl.maximum(raised(y, r, 20), 0x30000000)  # not below the lowest code


@triton.jit
def first_code(word: tl.tensor, k: tl.constexpr) -> tl.tensor:
    """Code k of a word: sign to bit 31, the rest to bits 20 .. 26, a float32 with the exponents 0 to 15."""
    shifted = (word << (24 - 8 * k)) >> 4 if k < 3 else word >> 4
    return (shifted & -0x78100000).to(tl.float32, bitcast=True)


@triton.jit
def second_code(word: tl.tensor, k: tl.constexpr) -> tl.tensor:
    """Code k of a word in bits 20 .. 27, a float32 from 2^-31 to 1.875."""
    shifted = word << (20 - 8 * k) if k < 3 else word >> 4
    return ((shifted & 0x0FF00000) | 0x30000000).to(tl.float32, bitcast=True)


@triton.jit
def first_word(t0: tl.tensor, t1: tl.tensor, t2: tl.tensor, t3: tl.tensor) -> tl.tensor:
    even, odd = upper_halves(t0, t2), upper_halves(t1, t3)  # of each half: bit 15 the sign, bits 4 to 10 the rest
    even = ((even >> 4) & 0x007F007F) | ((even >> 8) & 0x00800080)
    return even | ((odd << 4) & 0x7F007F00) | (odd & -0x7FFF8000)


@triton.jit
def second_word(t0: tl.tensor, t1: tl.tensor, t2: tl.tensor, t3: tl.tensor) -> tl.tensor:
    return ((upper_halves(t0, t2) >> 4) & 0x00FF00FF) | ((upper_halves(t1, t3) << 4) & -0x00FF0100)


@triton.jit
def block_exponent(largest: tl.tensor) -> tl.tensor:
    """Per row, the bits of the power of two that takes the largest magnitude below 1.875."""
    return (tl.max(largest, axis=1) + _ROOM) & 0x7F800000


@triton.jit
def larger_bits(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """Of two numbers above zero, as bits, since integers have the quicker reduction."""
    return tl.maximum(x.to(tl.int32, bitcast=True), y.to(tl.int32, bitcast=True))


@triton.jit
def next_word(r: tl.tensor) -> tl.tensor:
    """The word of the element eight blocks on."""
    return r * _LCG_MULTIPLY + _LCG_ADD
