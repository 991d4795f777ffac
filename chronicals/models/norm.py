"""The root mean square norm of layers and heads, with its backward pass, and the decoder's last one.

A layer's norms add what the half before them left beside the stream while they read it. Weight gradients come out in
parts, which whoever has a place for them adds up later, many norms in one launch.

Shapes: T tokens, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from chronicals.kernels.grad_sink import GradSink, WeightGradients
from chronicals.kernels.ops import Ops
from chronicals.models.projection import outlet


class RMSNorm(nn.Module):
    """Root mean square norm with a weight, over the last dimension; without autograd."""

    def __init__(self, size: int, eps: float, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, **factory))
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(..., size) -> its norm, and rstd (rows,)."""
        return self.ops.rmsnorm_forward(x, self.weight, self.eps, out=out)

    def add(self, residual: Tensor, delta: Tensor | None, room: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """(T, size) each -> their sum, its norm with `room` behind it, rstd (T,). Before the first half there is no
        delta."""
        out = outlet(residual, residual.shape[1], room)
        if delta is None:
            return residual, *self(residual, out)
        return self.ops.add_rmsnorm_forward(residual, delta, self.weight, self.eps, out=out)

    def again(self, x: Tensor, rstd: Tensor, room: int = 0) -> Tensor:
        """The norm of x once more, with `room` behind it."""
        return self.ops.rmsnorm_recompute(x, rstd, self.weight, out=outlet(x, x.shape[1], room))

    def backward(
        self,
        d_normed: Tensor,
        x: Tensor,
        rstd: Tensor,
        gradients: WeightGradients,
        *,
        d_residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The gradient of x, with `d_residual` added."""
        programs = self.ops.partial_programs(x.numel() // x.shape[-1], len(self.weight), x.device)
        place = gradients.place(self.weight, programs)
        dx, partial = self.ops.rmsnorm_backward(
            d_normed,
            x,
            rstd,
            self.weight,
            d_residual=d_residual,
            out=out,
            weight_grad=self.weight.requires_grad,
            partial=place,
        )
        self.sum(partial, place, gradients)
        return dx

    def sum(self, partial: Tensor | None, place: Tensor | None, gradients: WeightGradients) -> None:
        """Adds up the parts that nobody else will."""
        if partial is not None and place is None:
            gradients.sum(self.weight, partial, self.ops.reduce_partials)


class _FinalNorm(torch.autograd.Function):
    """The norm of the last pair's sum."""

    @staticmethod
    def forward(
        ctx: Any, norm: RMSNorm, sink: GradSink, room: int, residual: Tensor, delta: Tensor | None, weight: Tensor
    ) -> Tensor:
        x, normed, rstd = norm.add(residual, delta)
        ctx.norm, ctx.sink, ctx.room, ctx.has_delta = norm, sink, room, delta is not None
        ctx.save_for_backward(x, rstd)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_normed: Tensor) -> tuple[Tensor | None, ...]:
        gradients = WeightGradients(ctx.sink)
        x, rstd = ctx.saved_tensors
        d = ctx.norm.backward(d_normed, x, rstd, gradients, out=outlet(x, x.shape[1], ctx.room))
        return None, None, None, d, d if ctx.has_delta else None, *gradients.of([ctx.norm.weight])


def final_norm(norm: RMSNorm, residual: Tensor, delta: Tensor | None, sink: GradSink, room: int = 0) -> Tensor:
    """(T, H) each -> the norm of their sum, differentiable. Backward leaves `room` behind the gradient of both."""
    return _FinalNorm.apply(norm, sink, room, residual, delta, norm.weight)
