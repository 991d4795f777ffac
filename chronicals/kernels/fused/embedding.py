"""Token embedding: a gather, and its gradient as a deterministic segmented sum into a buffer of the caller's.

chronicals/kernels/embedding.py has the math. `token_order` lists the slots of the batch by token, so the slots of one
token, a run, lie side by side. A program takes a tile of `slots` of them and some columns: it gathers the upstream rows
and sums those of equal token by a product with the 0/1 matrix [token_i = token_j] (exact in 16 bits, sums in float32).
A run that lies within the tile is written at once. Of a run that several tiles share, each leaves its part in scratch,
and a second launch adds the parts in order, from the tile where the run begins. So each row of the gradient is written
once, by one program, in one order, however long the runs are: no atomics, the same bits every time.

Bytes: T H read, and the rows of the tokens that occur written (read too where they are added to), whatever V is; parts
are small beside them, as a tile leaves two at most. Only an overwritten gradient is zeroed first, V H written; one that
is added to is not touched elsewhere.

Left out: a NaN or infinity upstream may reach the other tokens of its tile; such a gradient is refused as a whole
anyway.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


class Config(NamedTuple):
    """What one program takes at a time: slots of the batch (joining: tiles of them), columns of the table."""

    slots: int
    columns: int
    threads: int
    strips: int = 1  # of so many columns, one after the other: who has which slot is found out once


FORWARD = Config(16, 128, 128)
BACKWARD = {2: Config(64, 64, 256, 16), 4: Config(32, 64, 256, 16)}  # by the bytes of an upstream element
STAGES = 3  # of the backward's loads: one strip less than this waits in shared memory
JOIN = Config(32, 128, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def embedding_forward_kernel(
    TOKENS: tl.tensor,  # (T,) int64
    WEIGHT: tl.tensor,  # (V, H), last stride 1
    OUT: tl.tensor,  # (T, H), last stride 1
    slots: tl.tensor,  # T
    vocab: tl.tensor,  # V
    hidden: tl.tensor,  # H
    weight_stride: tl.tensor,
    out_stride: tl.tensor,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    program, strips = tl.program_id(0), tl.cdiv(hidden, COLUMNS)
    slot = ((program // strips) * SLOTS + tl.arange(0, SLOTS)).to(tl.int64)
    column = ((program % strips) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    token = tl.load(TOKENS + slot, mask=slot < slots, other=-1).to(tl.int64)
    # a token that the table lacks becomes NaN, which the loss shows, instead of somebody else's memory
    known = (token >= 0) & (token < vocab)
    row = tl.load(
        WEIGHT + (token * weight_stride)[:, None] + column,
        mask=known[:, None] & (column < hidden),
        other=float("nan"),
    )
    tl.store(OUT + (slot * out_stride)[:, None] + column, row, mask=(slot < slots)[:, None] & (column < hidden))


@triton.jit
def _token_at(TOKENS: tl.tensor, ORDER: tl.tensor, at: tl.tensor, slots: tl.tensor, other: tl.constexpr) -> tl.tensor:
    """The slots and tokens at places `at` of the order; `other` outside of it."""
    inside = (at >= 0) & (at < slots)
    slot = tl.load(ORDER + at, mask=inside, other=0).to(tl.int64)
    return slot, tl.load(TOKENS + slot, mask=inside, other=other).to(tl.int64)


@triton.jit
def embedding_backward_kernel(
    D_OUT: tl.tensor,  # (T, H), last stride 1
    TOKENS: tl.tensor,  # (T,) int64
    ORDER: tl.tensor,  # (T,) int32
    GRAD: tl.tensor,  # (V, H), last stride 1
    PARTS: tl.tensor,  # (tiles, 2, H) float32: of the run that began before the tile, of the one that goes on after it
    slots: tl.tensor,  # T
    vocab: tl.tensor,  # V
    hidden: tl.tensor,  # H
    d_out_stride: tl.tensor,
    grad_stride: tl.tensor,
    ADD: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIPS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    shares = tl.cdiv(hidden, STRIPS * COLUMNS)
    tile, share = tl.program_id(0) // shares, tl.program_id(0) % shares
    at = tile * SLOTS + tl.arange(0, SLOTS)
    slot, token = _token_at(TOKENS, ORDER, at, slots, -1)
    _, following = _token_at(TOKENS, ORDER, at + 1, slots, -2)
    _, before = _token_at(TOKENS, ORDER, tile * SLOTS - 1, slots, -1)
    _, beyond = _token_at(TOKENS, ORDER, tile * SLOTS + SLOTS, slots, -2)
    same = (token[:, None] == token[None, :]).to(D_OUT.dtype.element_ty)
    # the last row of each run here stands for it
    final = ((token != following) | (at == tile * SLOTS + SLOTS - 1)) & (token >= 0) & (token < vocab)
    shared = (token == before) | (token == beyond)
    part = (tile * 2 + tl.where(token == before, 0, 1)).to(tl.int64)
    first = share * STRIPS * COLUMNS
    for start in tl.range(first, tl.minimum(first + STRIPS * COLUMNS, hidden), COLUMNS, num_stages=STAGES):
        column = start + tl.arange(0, COLUMNS)[None, :]
        within = column < hidden
        x = tl.load(D_OUT + (slot * d_out_stride)[:, None] + column, mask=(at < slots)[:, None] & within, other=0.0)
        grad, whole = GRAD + (token * grad_stride)[:, None] + column, (final & ~shared)[:, None] & within
        if ADD:
            held = tl.load(grad, mask=whole, other=0.0)  # beside the gather, not after it
        sums = tl.dot(same, x, input_precision="ieee")  # row i: all of its token here
        tl.store(PARTS + (part * hidden)[:, None] + column, sums, mask=(final & shared)[:, None] & within)
        if ADD:
            sums += held.to(tl.float32)
        tl.store(grad, sums.to(GRAD.dtype.element_ty), mask=whole)


@triton.jit
def embedding_join_kernel(
    TOKENS: tl.tensor,
    ORDER: tl.tensor,
    GRAD: tl.tensor,
    PARTS: tl.tensor,
    slots: tl.tensor,
    vocab: tl.tensor,
    hidden: tl.tensor,
    grad_stride: tl.tensor,
    ADD: tl.constexpr,
    SLOTS: tl.constexpr,  # of a tile
    TILES: tl.constexpr,  # whose parts are added at a time
    COLUMNS: tl.constexpr,
) -> None:
    strips = tl.cdiv(hidden, COLUMNS)
    tile = tl.program_id(0) // strips
    column = (tl.program_id(0) % strips) * COLUMNS + tl.arange(0, COLUMNS)
    _, before = _token_at(TOKENS, ORDER, tile * SLOTS - 1, slots, -1)
    _, last = _token_at(TOKENS, ORDER, tile * SLOTS + SLOTS - 1, slots, -1)
    _, beyond = _token_at(TOKENS, ORDER, tile * SLOTS + SLOTS, slots, -2)
    if (last == beyond) & (last != before) & (last >= 0) & (last < vocab):  # a run begins in this tile and goes on
        total = tl.load(PARTS + (tile * 2 + 1).to(tl.int64) * hidden + column, mask=column < hidden, other=0.0)
        going = last == beyond
        while going:
            further = tile + 1 + tl.arange(0, TILES)
            _first, token = _token_at(TOKENS, ORDER, further * SLOTS, slots, -2)
            mine = token == last
            parts = PARTS + (further * 2).to(tl.int64)[:, None] * hidden + column[None, :]
            total += tl.sum(tl.load(parts, mask=mine[:, None] & (column < hidden)[None, :], other=0.0), axis=0)
            tile += TILES
            going = tl.sum(mine.to(tl.int32), axis=0) == TILES
        grad = GRAD + last * grad_stride + column
        if ADD:
            total += tl.load(grad, mask=column < hidden, other=0.0).to(tl.float32)
        tl.store(grad, total.to(GRAD.dtype.element_ty), mask=column < hidden)


def embedding_forward(tokens: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Gathers rows; one for a token outside the table is NaN.

    Args:
        tokens: (T,) int64.
        weight: (V, H), any row stride.
        out: (T, H), dtype of `weight`, any row stride; made if not given.
    """
    slots, (vocab, hidden) = len(tokens), weight.shape
    out = torch.empty(slots, hidden, dtype=weight.dtype, device=weight.device) if out is None else out
    assert out.shape == (slots, hidden)
    assert out.dtype == weight.dtype
    assert weight.dtype in DTYPES, f"no kernel for {weight.dtype}"
    if out.numel() == 0:
        return out
    assert weight.stride(1) == out.stride(1) == tokens.stride(0) == 1
    embedding_forward_kernel[_grid(slots, hidden, FORWARD)](
        tokens,
        weight,
        out,
        slots,
        vocab,
        hidden,
        weight.stride(0),
        out.stride(0),
        SLOTS=FORWARD.slots,
        COLUMNS=FORWARD.columns,
        num_warps=_warps(FORWARD),
    )
    return out


def embedding_backward(d_out: Tensor, tokens: Tensor, token_order: Tensor, grad: Tensor, *, add: bool) -> None:
    """Writes the table's gradient into `grad`, or adds it to what is there.

    Args:
        d_out: (T, H), any row stride.
        tokens: (T,) int64.
        token_order: (T,) int32, the slots of `tokens` sorted by token, stable.
        grad: (V, H) float32, or a 16-bit dtype, in which a sum is rounded once; any row stride.
        add: keep what is there; else it is zeroed first, all of it.
    """
    (slots, hidden), vocab = d_out.shape, len(grad)
    assert grad.shape[1] == hidden
    assert tokens.shape == token_order.shape == (slots,)
    assert d_out.dtype in DTYPES, f"no kernel for {d_out.dtype}"
    assert grad.dtype in DTYPES, f"no kernel for {grad.dtype}"
    if not add:
        _zero(grad)
    if d_out.numel() == 0:
        return
    assert d_out.stride(1) == grad.stride(1) == tokens.stride(0) == token_order.stride(0) == 1
    config = BACKWARD[d_out.element_size()]
    tiles = triton.cdiv(slots, config.slots)
    parts = torch.empty(tiles, 2, hidden, dtype=torch.float32, device=grad.device)
    embedding_backward_kernel[_grid(slots, hidden, config)](
        d_out,
        tokens,
        token_order,
        grad,
        parts,
        slots,
        vocab,
        hidden,
        d_out.stride(0),
        grad.stride(0),
        ADD=add,
        SLOTS=config.slots,
        COLUMNS=config.columns,
        STRIPS=config.strips,
        STAGES=STAGES,
        num_warps=_warps(config),
    )
    embedding_join_kernel[(tiles * triton.cdiv(hidden, JOIN.columns),)](
        tokens,
        token_order,
        grad,
        parts,
        slots,
        vocab,
        hidden,
        grad.stride(0),
        ADD=add,
        SLOTS=config.slots,
        TILES=JOIN.slots,
        COLUMNS=JOIN.columns,
        num_warps=_warps(JOIN),
    )


def _zero(grad: Tensor) -> None:
    """Zeroes (V, H), eight bytes at a time where rows allow it: torch is slow with elements of 16 bits."""
    elements = torch.int64.itemsize // grad.element_size()
    whole = not any(n % elements for n in (grad.shape[1], grad.stride(0), grad.storage_offset()))
    (grad.view(torch.int64) if whole else grad).zero_()


def _grid(slots: int, hidden: int, config: Config) -> tuple[int]:
    assert slots + config.slots * (JOIN.slots + 1) < 2**31
    return (triton.cdiv(slots, config.slots) * triton.cdiv(hidden, config.columns * config.strips),)


def _warps(config: Config) -> int:
    return config.threads // (64 if torch.version.hip else 32)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, token_order: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, token_order)
        ctx.rows = len(weight)
        return embedding_forward(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        tokens, token_order = ctx.saved_tensors
        d_out = d_out if d_out.stride(1) == 1 else d_out.contiguous()
        grad = torch.empty(ctx.rows, d_out.shape[1], dtype=d_out.dtype, device=d_out.device)
        embedding_backward(d_out, tokens, token_order, grad, add=False)
        return None, grad, None


def embedding(tokens: Tensor, weight: Tensor, token_order: Tensor) -> Tensor:
    """Looks tokens up; the fused form of `chronicals.kernels.embedding.embedding`.

    Args:
        tokens: (T,) int64 in [0, V); a row for any other is NaN.
        weight: (V, H) float32, bfloat16 or float16.
        token_order: (T,) int32, the slots of `tokens` sorted by token, stable.

    Returns:
        (T, H) in the weight's dtype.
    """
    return _Embedding.apply(tokens, weight, token_order)
