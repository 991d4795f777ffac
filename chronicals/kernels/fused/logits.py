"""Where the logits of linear cross-entropy lie: how many of them exist at a time, and in whose memory.

There are R V of them, R supervised rows and V columns of the vocabulary, and no pass wants them all at once. A `Plan`
is chunks of rows against the whole vocabulary (`fast`) or blocks of columns for all rows (`frugal`);
linear_cross_entropy.py walks over them. Where one chunk is all, its logits lie in memory that the sink lends, gradients
that come later: whole, or where that is too small their first columns.

Left out: several chunks in lent memory, which dW's float32 sum takes there.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from triton import cdiv

CHUNK_ROWS = 4096  # below that, matmuls with a small H fall off and dW is re-read often
LEAST_CHUNK_ROWS = 1024  # of a frozen weight always: there is no dW
FRUGAL_LOGITS = 90_000_000  # bytes of a block of logits: with dH and h, 132 MB at 8192 x 896 x 151936
FRUGAL_COLUMNS = 6000  # a block of dlogits is then read back from L2, in part
ALIGNMENT = 64  # columns: row strides that cuBLAS's widest loads take, whatever the vocabulary
KEPT_FREE = 0.1  # of the free memory, for fragmentation
LEAST_LENT = 0.25  # of the columns: less is not worth a second sweep that finds nothing in L2


class Plan(NamedTuple):
    """How much of the (R, V) logits exists at a time."""

    chunk_rows: int  # against the whole vocabulary; 0: all rows, by blocks of columns
    block_columns: int  # for all rows, where the walk is by blocks
    lent_columns: int = 0  # of a single chunk, in lent memory: all, none, or whole tiles of the matmul

    @classmethod
    def fast(cls, rows: int, vocab: int, chunk_rows: int, room: int = 0) -> Plan:
        """Even chunks of at most `chunk_rows`, or blocks of as many logits; `room`: for so many is memory lent."""
        chunks = max(1, cdiv(rows, chunk_rows))
        chunk = cdiv(rows, chunks)
        if chunks > 1:
            chunk = min(round_up(chunk, 128), chunk_rows)  # whole tiles of the matmul
        lent = _lent_columns(rows, vocab, room) if chunk >= rows else 0
        return cls(chunk, min(vocab, round_up(cdiv(vocab, chunks), 128)), lent)

    @classmethod
    def frugal(cls, rows: int, vocab: int, itemsize: int) -> Plan:
        """Even blocks of at most `FRUGAL_LOGITS` bytes and `FRUGAL_COLUMNS` columns, but 128 columns at least."""
        most = min(FRUGAL_COLUMNS, FRUGAL_LOGITS // (max(1, rows) * itemsize))
        most = max(128, most // 128 * 128)
        blocks = cdiv(vocab, most)
        return cls(0, min(vocab, round_up(cdiv(vocab, blocks), 128)))


def round_up(n: int, multiple: int) -> int:
    return cdiv(n, multiple) * multiple


def _lent_columns(rows: int, vocab: int, room: int) -> int:
    if rows == 0:
        return 0
    columns = room // rows // 128 * 128
    if columns >= round_up(vocab, ALIGNMENT):
        return vocab
    columns = min(columns, (vocab - 2) // 128 * 128)
    return columns if columns >= LEAST_LENT * vocab else 0


def plan_for(
    mode: str, chunk_rows: int | None, rows: int, weight: Tensor, rounds: bool, scratch: Tensor | None
) -> Plan:
    """The plan that a mode stands for. `auto` asks for the free memory once for a shape and keeps to its answer, so
    that a captured graph and its warm-up agree.

    Args:
        rounds: dW adds up in float32 over several chunks, and is rounded then.
        scratch: (n,) uint8 that is lent, or None.
    """
    itemsize = weight.element_size()
    room = 0 if scratch is None else scratch.nbytes // itemsize
    if mode == "frugal":
        return Plan.frugal(rows, len(weight), itemsize)
    most = chunk_rows or (CHUNK_ROWS if weight.requires_grad else LEAST_CHUNK_ROWS)
    if mode == "auto" and weight.device.type == "cuda":
        least = chunk_rows or LEAST_CHUNK_ROWS
        return by_free_memory(weight.device, most, least, rows, *weight.shape, itemsize, rounds, room)
    return Plan.fast(rows, len(weight), most, room)


@functools.cache
def by_free_memory(
    device: torch.device,
    most: int,
    least: int,
    rows: int,
    vocab: int,
    features: int,
    itemsize: int,
    rounds: bool,
    room: int,
) -> Plan:
    """`fast` with the largest chunk that fits, of `most` rows and halves of it down to `least`; `frugal` where none
    does. What is lent needs no memory."""
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    total = 4 * vocab * features
    while most >= least:
        plan = Plan.fast(rows, vocab, most, room)
        columns = round_up(vocab - plan.lent_columns, ALIGNMENT)
        needed = plan.chunk_rows * (columns + 2 * features) * itemsize
        if rounds and plan.chunk_rows < rows and room * itemsize < total:
            needed += total
        if needed <= (1 - KEPT_FREE) * free:
            return plan
        most //= 2
    return Plan.frugal(rows, vocab, itemsize)


def column_blocks(vocab: int, columns: int) -> list[slice]:
    """Blocks of at most `columns`; what does not fill 8 is one of its own at the end, of two columns at least.

    cuBLAS takes its slow kernels wherever a dimension is not a multiple of 16 bytes, even if the strides are. A product
    of one column is a matrix times a vector to it (`gemvx`), whose offsets are 32 bits: past 2^31 logits it writes
    outside them (seen on an H200, CUDA 13.0, torch 2.11), where every other product here is right.
    """
    aligned = vocab // 8 * 8
    if vocab == aligned + 1 > 1:
        aligned -= 8
    cuts = [*range(0, aligned, columns), aligned, vocab]
    return [slice(start, stop) for start, stop in itertools.pairwise(cuts) if start < stop]


def logits_buffer(rows: int, columns: int, weight: Tensor, scratch: Tensor | None = None) -> Tensor:
    """(rows, at least `columns`), in `scratch` where there is one."""
    shape = rows, round_up(columns, ALIGNMENT)
    if scratch is None:
        return torch.empty(shape, dtype=weight.dtype, device=weight.device)
    return scratch.view(weight.dtype)[: shape[0] * shape[1]].view(shape)


def kept_logits(rows: int, weight: Tensor, scratch: Tensor | None, columns: int) -> list[tuple[slice, Tensor]]:
    """Blocks of columns and where the logits of each lie: the first `columns` in `scratch`."""
    rest = logits_buffer(rows, len(weight) - columns, weight)
    more = column_blocks(len(weight) - columns, len(weight))
    return [
        (slice(0, columns), logits_buffer(rows, columns, weight, scratch)),
        *((slice(columns + block.start, columns + block.stop), rest[:, block]) for block in more),
    ]


def passing_logits(rows: int, weight: Tensor, columns: int) -> list[tuple[slice, Tensor]]:
    """Blocks of at most `columns`, whose logits lie in one place, one after another."""
    vocab = len(weight)
    buffer = logits_buffer(rows, min(columns, vocab), weight)
    return [(block, buffer[:, : block.stop - block.start]) for block in column_blocks(vocab, columns)]


def as_float32(scratch: Tensor | None, weight: Tensor) -> Tensor | None:
    """`scratch` as float32 of the weight's shape, where it is large enough."""
    if scratch is None or scratch.nbytes < 4 * weight.numel():
        return None
    return scratch.view(torch.float32)[: weight.numel()].view(weight.shape)
