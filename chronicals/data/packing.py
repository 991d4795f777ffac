"""Bin packing of document lengths: which documents share a bin of the token stream.

Every slot of a bin that holds no document is computed and thrown away, so the number of bins is the cost of an epoch.
Best-Fit Decreasing never uses more than 3/2 of the fewest possible bins, nor more than 11/9 of them plus 4; on real
lengths it comes within a few percent of the fewest. docs/math/packing.md has the theorems and what was measured.

A pure function of integers: exact, deterministic, no tensors. Left out: exact solvers (nothing left to gain that would
pay for them) and online packing of streams, which cannot sort.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np

from chronicals.errors import UserError

ALGORITHMS = ("bfd", "ffd", "none")


def pack(lengths: Sequence[int] | np.ndarray, capacity: int, algorithm: str = "bfd") -> list[list[int]]:
    """Partition documents into bins whose lengths sum to at most `capacity`.

    Args:
        lengths: n integers in 1..capacity, the tokens of each document; a numpy array or any sequence.
        capacity: tokens a bin holds.
        algorithm: "bfd", Best-Fit Decreasing: longest first, each into the fullest open bin that still has room for it;
            "ffd", First-Fit Decreasing: each into the earliest opened bin that has room; both open a bin where none
            has; "none": one document a bin, in order. Equal lengths are placed in input order, and of equally full bins
            the earliest opened is taken: the result is a function of the arguments alone.

    Returns:
        The bins in the order they were opened; in each, document indices in the order they were placed.

    Raises:
        UserError (a ValueError): a length that is no integer, below 1 or above `capacity`, with its index; an unknown
        algorithm.

    Time O(n log n): a million lengths take about a second.
    """
    if algorithm not in ALGORITHMS:
        raise UserError(f"packing algorithm {algorithm!r} is not known", f"use one of {', '.join(ALGORITHMS)}")
    sizes = _checked(lengths, capacity)
    if algorithm == "none":
        return [[i] for i in range(len(sizes))]
    return _pack_decreasing(sizes, int(capacity), best_fit=algorithm == "bfd")


def _pack_decreasing(sizes: np.ndarray, capacity: int, *, best_fit: bool) -> list[list[int]]:
    """Both algorithms, one group of equal lengths at a time.

    The open bins with room for the current length L wait in a heap, first choice on top: by (room, age) for best fit,
    by age for first fit. The choice, with room r, takes r // L documents of the group at once, because it stays the
    first choice while one more fits: for first fit nothing about it changed; for best fit every other bin in the heap
    has at least room r, and its own shrank. What is left is below L, so it leaves the heap and waits for the largest
    length of the input that fits. Lengths only fall, so a bin enters and leaves the heap at most once per document it
    receives.
    """
    order = np.argsort(-sizes, kind="stable")
    descending, starts = np.unique(-sizes[order], return_index=True)
    ascending = (-descending[::-1]).tolist()
    edges = [*starts.tolist(), len(sizes)]
    documents: list[int] = order.tolist()

    bins: list[list[int]] = []
    room: list[int] = []
    heap: list[int] = []  # room * stride + bin for best fit, bin for first fit
    stride = len(sizes) + 1  # above any bin number
    waiting: list[list[int]] = [[] for _ in ascending]  # by rank of the longest length that fits
    for rank, length in reversed(list(enumerate(ascending))):
        start, stop = edges[-rank - 2], edges[-rank - 1]
        for chosen in waiting[rank]:
            heappush(heap, room[chosen] * stride + chosen if best_fit else chosen)
        while start < stop:
            if heap:
                chosen = heappop(heap) % stride
            else:
                chosen = len(bins)
                bins.append([])
                room.append(capacity)
            taken = min(room[chosen] // length, stop - start)
            bins[chosen] += documents[start : start + taken]
            start += taken
            room[chosen] = left = room[chosen] - taken * length
            if left >= length:  # the group is placed
                heappush(heap, left * stride + chosen if best_fit else chosen)
            elif left >= ascending[0]:
                waiting[bisect_right(ascending, left) - 1].append(chosen)
    return bins


def _checked(lengths: Sequence[int] | np.ndarray, capacity: int) -> np.ndarray:
    """(n,) int64: the lengths, each known to be an integer in 1..capacity."""
    if isinstance(capacity, bool) or not isinstance(capacity, (int, np.integer)) or capacity < 1:
        raise UserError(f"bin capacity {capacity!r} is not a positive integer", "set sequence_len to a bin's tokens")
    sizes = np.asarray(lengths)
    if sizes.dtype.kind not in "iu":  # floats, strings, objects, integers beyond 64 bits, or nothing at all
        for i, length in enumerate(lengths):
            if isinstance(length, (bool, np.bool_)) or not isinstance(length, (int, np.integer)):
                raise UserError(f"length {length!r} of document {i} is not an integer")
        sizes = sizes.astype(object)
    assert sizes.ndim == 1, "lengths are a flat sequence"
    bad = np.flatnonzero((sizes < 1) | (sizes > capacity))
    if bad.size:
        i, length = int(bad[0]), int(sizes[bad[0]])
        if length < 1:
            raise UserError(f"length {length} of document {i} is below 1", "leave empty documents out")
        raise UserError(
            f"length {length} of document {i} is above the bin capacity {capacity}",
            "raise sequence_len, or drop, truncate or split over-long documents",
        )
    return sizes.astype(np.int64)
