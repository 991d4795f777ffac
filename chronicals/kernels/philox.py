"""Philox4x32, the random numbers of stochastic rounding and of dropout: a function of counter and key, with no state.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011. The key is a run's seed, so that all calls of a run
must differ in their counters: the last of the four says what for.
"""

from __future__ import annotations

import torch
from torch import Tensor

PHILOX_ROUNDS = 7  # the fewest that pass BigCrush (table 2 of the paper)
ROUNDING, DROPOUT = 0, 1  # the last counter of a call


def philox4x32(
    c0: Tensor, c1: int, c2: int | Tensor, c3: int, *, seed: int, rounds: int = PHILOX_ROUNDS
) -> list[Tensor]:
    """Four int64 tensors of 32-bit words, of the shape of `c0`; counters modulo 2^32, `seed` has up to 64 bits."""
    mask = 0xFFFFFFFF
    counters = (c if isinstance(c, Tensor) else torch.full((), c, device=c0.device) for c in (c0, c1, c2, c3))
    words = [c.to(torch.int64).expand_as(c0) & mask for c in counters]  # full, not as_tensor: a graph can record it
    key0, key1 = seed & mask, seed >> 32 & mask
    for _ in range(rounds):
        # int64 products wrap modulo 2^64, which keeps all bits of an unsigned one
        even, odd = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            (odd >> 32 & mask) ^ words[1] ^ key0,
            odd & mask,
            (even >> 32 & mask) ^ words[3] ^ key1,
            even & mask,
        ]
        key0, key1 = key0 + 0x9E3779B9 & mask, key1 + 0xBB67AE85 & mask
    return words
