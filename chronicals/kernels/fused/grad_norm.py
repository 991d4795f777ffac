"""The L2 norm of every gradient and of all of them: one pass over memory, the same bits every time.

Each program sums the squares of one tile in float32; then one program a tensor adds that tensor's partial sums, and
one more adds the tensors', each in a fixed order (docs/math/adamw.md bounds the rounding). No atomics, nothing
read back. A gradient is read once: 2 bytes a parameter in bfloat16, 4 in float32. Squares overflow where a gradient is
above 1.8e19, so that its norm is infinite, as torch's is. Left out: tensors that are not contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from chronicals.kernels.fused.pointers import PointerTable

TILE = 16384
PART = 4096  # elements in flight
REDUCE = 1024
NUM_WARPS = 8
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_TILE, _PART = tl.constexpr(TILE), tl.constexpr(PART)


@triton.jit
def square_sums_kernel(
    ADDRESSES: tl.tensor,  # (1, tensors) int64
    SIZES: tl.tensor,  # (tensors,) int64
    TILES: tl.tensor,  # (programs, 2) int32
    PARTIAL: tl.tensor,  # (programs,) float32
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    tensor, tile = tl.load(TILES + 2 * program), tl.load(TILES + 2 * program + 1).to(tl.int64)
    left = tl.minimum(tl.load(SIZES + tensor) - tile * _TILE, _TILE).to(tl.int32)
    pointer = tl.load(ADDRESSES + tensor).to(tl.pointer_type(DTYPE)) + tile * _TILE
    if ALIGNED:
        left, pointer = tl.multiple_of(left, 16), tl.multiple_of(pointer, 16)
    total = tl.zeros((_PART,), tl.float32)
    for part in tl.static_range(_TILE // _PART):
        at = part * _PART + tl.arange(0, _PART)
        x = tl.load(pointer + at, mask=at < left, other=0).to(tl.float32)
        total += x * x
    tl.store(PARTIAL + program, tl.sum(total))


@triton.jit
def tensor_norms_kernel(
    PARTIAL: tl.tensor,  # float32
    FIRST: tl.tensor,  # (tensors + 1,) int32: where a tensor's part begins; None: one, of `count`
    NUMBERS: tl.tensor,  # (tensors,) int32: the place of each tensor's norm; None: 0
    NORMS: tl.tensor,  # float32
    count: tl.tensor,
    SQUARED: tl.constexpr,  # PARTIAL holds squares; otherwise norms
    BLOCK: tl.constexpr,
) -> None:
    tensor = tl.program_id(0)
    first, last, place = 0, count, 0
    if FIRST is not None:
        first, last, place = tl.load(FIRST + tensor), tl.load(FIRST + tensor + 1), tl.load(NUMBERS + tensor)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(PARTIAL + at, mask=at < last, other=0.0)
        total += x if SQUARED else x * x
    tl.store(NORMS + place, tl.sqrt_rn(tl.sum(total)))


class GradNorm:
    """Norms of the same P tensors again and again; their addresses may change from call to call.

    Args:
        tensors: contiguous, on one device; of any of the three dtypes, mixed too.

    Attributes:
        norms: (P,) float32, of each tensor; written anew by each call, as the next one.
        total: () float32, of all of them.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        assert tensors, "nothing to measure"
        device = tensors[0].device
        self._like = [(t.dtype, t.numel()) for t in tensors]
        members: dict[tuple[torch.dtype, bool], list[int]] = {}
        for i, (dtype, size) in enumerate(self._like):
            members.setdefault((dtype, size % 16 == 0), []).append(i)
        self._groups = [
            (dtype, regular, mine, PointerTable([[tensors[i] for i in mine]], [tensors[i].numel() for i in mine], TILE))
            for (dtype, regular), mine in members.items()
        ]
        self._partial = [torch.zeros(table.programs, device=device) for *_, table in self._groups]
        self._numbers = [torch.tensor(mine, dtype=torch.int32, device=device) for _, _, mine, _ in self._groups]
        self.norms, self.total = torch.zeros(len(tensors), device=device), torch.zeros((), device=device)

    def bind(self, tensors: Sequence[Tensor]) -> None:
        """Read `tensors` from now on; a call does it too, but may not while a graph is captured."""
        assert [(t.dtype, t.numel()) for t in tensors] == self._like, "not the tensors that this was made for"
        assert all(t.is_contiguous() for t in tensors)
        for _, _, mine, table in self._groups:
            table.set(0, [tensors[i] for i in mine])

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """`norms` and `total` of `tensors`."""
        self.bind(tensors)
        for (dtype, regular, mine, table), partial, numbers in zip(
            self._groups, self._partial, self._numbers, strict=True
        ):
            if table.programs:
                square_sums_kernel[(table.programs,)](
                    table.addresses, table.sizes, table.tiles, partial,
                    DTYPE=TRITON_DTYPES[dtype], ALIGNED=regular and table.aligned, num_warps=NUM_WARPS,
                )  # fmt: skip
            tensor_norms_kernel[(len(mine),)](
                partial, table.first_tile, numbers, self.norms, 0, SQUARED=True, BLOCK=REDUCE, num_warps=4
            )
        tensor_norms_kernel[(1,)](
            self.norms, None, None, self.total, len(self.norms), SQUARED=False, BLOCK=REDUCE, num_warps=4
        )
        return self.norms, self.total
