"""A 64-bit digest of a tensor's bits, computed where the tensor lives, so that "has it changed?" never copies it.

The digest is `sum_i bits_i * w_i mod 2^64` with pseudo-random odd weights `w_i`: no copy of the tensor is kept and
the order of summation does not matter, so it is the same on every device and for every number of threads. One changed
element always changes it (an odd weight is invertible mod 2^64); several changes cancel with a chance of about 2^-64.
The guard asks with it whether a tensor moved, checkpoints whether the file holds what was live. It is no defence
against a forger, and is not meant to be. On a GPU with fused kernels all tensors are one pass over memory
(`kernels/fused/digest.py`): by the operations below, 290 tensors of a 0.5B model are some 4700 launches, which take the
host longer than a step of 4096 tokens takes the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from chronicals.kernels.capability import why_not_fused

_BLOCK = 1 << 16  # elements that share one set of weights; its int64 products stay in a core's cache
_BLOCKS_PER_PASS = {"cpu": 1, "cuda": 128}  # on a GPU large passes: few launches, temporaries of 64 MiB
_MIX = (
    -7046029254386353131
)  # 2^64 / golden ratio as a signed 64-bit integer: spreads neighbouring indices over all bits
_BITS_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensor: Tensor) -> Tensor:
    """The digest of `tensor` (any shape and dtype): a () int64 tensor on its device. Nothing is read back to the
    host."""
    bits = tensor.detach().contiguous().view(-1).view(_BITS_OF_SIZE[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    width, step = min(_BLOCK, bits.numel()), _BLOCKS_PER_PASS[tensor.device.type]
    weights = _weights(width, tensor.device)
    for number, part in enumerate(bits.split(step * _BLOCK)):
        blocks = F.pad(part, (0, -len(part) % width)).view(-1, width)
        sums = (blocks.to(torch.int64) * weights).sum(1)
        # A block's own odd factor, so that equal elements of two blocks do not weigh the same.
        total += (sums * torch.arange(1, 2 * len(sums), 2, device=tensor.device).add_(2 * number * step)).sum()
    return total


def digests_for(tensors: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], Tensor]:
    """A function of P tensors of these sizes and dtypes, of one device: their digests, (P,) int64."""
    device = tensors[0].device
    if device.type != "cuda" or why_not_fused(device):
        return plain_digests
    from chronicals.kernels.fused.digest import Digests  # triton: only where there is a GPU

    return Digests(tensors)


def plain_digests(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([digest(tensor) for tensor in tensors])


def hex_digests(tensors: Iterable[Tensor]) -> list[str]:
    """Digests as files hold them, read back in one go."""
    tensors = list(tensors)
    return [f"{value & (1 << 64) - 1:016x}" for value in digests_for(tensors)(tensors).tolist()]


def _weights(length: int, device: torch.device) -> Tensor:
    """(length,) int64: odd and without pattern; products of a counter alone would let regular changes cancel."""
    mixed = torch.arange(1, length + 1, dtype=torch.int64, device=device) * _MIX
    return ((mixed ^ (mixed >> 31)) * _MIX) | 1
