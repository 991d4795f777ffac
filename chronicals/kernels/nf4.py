"""NF4 weights with double quantisation: four bits an element, in the bits of bitsandbytes.

Dettmers et al., "QLoRA", 2023. 64 consecutive elements of a row are a block: its largest magnitude, absmax, and for
each element the nearest of 16 values, quantiles of the normal distribution. Double quantisation keeps absmax in 8 bits:
what is left of it beyond the mean of all blocks is a multiple, from a table of 256, of the largest of 256 blocks.

    w = value[code] * absmax        absmax = table[byte] * scale + offset

each operation rounded to float32, the last to the dtype that is asked for; the bounds are in docs/math/nf4.md.
`quantize` gives the codes of bitsandbytes 0.50.2 (its portable backend; the CUDA one is built with approximate
division, its CPU one looks the byte up in a table of 65,536 steps: a byte may differ there), `dequantize` the bits of
its `dequantize_4bit`. This is the reference and the CPU's; the GPU's is fused/nf4.py.

Left out: FP4, other block sizes, rows that are no multiple of a block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64  # elements that share an absmax
NESTED_BLOCK = 256  # of these, that share a scale
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_CHUNK = 2**22  # elements quantised at a time: what bounds the temporaries


@dataclass(frozen=True)
class NF4Weight:
    """A weight (N, K) in NF4; all tensors lie on one device, contiguous.

    Attributes:
        codes: (N, K / 2) uint8, two elements a byte, the first in the high half.
        absmax: (N, K / 64) uint8, or float32 where absmax is not quantised.
        scales: (G, 2) float32: scale and offset of each `group` consecutive blocks, counted through the rows; None
            where absmax is not quantised.
        tables: (16 + 256,) float32: the values of a code, then those of a byte of absmax; (16,) without.
    """

    codes: Tensor
    absmax: Tensor
    scales: Tensor | None
    tables: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], 2 * self.codes.shape[1]

    @property
    def group(self) -> int:
        """Blocks that share a scale: 256, or a smaller power of two in a stack of weights; 0 without scales."""
        return 0 if self.scales is None else _group(self.absmax.numel(), len(self.scales))


def _group(blocks: int, scales: int) -> int:
    group = NESTED_BLOCK
    while -(-blocks // group) < scales:
        group //= 2
    return group


@functools.cache
def dynamic_map() -> Tensor:
    """(256,) float32, ascending: bitsandbytes' signed dynamic 8-bit type (Dettmers, "8-bit Approximations for
    Parallelism in Deep Learning", 2015): 7 decades below 1, each divided twice as finely as the one below it."""
    points = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = 10.0 ** (decade - 6) * ((bounds[:-1] + bounds[1:]) / 2)
        points += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(points), dtype=torch.float32)


@functools.cache
def tables(device: torch.device, double_quant: bool = True) -> Tensor:
    """`NF4Weight.tables` of what `quantize` makes."""
    values = torch.tensor(VALUES, dtype=torch.float32)
    return torch.cat((values, dynamic_map()) if double_quant else (values,)).to(device)


def check_shape(rows: int, columns: int) -> None:
    """Raises ValueError where blocks would not end with the rows."""
    if columns % BLOCK:
        raise ValueError(f"NF4 takes rows of a multiple of {BLOCK} elements, these are {rows} x {columns}")


def quantize(weight: Tensor, *, double_quant: bool = True) -> NF4Weight:
    """A weight in NF4, on its device.

    Args:
        weight: (N, K), float32, bfloat16 or float16, K a multiple of 64.
        double_quant: absmax in 8 bits.

    Raises:
        ValueError: another K or dtype.
    """
    rows, columns = weight.shape
    check_shape(rows, columns)
    if weight.dtype not in DTYPES:
        raise ValueError(f"NF4 is made from float32, bfloat16 and float16, not {weight.dtype}")
    values = tables(weight.device, double_quant)
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(rows, columns // BLOCK, dtype=torch.float32, device=weight.device)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = weight[start : start + step]
        blocks = part.float().view(-1, BLOCK)
        found, largest = _nearest(blocks, values[: len(VALUES)])
        found = found.view(len(part), -1)
        codes[start : start + step] = found[:, ::2] << 4 | found[:, 1::2]
        absmax[start : start + step] = largest.view(len(part), -1)
    if not double_quant:
        return NF4Weight(codes, absmax, None, values)
    offset = absmax.mean()
    rest = (absmax - offset).view(-1)
    groups = torch.nn.functional.pad(rest, (0, -len(rest) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    found, largest = _nearest(groups, values[len(VALUES) :])
    scales = torch.stack((largest, offset.expand_as(largest)), dim=1)
    return NF4Weight(codes, found.view(-1)[: len(rest)].view_as(absmax), scales, values)


def _nearest(blocks: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(n, size) float32 -> the index of the value nearest to each element over its block's largest magnitude, uint8,
    the lower one of two that are equally near; and that magnitude (n,). A block of zeros has zeros."""
    largest = blocks.abs().amax(1)
    scaled = (blocks * (1 / largest.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
    return torch.bucketize(scaled, (values[:-1] + values[1:]) / 2, out_int32=True).to(torch.uint8), largest


def dequantize(weight: NF4Weight, out: Tensor) -> Tensor:
    """Writes the weight to `out` (N, K), a view whose last stride is 1 and whose rows begin at a multiple of 8
    elements; float32, bfloat16 or float16. Returns it."""
    assert out.shape == weight.shape and out.dtype in DTYPES
    absmax = weight.absmax.view(-1)
    if weight.scales is not None:
        scale, offset = weight.scales.repeat_interleave(weight.group, dim=0)[: len(absmax)].unbind(1)
        absmax = weight.tables[len(VALUES) :][absmax.int()] * scale + offset
    halves = torch.stack((weight.codes >> 4, weight.codes & 15), dim=2)
    blocks = weight.tables[: len(VALUES)][halves.int()].view(-1, BLOCK) * absmax[:, None]
    return out.copy_(blocks.view(out.shape))


def stack(parts: Sequence[NF4Weight]) -> NF4Weight:
    """The weights below each other, (sum of N, K), in the bits they have alone.

    Raises:
        ValueError: some have quantised absmax and some have not, or by another table.
    """
    first = parts[0]
    if any(part.tables.shape != first.tables.shape or not part.tables.equal(first.tables) for part in parts[1:]):
        raise ValueError("NF4 weights of one projection must have absmax alike: quantised by one table, or not at all")
    codes, absmax = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "absmax"))
    if first.scales is None:
        return NF4Weight(codes, absmax, None, first.tables)
    starts = [sum(part.absmax.numel() for part in parts[:i]) for i in range(1, len(parts))]
    group = math.gcd(*(part.group for part in parts), *starts)
    scales = []
    for part in parts:
        assert part.scales is not None
        groups = -(-part.absmax.numel() // group)
        scales.append(part.scales.repeat_interleave(part.group // group, dim=0)[:groups])
    return NF4Weight(codes, absmax, torch.cat(scales), first.tables)
