"""Token embedding: rows of a (V, H) table, and a gradient that is a deterministic segmented sum.

Forward gathers `out[t] = weight[tokens[t]]`. The gradient of row v sums the upstream rows of all slots that hold v.
Slots sorted by token (`token_order`, which `collate` makes on the CPU) put those side by side, in the order of the
stream: each sum is taken in float32 (float64 for float64) in one fixed order and rounded once, where a sum kept in 16
bits loses what a frequent token adds late. Left out: padding_idx, max_norm and sparse gradients of
torch.nn.Embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def embedding_reference(tokens: Tensor, weight: Tensor) -> Tensor:
    """`embedding` as a product with one-hot rows, in the weight's own dtype: meant for float64."""
    return F.one_hot(tokens, len(weight)).to(weight.dtype) @ weight


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
        grad = d_out.new_empty(ctx.rows, d_out.shape[1])
        embedding_backward(d_out, tokens, token_order, grad, add=False)
        return None, grad, None


def embedding_forward(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of a (V, H) table, without autograd: (T,) int64 -> (T, H)."""
    return F.embedding(tokens, weight)


def embedding_backward(d_out: Tensor, tokens: Tensor, token_order: Tensor, grad: Tensor, *, add: bool) -> None:
    """Writes the table's gradient into `grad`, or adds it to what is there.

    Args:
        d_out: (T, H).
        tokens: (T,) int64.
        token_order: (T,) integers, the slots of `tokens` sorted by token, stable.
        grad: (V, H), any float dtype; each sum is rounded to it once.
        add: keep what is there; else it is zeroed first, all of it.
    """
    if not add:
        grad.zero_()
    ids = tokens[token_order]
    first = torch.cat((ids.new_ones(min(1, len(ids))), ids[1:] != ids[:-1])).bool()
    upstream = d_out[token_order].to(torch.promote_types(d_out.dtype, torch.float32))
    distinct = ids[first]
    sums = upstream.new_zeros(len(distinct), d_out.shape[1]).index_add_(0, first.cumsum(0) - 1, upstream)
    grad[distinct] = (sums + grad[distinct]).to(grad.dtype)


def embedding(tokens: Tensor, weight: Tensor, token_order: Tensor) -> Tensor:
    """Looks tokens up.

    Args:
        tokens: (T,) int64 in [0, V).
        weight: (V, H), any float dtype.
        token_order: (T,) int32 or int64, the slots of `tokens` sorted by token, stable.

    Returns:
        (T, H) in the weight's dtype.
    """
    return _Embedding.apply(tokens, weight, token_order)
