"""What LoRA's thin matmuls share as Triton kernels: sums that are split over programs, and how a launch is cut.

A thin matmul makes a small output from much input, so an output has too few tiles to fill a GPU, and its long inner
dimension is split over programs. Each leaves its part in a workspace; the last to come, which a counter tells, adds all
parts in order and writes the output. The only atomic is that integer counter: bits do not depend on who comes last.
Where there are enough tiles nothing is split, and nothing but the output is written.

Counters are zero between launches: a program that was last sets its own back. They are one buffer for a device, so
launches of these kernels must not overlap: one stream, as a training step has.

Ranks are padded to a power of two of at least 16 inside, for tensor cores; more than `WIDEST` take several tiles.
Left out: float32, whose exact products are not tensor cores': ops.py leaves it to cuBLAS, which is also nearer, as its
chains of sums are shorter. A launch takes it in tests, interpreted; on a GPU its products would be rounded to TF32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from chronicals.kernels.fused.launch import device_limits
from chronicals.kernels.lora_thin import Block

DTYPES = (torch.bfloat16, torch.float16)
WIDEST = 128  # ranks of a tile
MOST_PARTS = 3  # adapters of a projection: q, k, v
COUNTERS = 2**16  # of a device: programs of a launch that splits
LONG = 8192  # tokens from which on a launch has much to do


class Config(NamedTuple):
    """How a launch is cut."""

    rows: int  # tokens of a tile
    columns: int  # of x or dy, of a tile
    warps: int
    stages: int
    programs: int  # of a multiprocessor, at most, where the inner dimension is split for them


@triton.jit
def _is_last(COUNTER: tl.tensor, splits: tl.tensor) -> tl.tensor:
    """Whether this program is the last of `splits` to come here. If so, it sees what the others stored before."""
    tl.debug_barrier()  # the atomic is one thread's, and releases what all threads have stored
    last = tl.atomic_add(COUNTER, 1, sem="acq_rel", scope="gpu") == splits - 1
    if last:
        tl.store(COUNTER, 0)
    return last


@triton.jit
def joined(
    total: tl.tensor, PLACE: tl.tensor, split: tl.tensor, splits: tl.tensor, distance: tl.tensor, COUNTER: tl.tensor
) -> tl.tensor:  # fmt: skip
    """Whether this program is the last of `splits` that share an output. If so, the sum of all their `total`, in order.

    PLACE: pointers to where the first leaves its own; the next does `distance` elements behind it.
    """
    tl.store(PLACE + split * distance, total)
    last = _is_last(COUNTER, splits)
    if last:
        total = tl.load(PLACE)
        for _ in range(1, splits):
            PLACE += distance
            total += tl.load(PLACE)
    return last, total


@triton.jit
def of_part(part: tl.tensor, a: tl.tensor, b: tl.tensor, c: tl.tensor, ALIGN: tl.constexpr) -> tl.tensor:
    return tl.multiple_of(tl.where(part == 0, a, tl.where(part == 1, b, c)), ALIGN)


@functools.cache
def counters(device: torch.device) -> Tensor:
    """Zeros, whenever no launch runs."""
    assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing(), "run once before the capture"
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def workspace(like: Tensor, count: int, partials: int, split: bool) -> tuple[Tensor | None, Tensor | None]:
    if not split:
        return None, None
    assert count <= COUNTERS, f"{count} outputs are enough without a split"
    return torch.empty(partials, dtype=torch.float32, device=like.device), counters(like.device)


def flat(blocks: Sequence[Block]) -> list[int]:
    assert len(blocks) <= MOST_PARTS
    return [number for block in (*blocks, *[Block(0, 0, 0, 0)] * (MOST_PARTS - len(blocks))) for number in block]


def width_for(ranks: int) -> int:
    return min(WIDEST, max(16, triton.next_power_of_2(ranks)))


def divisor(numbers: Iterable[int]) -> int:
    """The largest power of two, at most 16, that divides all."""
    return math.gcd(16, *numbers)


def stages(config: Config, size: int, device: torch.device) -> int:
    """Of loads, `size` bytes each: as many as shared memory has room for."""
    return max(1, min(config.stages, device_limits(device)[1] // size))
