"""What the two halves of a layer (attention.py, mlp.py) have in common: a norm with a projection behind it.

A half takes `(residual, delta)`, the stream and what the half before it adds to it, and returns the same pair: the add
happens inside its norm, which reads and writes the stream once.

    x = residual + delta;  h = norm(x);  delta' = what the half makes of h          returns (x, delta')

Whoever comes next adds the two, so both have one and the same gradient d, and backward returns one tensor for both
inputs: d plus what comes back through the norm. Weight gradients go to the model's `GradSink`.

Inputs of projections and gradients of their outputs are allocated with the room that the projections want behind them
(projection.py); what a projection left behind an input that is not kept is kept by itself, being thin. A gradient that
nobody reads, as there is nothing trained before it, is not computed.

Shapes: T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from torch import Tensor, nn

from chronicals.kernels.grad_sink import GradSink, WeightGradients
from chronicals.models.norm import RMSNorm
from chronicals.models.offload import Offload
from chronicals.models.projection import Projection, outlet


@dataclass(frozen=True)
class Stream:
    """What every layer must know of the tokens, and where it leaves its weights' gradients."""

    cos: Tensor  # (P, R/2) float32, a row for each position; without positions (T, R/2), one for each token
    sin: Tensor
    positions: Tensor | None  # (T,)
    cu_seqlens: Tensor  # (documents + 1,) int32
    max_seqlen: int
    sink: GradSink
    offload: Offload | None = None  # where layers that are asked to leave what they keep for backward


@dataclass(frozen=True)
class Normed:
    """What a half saves of its norm."""

    x: Tensor  # (T, H), the sum that was normed
    rstd: Tensor  # (T,) float32
    normed: Tensor | None  # (T, H)
    normed_kept: Tensor | None  # what the projection left behind `normed`, where that is not kept


class Half:
    """A norm and the weights behind it.

    Attributes:
        recomputed: fields of what forward saves that are made again in backward instead; the layer's `recompute` sets
            it.
    """

    def __init__(self, norm: RMSNorm, weights: nn.Module) -> None:
        self.norm, self.weights = norm, weights
        self.recomputed: tuple[str, ...] = ()

    @property
    def unread(self) -> tuple[str, ...]:
        """Fields that its projections never read in backward, so that they are kept for nobody."""
        raise NotImplementedError

    @property
    def dropped(self) -> tuple[str, ...]:
        """Fields of what forward saves that are None."""
        return *self.recomputed, *self.unread

    def parameters(self) -> Iterator[nn.Parameter]:
        return chain(self.norm.parameters(), self.weights.parameters())

    def normed(self, saved: Normed, projection: Projection, *, multiplied: bool = False) -> Tensor | None:
        """(T, H), the input of its first projection: kept, or made again with the room that is wanted behind it. None
        where its backward does without, and it is not to be `multiplied` by the weight again."""
        if saved.normed is not None:
            return saved.normed
        if projection.takes_unnormed and not multiplied:
            return None
        return self.norm.again(saved.x, saved.rstd, projection.in_room)

    def behind_norm(
        self,
        projection: Projection,
        saved: Normed,
        normed: Tensor | None,
        d_out: Tensor,
        d: Tensor,
        gradients: WeightGradients,
        room: int | None,
        y: Tensor | None = None,
    ) -> Tensor | None:
        """Back through its first projection and its norm: d_out (T, out), and d (T, H), which passes the half by ->
        (T, H) with `room` behind it, or None where nobody reads it."""
        read = room is not None or self.norm.weight.requires_grad
        kept = kept_of(projection, normed, saved.normed_kept)
        if projection.takes_unnormed:  # with the norm at hand too: gradients are the same bits, whatever is kept
            assert kept is not None
            weight = self.norm.weight.detach()
            d_normed = projection.backward_unnormed(d_out, saved.x, saved.rstd, weight, kept, gradients, read=read)
        else:
            assert normed is not None
            d_normed = projection.backward(d_out, normed, kept, gradients, y=y, read=read)
        if d_normed is None:
            return None
        out = outlet(d, d.shape[1], room or 0)
        return self.norm.backward(d_normed, saved.x, saved.rstd, gradients, d_residual=d, out=out)


def kept_of(projection: Projection, x: Tensor | None, alone: Tensor | None) -> Tensor | None:
    """What the projection left behind x: kept alone, or still there."""
    return projection.kept(x) if alone is None and x is not None else alone
