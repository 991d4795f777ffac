"""NF4 weights made wide on the GPU, in one launch: half a byte and a 64th of one read for each element, and the element
written, straight into the matmul's operand.

    w = value[code] * absmax        absmax = table[byte] * scale + offset

A program has a tile of words of 8 codes; a word lies in one block, and its 8 elements are one or two vectorised stores.
The 16 values are one line of memory that stays in the first cache: a load of 32 of them, whichever, is one access,
while choosing by selects takes 15 instructions an element, more than the time of a copy has. The integer part is a
shift and a mask. Products are not contracted with sums: the bits are those of the reference.

Left out: matmuls that read the codes themselves. They win for a few tokens; with thousands each tile of the weight
would be made wide again for every tile of tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from chronicals.kernels.nf4 import DTYPES, NF4Weight

WORD = 8  # codes in 32 bits


class Config(NamedTuple):
    """How the kernel is launched."""

    words: int  # that a program handles
    warps: int


CONFIG = Config(1024, 8)  # four words a thread: a 16-byte load, 64 bytes to store


@triton.jit
def nf4_dequantize_kernel(
    CODES: tl.tensor,  # (words,) int32
    ABSMAX: tl.tensor,  # (blocks,) uint8 or float32
    SCALES: tl.tensor,  # (groups, 2) float32; None: absmax is float32
    TABLES: tl.tensor,  # (16 + 256,) float32
    OUT: tl.tensor,
    words: tl.tensor,
    row_words: tl.tensor,  # of a row of the weight
    out_stride: tl.tensor,  # of a row of OUT, in words
    group_shift: tl.tensor,  # log2 of the blocks that share a scale
    TILE: tl.constexpr,
) -> None:
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = at < words
    word = tl.load(CODES + at, mask=mask, other=0)
    block = at >> 3
    absmax = tl.load(ABSMAX + block, mask=mask, other=0)
    if SCALES is not None:
        group = block >> group_shift
        scale = tl.load(SCALES + 2 * group, mask=mask, other=0.0)
        offset = tl.load(SCALES + 2 * group + 1, mask=mask, other=0.0)
        absmax = tl.load(TABLES + 16 + absmax.to(tl.int32)) * scale + offset
    row = at // row_words
    begin = (row.to(tl.int64) * out_stride + (at - row * row_words)) * 8
    element = tl.arange(0, 8)
    code = (word[:, None] >> ((element * 4) ^ 4)[None, :]) & 15  # the first of a byte is in its high half
    value = tl.load(TABLES + code) * absmax[:, None]
    tl.store(OUT + begin[:, None] + element[None, :], value.to(OUT.dtype.element_ty), mask=mask[:, None])


def dequantize(weight: NF4Weight, out: Tensor) -> Tensor:
    """Writes the weight to `out`.

    Args:
        weight: (N, K).
        out: (N, K), a view whose last stride is 1 and whose rows begin at a multiple of 8 elements, its memory at a
            multiple of 16 bytes; float32, bfloat16 or float16.

    Returns:
        `out`.
    """
    assert out.shape == weight.shape and out.dtype in DTYPES
    assert out.stride(1) == 1 and out.stride(0) % WORD == 0 and out.data_ptr() % 16 == 0, "whole aligned words"
    codes = weight.codes.view(-1).view(torch.int32)
    nf4_dequantize_kernel[(triton.cdiv(len(codes), CONFIG.words),)](
        codes,
        weight.absmax,
        weight.scales,
        weight.tables,
        out,
        len(codes),
        weight.shape[1] // WORD,
        out.stride(0) // WORD,
        max(weight.group, 1).bit_length() - 1,
        TILE=CONFIG.words,
        num_warps=CONFIG.warps,
        enable_fp_fusion=False,
    )
    return out
