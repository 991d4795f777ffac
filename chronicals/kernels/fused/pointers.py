"""Tables of pointers: one launch over many tensors that stay where they are.

A kernel finds its work in two tables on the device: which tensor and which tile of it a program has, and the addresses
of that tensor. Both are made once; where tensors come anew at each step (gradients that autograd returned), their row
of addresses is copied from page-locked memory, and only then. Under a CUDA graph addresses may not change, so whoever
captures calls `set` before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes of a vectorised access


class PointerTable:
    """Addresses of N tensors, each with several pieces of memory (weight, gradient, ...), one row a piece.

    Attributes:
        addresses: (pieces, N) int64 on the device, bytes; 0 where a tensor has no such piece.
        tiles: (programs, 2) int32: tensor, and tile of it.
        sizes: (N,) int64: elements.
        first_tile: (N + 1,) int32: where each tensor's tiles begin in `tiles`.
        aligned: whether every address is a multiple of `ALIGNMENT`.
    """

    def __init__(self, rows: Sequence[Sequence[Tensor | None]], sizes: Sequence[int], tile: int) -> None:
        device = next(t.device for row in rows for t in row if t is not None)
        counts = torch.tensor([-(-size // tile) for size in sizes])
        first = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
        tensor = torch.arange(len(sizes)).repeat_interleave(counts)
        self.programs = len(tensor)
        assert self.programs < 2**31
        self.tiles = torch.stack((tensor, torch.arange(self.programs) - first[tensor]), 1).int().to(device)
        self.sizes = torch.tensor(sizes, dtype=torch.int64, device=device)
        self.first_tile = first.int().to(device)
        self._known = [[0 if t is None else t.data_ptr() for t in row] for row in rows]
        self.addresses = torch.tensor(self._known, dtype=torch.int64, device=device)

    @property
    def aligned(self) -> bool:
        return all(address % ALIGNMENT == 0 for row in self._known for address in row)

    def set(self, row: int, tensors: Sequence[Tensor]) -> None:
        """Let `row` point at `tensors`; costs nothing where it does already, and never waits for the device."""
        addresses = [t.data_ptr() for t in tensors]
        if addresses == self._known[row]:
            return
        on_gpu = self.addresses.is_cuda
        assert not (on_gpu and torch.cuda.is_current_stream_capturing()), "set the addresses before the capture"
        values = torch.tensor(addresses, dtype=torch.int64)
        # page-locked memory goes back to its pool only after the copy has run
        self.addresses[row].copy_(values.pin_memory() if on_gpu else values, non_blocking=True)
        self._known[row] = addresses
