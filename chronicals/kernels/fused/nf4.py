"""NF4 weights made wide on the GPU, in one launch: half a byte and a 64th of one read for each element, and the element
written, straight into the matmul's operand.

    w = value[code] * absmax        absmax = table[byte] * scale + offset

A program has a tile of blocks, whose absmax it works out once, by 64 elements: 32 threads store 512 bytes in a row,
whatever order of the axes a compiler thinks best. As a tile of blocks by 8 words by 8 elements it was left a choice:
Triton 3.6 gave each thread a block, and a warp's store was 32 halves of 32-byte sectors, 128 bytes apart. The 16 values
lie in shared memory, in as many banks: a load of 32 of them, whichever, is one access by a short address, while
choosing by selects takes 15 instructions an element, as many as the time of a copy has. The bits are those of the
reference: products are not contracted with sums.

Left out: matmuls that read the codes themselves. They win for a few tokens; with thousands each tile of the weight
would be made wide again for every tile of tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from chronicals.kernels.nf4 import BLOCK, DTYPES, NF4Weight

WORD = 8  # codes in 32 bits


class Config(NamedTuple):
    """How the kernel is launched."""

    blocks: int  # that a program handles
    warps: int


CONFIG = Config(64, 4)  # 4 words a thread: one 16-byte load, 4 stores of as many


@triton.jit
def nf4_dequantize_kernel(
    CODES: tl.tensor,  # (words,) int32
    ABSMAX: tl.tensor,  # (blocks,) uint8 or float32
    SCALES: tl.tensor,  # (groups, 2) float32; None: absmax is float32
    TABLES: tl.tensor,  # (16 + 256,) float32
    OUT: tl.tensor,
    blocks: tl.tensor,
    row_blocks: tl.tensor,  # of a row of the weight
    gap: tl.tensor,  # words of OUT between the rows of the weight
    group_shift: tl.tensor,  # log2 of the blocks that share a scale
    TILE: tl.constexpr,
) -> None:
    block = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = block < blocks
    absmax = tl.load(ABSMAX + block, mask=mask, other=0)
    if SCALES is not None:
        group = block >> group_shift
        scale = tl.load(SCALES + 2 * group, mask=mask, other=0.0)
        offset = tl.load(SCALES + 2 * group + 1, mask=mask, other=0.0)
        absmax = tl.load(TABLES + 16 + absmax.to(tl.int32)) * scale + offset
    word = tl.load(CODES + block[:, None] * 8 + tl.arange(0, 8)[None, :], mask=mask[:, None], other=0)
    shift = (tl.arange(0, 8) * 4) ^ 4  # the first of a byte is in its high half
    code = (word[:, :, None] >> shift[None, None, :]) & 15
    value = tl.gather(tl.load(TABLES + tl.arange(0, 16)), tl.reshape(code, (TILE * 64,)), 0)
    value = tl.reshape(value, (TILE, 64)) * absmax[:, None]
    begin = block * 8 + block // row_blocks * gap  # in words, so that 32 bits are enough
    at = begin.to(tl.int64)[:, None] * 8 + tl.arange(0, 64)[None, :]
    tl.store(OUT + at, value.to(OUT.dtype.element_ty), mask=mask[:, None])


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
    blocks = weight.absmax.numel()
    nf4_dequantize_kernel[(triton.cdiv(blocks, CONFIG.blocks),)](
        weight.codes.view(-1).view(torch.int32),
        weight.absmax,
        weight.scales,
        weight.tables,
        out,
        blocks,
        weight.shape[1] // BLOCK,
        (out.stride(0) - out.shape[1]) // WORD,
        max(weight.group, 1).bit_length() - 1,
        TILE=CONFIG.blocks,
        num_warps=CONFIG.warps,
        enable_fp_fusion=False,
    )
    return out
