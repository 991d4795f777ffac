"""64-bit digests of many tensors in one pass over memory: chronicals/train/digest.py says of what, and that they are
the same bits.

Each program adds up the weighted bits of one tile, modulo 2^64, so that any order gives the same sum; a tensor's digest
is the sum over its tiles. Weights are made where they are used: 3 products of 64 bits an element, which hide behind the
reads. One launch for tensors of one width of element, where operations on whole tensors are thousands and move some 36
bytes an element. Nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from chronicals.kernels.fused.pointers import PointerTable

TILE = 16384
PART = 2048  # elements in flight
NUM_WARPS = 8
BLOCK = 1 << 16  # elements that share one set of weights
MIX = -7046029254386353131  # 2^64 / golden ratio as a signed 64-bit integer
BITS = {1: tl.uint8, 2: tl.int16, 4: tl.int32, 8: tl.int64}  # of an element, by its size

_TILE, _PART, _BLOCK, _MIX = tl.constexpr(TILE), tl.constexpr(PART), tl.constexpr(BLOCK), tl.constexpr(MIX)


@triton.jit
def digest_kernel(
    ADDRESSES: tl.tensor,  # (1, tensors) int64
    SIZES: tl.tensor,  # (tensors,) int64
    TILES: tl.tensor,  # (programs, 2) int32
    PARTIAL: tl.tensor,  # (programs,) int64
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    tensor, tile = tl.load(TILES + 2 * program), tl.load(TILES + 2 * program + 1).to(tl.int64)
    start = tile * _TILE
    left = tl.minimum(tl.load(SIZES + tensor) - start, _TILE).to(tl.int32)
    pointer = tl.load(ADDRESSES + tensor).to(tl.pointer_type(DTYPE)) + start
    if ALIGNED:
        left, pointer = tl.multiple_of(left, 16), tl.multiple_of(pointer, 16)
    mix = tl.full((_PART,), _MIX, tl.int64)
    total = tl.zeros((_PART,), tl.int64)
    for part in range(_TILE // _PART):  # unrolled, all its loads would be on their way: 254 registers
        at = part * _PART + tl.arange(0, _PART)
        bits = tl.load(pointer + at, mask=at < left, other=0).to(tl.int64)
        mixed = (start % _BLOCK + at + 1) * mix
        total += bits * (((mixed ^ (mixed >> 31)) * mix) | 1)
    # a block's own odd factor, so that equal elements of two blocks do not weigh the same
    tl.store(PARTIAL + program, tl.sum(total) * (2 * (start // _BLOCK) + 1))


class Digests:
    """Digests of the same P tensors again and again; their addresses may change from call to call.

    Args:
        tensors: on one device, of any dtypes.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._like = [(t.element_size(), t.numel()) for t in tensors]
        members: dict[int, list[int]] = {}
        for i, (size, _) in enumerate(self._like):
            members.setdefault(size, []).append(i)
        self._device = tensors[0].device
        tensors = [t.detach().contiguous() for t in tensors]
        self._groups = [
            (
                size,
                all(self._like[i][1] % 16 == 0 for i in mine),
                torch.tensor(mine, device=self._device),
                PointerTable([[tensors[i] for i in mine]], [tensors[i].numel() for i in mine], TILE),
            )
            for size, mine in members.items()
        ]
        self._members = list(members.values())

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """(P,) int64."""
        assert [(t.element_size(), t.numel()) for t in tensors] == self._like, "not the tensors this was made for"
        tensors = [t.detach().contiguous() for t in tensors]
        found = torch.zeros(len(tensors), dtype=torch.int64, device=self._device)
        for (size, regular, numbers, table), mine in zip(self._groups, self._members, strict=True):
            table.set(0, [tensors[i] for i in mine])
            sums = torch.zeros(table.programs + 1, dtype=torch.int64, device=self._device)
            if table.programs:
                digest_kernel[(table.programs,)](
                    table.addresses, table.sizes, table.tiles, sums[1:],
                    DTYPE=BITS[size], ALIGNED=regular and table.aligned, num_warps=NUM_WARPS,
                )  # fmt: skip
            sums = sums.cumsum(0)[table.first_tile.long()]  # modulo 2^64, where differences are exact
            found[numbers] = sums[1:] - sums[:-1]
        return found
