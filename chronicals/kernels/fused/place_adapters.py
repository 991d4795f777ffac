"""Adapters to where the joined matmuls read them, in one launch.

Each pair of a source and a view of a joined buffer is cut into tiles of `TILE` words; tables on the device, made once,
say which tile a program has, and where. Bits are copied, so a word is as wide as all addresses, strides and widths
allow, up to 8 bytes, whatever the dtype. A tile is as wide as its pair is best covered by: a B is 32 columns wide where
an A has thousands.

Bytes: each adapter read and written once. Left out: sources that are not contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from chronicals.kernels.lora import check_pairs

TILE, NUM_WARPS = 2048, 4
WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16}
_TILE = tl.constexpr(TILE)


@triton.jit
def place_adapters_kernel(
    PAIRS: tl.tensor,  # (pairs, 6) int64: addresses of source and place, rows, columns, the place's stride, log2(width)
    TILES: tl.tensor,  # (programs, 3) int32: pair, first row, first column
    WORD: tl.constexpr,
) -> None:
    tile = TILES + 3 * tl.program_id(0)
    pair = PAIRS + 6 * tl.load(tile).to(tl.int64)
    first_row, first_column = tl.load(tile + 1), tl.load(tile + 2)
    rows, columns, stride = tl.load(pair + 2), tl.load(pair + 3), tl.load(pair + 4)
    source = tl.load(pair).to(tl.pointer_type(WORD)) + first_row * columns + first_column
    place = tl.load(pair + 1).to(tl.pointer_type(WORD)) + first_row * stride + first_column
    at, width = tl.arange(0, _TILE), tl.load(pair + 5).to(tl.int32)
    row, column = at >> width, at & ((1 << width) - 1)
    inside = (row < (rows - first_row).to(tl.int32)) & (column < (columns - first_column).to(tl.int32))
    word = tl.load(source + row * columns + column, mask=inside)
    tl.store(place + row * stride + column, word, mask=inside)


def place_adapters(pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """As `chronicals.kernels.lora.place_adapters`; a call of the plan is one launch, however many pairs it has."""
    check_pairs(pairs)
    pairs = [pair for pair in pairs if pair[0].numel()]
    word = min((_word(*pair) for pair in pairs), default=8)
    rows, tiles = [], []
    for i, (source, place) in enumerate(pairs):
        height, size = source.shape[0], source.element_size()
        columns, stride = source.shape[1] * size // word, place.stride(0) * size // word
        width = _width(height, columns)
        rows.append((source.data_ptr(), place.data_ptr(), height, columns, stride, width))
        row, column = torch.arange(0, height, TILE >> width), torch.arange(0, columns, 1 << width)
        tiles.append(torch.cartesian_prod(torch.tensor([i]), row, column))
    if not pairs:
        return lambda: None
    device, held = pairs[0][0].device, list(pairs)  # addresses alone keep no memory alive
    table, programs = torch.tensor(rows, dtype=torch.int64, device=device), torch.cat(tiles).int().to(device)

    def launch() -> None:
        assert held
        place_adapters_kernel[(len(programs),)](table, programs, WORD=WORDS[word], num_warps=NUM_WARPS)

    return launch


def _word(source: Tensor, place: Tensor) -> int:
    """Bytes of the widest word that divides a row of both, and where they begin."""
    size = source.element_size()
    stride = place.stride(0) if place.shape[0] > 1 else 0  # of a single row it says nothing
    lengths = (source.data_ptr(), place.data_ptr(), source.shape[1] * size, stride * size)
    return max(word for word in WORDS if all(length % word == 0 for length in lengths))


def _width(rows: int, columns: int) -> int:
    """log2 of the width of tiles: the fewest lanes without work, then the widest."""

    def lanes(width: int) -> int:
        height = TILE >> width
        return triton.cdiv(rows, height) * height * triton.cdiv(columns, 1 << width) * (1 << width)

    return min(reversed(range(TILE.bit_length())), key=lanes)
