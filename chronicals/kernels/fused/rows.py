"""Tensors as rows, for norms: views of what the kernels take, and how wide a tile holds a row."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = (64, 128, 256, 1024, 2048, 4096, 8192)  # widths of tiles; a row is masked within the least that holds it
MAX_HIDDEN = BLOCKS[-1]


def block_for(hidden: int) -> int:
    """The width of a tile that holds a row of `hidden` elements.

    Raises:
        ValueError: the row is wider than `MAX_HIDDEN`.
    """
    if hidden > MAX_HIDDEN:
        raise ValueError(f"the fused RMS norm takes rows of up to {MAX_HIDDEN} elements, not {hidden}")
    return min(block for block in BLOCKS if block >= hidden)


def as_rows(x: Tensor) -> Tensor:
    """A view (tokens, heads, hidden) of (..., hidden) with a last stride of 1; a copy where there is none.

    Raises:
        ValueError: a dtype that the kernels do not take.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"the fused RMS norm takes float32, bfloat16 and float16, not {x.dtype}")
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return x.reshape(-1, 1, x.shape[-1]) if x.ndim < 3 else x.flatten(0, -3)


def outlet(given: Tensor | None, like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The tensor to return and its view as rows: the caller's, which is never copied, or a new one."""
    out = torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format) if given is None else given
    rows = as_rows(out)
    assert out.shape == like.shape and rows.data_ptr() == out.data_ptr(), "an output is shaped like its input"
    return out, rows
