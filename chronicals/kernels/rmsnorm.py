"""Root mean square norm: `y = x / sqrt(mean(x^2) + eps) * (w + offset)` over the last dimension.

The statistics are float32 whatever the input, and the casts stand where transformers has them, so that half precision
rounds alike: Llama and its kin cast the normalised input back before they multiply by the weight; Gemma, whose weight
is stored as a distance from one (`offset = 1`), multiplies in float32 and casts last.

Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4. Left out here: LayerNorm (no family
needs it).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rmsnorm_reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """`rmsnorm` in the inputs' own dtype, without any cast: meant for float64."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (weight + offset)


def rmsnorm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Normalises the last dimension of `x`.

    Args:
        x: (..., H), any float dtype.
        weight: (H,).
        eps: added to the mean square.
        offset: added to the weight; Gemma stores `weight - 1`.

    Returns:
        (..., H) in the dtype of `x` (of `x * weight` where those differ and `offset` is 0, as in transformers).
    """
    return _scaled(x, _rstd(x, eps), weight, offset)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rstd(x: Tensor, eps: float) -> Tensor:
    """(..., 1): 1 / sqrt(mean square + eps)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.rsqrt(norm.square() / x.shape[-1] + eps)


def _scaled(x: Tensor, rstd: Tensor, weight: Tensor, offset: float) -> Tensor:
    normalised = _wide(x) * rstd
    if offset == 0.0:
        return weight * normalised.to(x.dtype)
    return (normalised * (_wide(weight) + offset)).to(x.dtype)


def rmsnorm_forward(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`rmsnorm` without autograd: the normalised rows (..., H), written to `out` where given (it may be `x`), and rstd
    (rows,), 1 / sqrt(mean square + eps)."""
    rstd = _rstd(x, eps)
    y = _scaled(x, rstd, weight, offset)
    return y if out is None else out.copy_(y), rstd.flatten()


def add_rmsnorm_forward(
    residual: Tensor, delta: Tensor, weight: Tensor, eps: float, offset: float = 0.0, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum (T, H) of two (T, H), its norm (T, H), written to `out` where given, and rstd (T,)."""
    total = residual + delta
    return total, *rmsnorm_forward(total, weight, eps, offset, out=out)


def rmsnorm_recompute(
    x: Tensor, rstd: Tensor, weight: Tensor, offset: float = 0.0, *, out: Tensor | None = None
) -> Tensor:
    """The bits of the forward's norm once more, from its input (..., H) and rstd."""
    y = _scaled(x, rstd.view(*x.shape[:-1], 1), weight, offset)
    return y if out is None else out.copy_(y)


def rmsnorm_backward(
    d_normed: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    offset: float = 0.0,
    *,
    d_residual: Tensor | None = None,
    out: Tensor | None = None,
    weight_grad: bool = True,
    partial: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the norm's input, and the weight's in parts (docs/math/rmsnorm.md).

    Args:
        d_normed: (..., H), the gradient of the norm's output.
        x: (..., H), what was normalised.
        rstd: (rows,), from the forward.
        d_residual: (T, H), the gradient that `x` has beside this one, added to the result.
        out: shaped like `x`, strides free; may be `d_normed`. None: a new one.
        weight_grad: whether the weight's gradient is wanted.
        partial: (parts, H) float32, `partial_programs` of them: written. None: a new one.

    Returns:
        (..., H) in the dtype of `x`, and (parts, H) for `reduce_partials`, or None.
    """
    rstd = rstd.view(*x.shape[:-1], 1)
    normalised, upstream = _wide(x) * rstd, _wide(d_normed)
    weighted, products = _wide(weight) + offset, upstream * normalised
    mean = (products @ weighted.to(products.dtype)).div_(x.shape[-1]).unsqueeze(-1)
    dx = (upstream * weighted).addcmul_(normalised, mean, value=-1).mul_(rstd)
    if d_residual is not None:
        dx += d_residual
    if weight_grad:  # before `out`, which may be `d_normed`, is written
        sums = products.flatten(0, -2).sum(0, keepdim=True)
        partial = sums if partial is None else partial.copy_(sums)
    return dx.to(x.dtype) if out is None else out.copy_(dx), partial


def qk_rmsnorm_backward(
    d_normed: Tensor,
    x: Tensor,
    rstds: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    queries: int,
    offset: float = 0.0,
    *,
    out: Tensor | None = None,
    weight_grads: tuple[bool, bool] = (True, True),
    partials: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """`rmsnorm_backward` of queries and of keys, which lie in one buffer and have a weight each.

    Args:
        d_normed, x, out: (T, Nq + Nk, D).
        rstds: (T Nq,) and (T Nk,).
        queries: Nq.
        partials: (parts, D) float32 each, as many as `qk_partial_programs` says: written. None: a new one.

    Returns:
        (T, Nq + Nk, D) in the dtype of `x`, and (parts, D) each for `reduce_partials`, or None.
    """
    out = torch.empty_like(x) if out is None else out
    q, k = (slice(queries), slice(queries, None))
    (_, q_partial), (_, k_partial) = (
        rmsnorm_backward(
            d_normed[:, heads],
            x[:, heads],
            rstds[i],
            weights[i],
            offset,
            out=out[:, heads],
            weight_grad=weight_grads[i],
            partial=partials[i],
        )
        for i, heads in enumerate((q, k))
    )
    return out, (q_partial, k_partial)


def partial_programs(rows: int, hidden: int, device: torch.device) -> int:
    """How many parts `rmsnorm_backward` leaves of the gradient of a weight (hidden,)."""
    return 1


def qk_partial_programs(tokens: int, queries: int, keys: int, hidden: int, device: torch.device) -> tuple[int, int]:
    """How many parts `qk_rmsnorm_backward` leaves of the gradients of the two weights (hidden,)."""
    return 1, 1
