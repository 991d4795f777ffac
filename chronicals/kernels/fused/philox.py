"""Philox4x32 in registers, as `chronicals/kernels/philox.py` defines it.

Not tl.philox: a product in 64 bits is one instruction, its two halves are two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from chronicals.kernels.philox import PHILOX_ROUNDS

_ROUNDS = tl.constexpr(PHILOX_ROUNDS)


@triton.jit
def philox(seed: tl.tensor, c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor) -> tl.tensor:
    """Four words of 32 bits as int32; `seed` is an int64, the counters are int32, all of one shape."""
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = c0.to(tl.uint32, bitcast=True), c1.to(tl.uint32, bitcast=True)
    c2, c3 = c2.to(tl.uint32, bitcast=True), c3.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(_ROUNDS):
        even, odd = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (odd >> 32).to(tl.uint32) ^ c1 ^ key0, (even >> 32).to(tl.uint32) ^ c3 ^ key1
        c1, c3 = odd.to(tl.uint32), even.to(tl.uint32)
        key0, key1 = key0 + 0x9E3779B9, key1 + 0xBB67AE85
    return (
        c0.to(tl.int32, bitcast=True),
        c1.to(tl.int32, bitcast=True),
        c2.to(tl.int32, bitcast=True),
        c3.to(tl.int32, bitcast=True),
    )
