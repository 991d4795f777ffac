"""The gated feed-forward: its weights, and the half of a layer that runs it behind its norm, with a backward pass
written by hand.

    delta' = down_proj(glu(gate_up_proj(norm(x))))

Shapes: T tokens, H hidden, F intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from chronicals.kernels.glu_matmul import MatmulThenGLU
from chronicals.kernels.grad_sink import WeightGradients
from chronicals.kernels.ops import Ops
from chronicals.models.config import ModelConfig
from chronicals.models.half import Half, Normed, Stream, kept_of
from chronicals.models.norm import RMSNorm
from chronicals.models.projection import GLU, Projection, outlet, with_room


class MLP(nn.Module):
    """The weights of a gated feed-forward."""

    def __init__(self, config: ModelConfig, ops: Ops, **factory: Any) -> None:
        super().__init__()
        hidden, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = Projection(hidden, 2 * width, ops, bias=bias, **factory)
        self.down_proj = Projection(width, hidden, ops, bias=bias, **factory)


@dataclass(frozen=True)
class MLPSaved(Normed):
    gate_up: Tensor | None  # (T, 2F)
    product: Tensor | None  # (T, F)
    product_kept: Tensor | None  # what down_proj left behind `product`
    delta: Tensor | None = None  # (T, H), what down_proj made of `product`, if it wants that


class MLPHalf(Half):
    """Gated feed-forward, behind its norm.

    Attributes:
        glu: who computes the GLU, see `projections_changed`.
        glu_joined: whether its projections take it in.
    """

    def __init__(self, norm: RMSNorm, mlp: MLP, activation: str, ops: Ops) -> None:
        super().__init__(norm, mlp)
        self.mlp, self.activation, self.ops = mlp, activation, ops
        self.projections_changed()

    def projections_changed(self) -> None:
        """Chooses who computes the GLU, for both directions: `ops.glu_matmul` where both projections let it, else the
        GLU's own passes. So the product that backward makes again is forward's, bit for bit; or, with dropout, another
        one whatever is kept. Either way gradients do not depend on `recompute`."""
        ops = self.ops
        self.glu_joined = self.mlp.gate_up_proj.joins_glu and self.mlp.down_proj.joins_glu_grad
        passes = MatmulThenGLU(ops.glu_forward, ops.glu_backward)
        self.glu = GLU(self.activation, ops.glu_matmul if self.glu_joined else passes)

    @property
    def out_room(self) -> int:
        return self.mlp.down_proj.out_room

    @property
    def unread(self) -> tuple[str, ...]:
        takes = {"normed": self.mlp.gate_up_proj.takes_unnormed, "product": self.mlp.down_proj.takes_unglued}
        return tuple(name for name, taken in takes.items() if taken)

    def up(self, normed: Tensor, *, product: bool = True, apart: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(T, H) -> gate and up (T, 2F), where their gradient will lie too, and the product (T, F) where it is
        wanted."""
        gate_up_proj, down_proj = self.mlp.gate_up_proj, self.mlp.down_proj
        gate_up = outlet(normed, gate_up_proj.weight.shape[0], gate_up_proj.out_room)
        out = outlet(normed, down_proj.weight.shape[1], down_proj.in_room if product else 0)
        return gate_up_proj.glu(normed, self.glu, product=product, gate_up=gate_up, out=out, apart=apart)

    def record(self, residual: Tensor, delta: Tensor | None, stream: Stream, *, product: bool = True) -> MLPSaved:
        """All of the forward pass but the last projection; without the product where that is not wanted."""
        x, normed, rstd = self.norm.add(residual, delta, self.mlp.gate_up_proj.in_room)
        dropped = "normed" in self.dropped
        gate_up_again = "gate_up" in self.dropped  # and with it what stands behind `normed`
        apart = self.mlp.gate_up_proj.apart(normed) if dropped and not gate_up_again else None
        kept = None if dropped else normed
        return MLPSaved(x, rstd, kept, apart, *self.up(normed, product=product, apart=apart), None)

    def output(self, saved: MLPSaved, *, apart: bool) -> tuple[Tensor, Tensor | None]:
        """The last projection: (T, H), and what it left behind the product where that is wanted `apart`."""
        assert saved.product is not None
        kept = self.mlp.down_proj.apart(saved.product) if apart else None
        return self.mlp.down_proj(saved.product, apart=kept), kept

    def forward(self, residual: Tensor, delta: Tensor | None, stream: Stream) -> tuple[Tensor, Tensor, MLPSaved]:
        saved = self.record(residual, delta, stream)
        delta, product_kept = self.output(saved, apart="product" in self.dropped)
        dropped: dict[str, Any] = dict.fromkeys(self.dropped)
        kept_out = self.mlp.down_proj.kept_out(delta)
        return saved.x, delta, replace(saved, product_kept=product_kept, delta=kept_out, **dropped)

    def backward(
        self, saved: MLPSaved, d: Tensor, stream: Stream, gradients: WeightGradients, room: int | None
    ) -> Tensor | None:
        gate_up_proj, down_proj = self.mlp.gate_up_proj, self.mlp.down_proj
        normed, gate_up = self.normed(saved, gate_up_proj, multiplied=saved.gate_up is None), saved.gate_up
        if gate_up is None:
            assert normed is not None
            gate_up, _ = self.up(normed, product=False)
        y = gate_up_proj.kept_out(gate_up)
        d_gate_up = gate_up if y is None else with_room(gate_up, gate_up.shape[1], gate_up_proj.out_room)
        kept = kept_of(down_proj, saved.product, saved.product_kept)
        down_proj.glu_backward(d, gate_up, self.glu, saved.product, kept, gradients, d_gate_up=d_gate_up, y=saved.delta)
        return self.behind_norm(gate_up_proj, saved, normed, d_gate_up, d, gradients, room, y)
