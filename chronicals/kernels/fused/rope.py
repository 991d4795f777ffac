"""Rotary position embedding of queries and keys in one launch; chronicals/kernels/rope.py has the math.

A program takes a block of rows, a row being one head of one token, loads both halves of what turns, and stores them
turned: q and k are read once and written once, in place where inputs are outputs. The gradient is the same kernel with
`sin` negated (docs/math/rope.md), so nothing but the tables is kept. `rope_qkv_` works on the packed qkv of a
projection, or on its gradient, and never touches v.

Tables have a row for each token, or, with `positions`, a row for each position: such tables serve a whole run and stay
in L2, where those of the tokens (4 R bytes each, beside 4 D (Nq + Nk) of queries and keys in bf16) come from memory in
every layer.

Left out: writing tables here from `inv_freq` (sine and cosine of large angles cost more than reading them), and
float64, which the plain op has.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


class Config(NamedTuple):
    """How many rows of how many (padded) pairs a program turns."""

    rows: int
    half: int  # a power of two, at least the pairs of a head
    threads: int


# by pairs of a head; 8 pairs a thread, so that in 16 bits each half is one 16-byte vector
CONFIGS: dict[int, Config] = {half: Config(1024 // half, half, 128) for half in (16, 32, 64, 128, 256)}


def config_for(pairs: int) -> Config:
    """The configuration for heads of which `pairs` pairs turn.

    Raises:
        ValueError: more than 256 pairs.
    """
    for half, config in CONFIGS.items():
        if pairs <= half:
            return config
    raise ValueError(f"heads of which {2 * pairs} elements turn are too wide for this kernel, 512 is the most")


@triton.jit
def rope_kernel(
    Q: tl.tensor,  # (T, QUERIES, D), as Q_OUT; the last stride is 1 here and below
    K: tl.tensor,  # (T, KEYS, D), as K_OUT
    Q_OUT: tl.tensor,
    K_OUT: tl.tensor,
    COS: tl.tensor,  # (T or P, HALF) float32, as SIN
    SIN: tl.tensor,
    POSITIONS: tl.tensor,  # (T,) rows of the tables, or None: a token's own
    rows: tl.tensor,  # T (QUERIES + KEYS)
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_token_stride: tl.tensor,
    k_head_stride: tl.tensor,
    q_out_token_stride: tl.tensor,
    q_out_head_stride: tl.tensor,
    k_out_token_stride: tl.tensor,
    k_out_head_stride: tl.tensor,
    table_stride: tl.tensor,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HALF: tl.constexpr,  # R / 2
    PASSED: tl.constexpr,  # D - R elements to copy; 0 where outputs are inputs
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # below 2^31, the launcher sees to it
    pair = tl.arange(0, BLOCK)[None, :]
    inside = row < rows
    mask = inside[:, None] & (pair < HALF)
    head, token = row % (QUERIES + KEYS), (row // (QUERIES + KEYS)).to(tl.int64)
    key = head - QUERIES
    q, k = Q + token * q_token_stride + head * q_head_stride, K + token * k_token_stride + key * k_head_stride
    q_out = Q_OUT + token * q_out_token_stride + head * q_out_head_stride
    k_out = K_OUT + token * k_out_token_stride + key * k_out_head_stride
    # chosen in two dimensions: chosen before `pair` is added, the compiler forgets that 16 bytes lie side by side
    is_query = (key < 0)[:, None]
    x = tl.where(is_query, q[:, None] + pair, k[:, None] + pair)
    out = tl.where(is_query, q_out[:, None] + pair, k_out[:, None] + pair)
    at = token
    if POSITIONS is not None:
        at = tl.load(POSITIONS + token, mask=inside, other=0).to(tl.int64)
    first = tl.load(x, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    second = tl.load(x + HALF, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    table = (at * table_stride)[:, None] + pair
    cos = tl.load(COS + table, mask=mask, other=0.0)
    sin = tl.load(SIN + table, mask=mask, other=0.0)
    if INVERSE:
        sin = -sin
    tl.store(out, (first * cos - second * sin).to(Q_OUT.dtype.element_ty), mask=mask, eviction_policy="evict_first")
    tl.store(
        out + HALF, (second * cos + first * sin).to(Q_OUT.dtype.element_ty), mask=mask, eviction_policy="evict_first"
    )
    for start in tl.static_range(0, PASSED, BLOCK):
        rest = inside[:, None] & (start + pair < PASSED)
        tl.store(out + 2 * HALF + start, tl.load(x + 2 * HALF + start, mask=rest), mask=rest)


def _turn(
    q: Tensor,
    k: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    *,
    inverse: bool,
) -> None:
    tokens, queries, width = q.shape
    keys, half = k.shape[1], cos.shape[1]
    assert k.shape == (tokens, keys, width), f"q {tuple(q.shape)} and k {tuple(k.shape)}"
    assert (q_out.shape, k_out.shape) == (q.shape, k.shape)
    assert q.dtype == k.dtype == q_out.dtype == k_out.dtype
    assert q.dtype in (torch.float32, torch.bfloat16, torch.float16), f"no kernel for {q.dtype}"
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape
    assert cos.stride() == sin.stride()
    assert 2 * half <= width, f"tables of {half} pairs for heads of {width}"
    assert len(cos) == tokens if positions is None else positions.shape == (tokens,)
    rows = tokens * (queries + keys)
    if rows == 0:
        return
    strides = [x.stride(2) for x in (q, k, q_out, k_out)] + [cos.stride(1)]
    assert set(strides) == {1}, "elements of a head, and of a table's row, lie side by side"
    config = config_for(half)
    assert rows + config.rows < 2**31, f"{tokens} tokens of {queries + keys} heads are too many for one launch"
    in_place = q_out.data_ptr() == q.data_ptr() and k_out.data_ptr() == k.data_ptr()
    rope_kernel[(triton.cdiv(rows, config.rows),)](
        q,
        k,
        q_out,
        k_out,
        cos,
        sin,
        positions,
        rows,
        *(stride for x in (q, k, q_out, k_out) for stride in x.stride()[:2]),
        cos.stride(0),
        QUERIES=queries,
        KEYS=keys,
        HALF=half,
        PASSED=0 if in_place else width - 2 * half,
        INVERSE=inverse,
        ROWS=config.rows,
        BLOCK=config.half,
        num_warps=config.threads // (64 if torch.version.hip else 32),
    )


def rope_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_key_value_heads: int,
    *,
    positions: Tensor | None = None,
    inverse: bool = False,
) -> None:
    """Turns the queries and keys of a packed projection where they lie.

    Args:
        qkv: (T, (Nq + 2 Nk) D), query heads, then key heads, then value heads; any row stride.
        cos, sin: (T, R/2) float32, or with `positions` (P, R/2), a row for each position; R <= D.
        num_heads, num_key_value_heads: Nq, Nk.
        positions: (T,) int32 or int64, each token's row of the tables, below P.
        inverse: turn back; applied to the gradient of turned q and k it gives that of q and k.
    """
    heads = num_heads + 2 * num_key_value_heads
    assert qkv.ndim == 2
    assert qkv.shape[1] % heads == 0, f"{qkv.shape[1]} columns are no {heads} heads"
    q, k, _ = qkv.unflatten(1, (heads, -1)).split((num_heads, num_key_value_heads, num_key_value_heads), dim=1)
    _turn(q, k, q, k, cos, sin, positions, inverse=inverse)


def rope_forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (T, Nq, D) and k (T, Nk, D) turned, in new contiguous tensors; inputs may have any strides but the last."""
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    _turn(q, k, q_out, k_out, cos, sin, None, inverse=False)
    return q_out, k_out


def rope_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of q and k from those of the turned ones, in new contiguous tensors; strides as in forward."""
    dq_out, dk_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (dq, dk))
    _turn(dq, dk, dq_out, dk_out, cos, sin, None, inverse=True)
    return dq_out, dk_out


def _dense_heads(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return rope_forward(_dense_heads(q), _dense_heads(k), cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return *rope_backward(_dense_heads(dq), _dense_heads(dk), *ctx.saved_tensors), None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turns queries and keys by their positions; the fused form of `chronicals.kernels.rope.rope`.

    Args:
        q: (T, Nq, D) float32, bfloat16 or float16; strided as it may be, a view of a packed qkv included.
        k: (T, Nk, D), dtype of q.
        cos, sin: (T, R/2) float32, from `rope_tables`; R <= D; they get no gradient.

    Returns:
        q and k turned, new tensors, shapes and dtypes kept.
    """
    return _Rope.apply(q, k, cos, sin)
