"""One transformer layer: two halves, attention (attention.py) and MLP (mlp.py), each with a backward pass written by
hand, run under autograd as one function each.

What is kept for backward, and what is computed again, is a layer's `recompute`:

    none    everything that backward reads is kept
    light   but the normed inputs and the GLU's product: elementwise passes make them again, bit for bit
    mlp     nor the gate-up projection's output: one more matmul
    full    nothing but the layer's input: the whole layer again, except its last projection

What the projections never read is kept under none of them (`Half.unread`).

Left out: dropout of activations, and norms after the halves (Gemma 2).

Shapes: T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from chronicals.kernels.grad_sink import WeightGradients
from chronicals.kernels.ops import Ops
from chronicals.models.attention import Attention, AttentionHalf, AttentionSaved, NormedAttention
from chronicals.models.config import ModelConfig
from chronicals.models.half import Stream
from chronicals.models.mlp import MLP, MLPHalf, MLPSaved
from chronicals.models.norm import RMSNorm

Recompute = Literal["none", "light", "mlp", "full"]
_RECOMPUTED: dict[Recompute, tuple[str, ...]] = {
    "none": (),
    "light": ("normed", "product"),
    "mlp": ("normed", "product", "gate_up"),
    "full": (),  # of the halves as they run again in backward
}


class Unit(Protocol):
    """A stretch of a layer that autograd sees as one function."""

    @property
    def out_room(self) -> int:
        """The room that `backward` wants behind the gradient it is given."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its weights, always in the same order."""

    def forward(self, residual: Tensor, delta: Tensor | None, stream: Stream) -> tuple[Tensor, Tensor, Any]:
        """(T, H) each -> the same pair behind it, and what backward needs: a dataclass of tensors."""

    def backward(
        self, saved: Any, d: Tensor, stream: Stream, gradients: WeightGradients, room: int | None
    ) -> Tensor | None:
        """(T, H), the gradient of both outputs -> that of both inputs, with `room` behind it; where `room` is None
        nobody reads it. May overwrite what was saved."""


@dataclass(frozen=True)
class LayerSaved:
    x: Tensor  # (T, H), the sum that the first half normed
    product_kept: Tensor | None  # as in MLPSaved: the last projection does not run again


class WholeLayer:
    """Both halves; only the layer's input is kept, and backward begins by running them again."""

    def __init__(self, attention: AttentionHalf, mlp: MLPHalf) -> None:
        self.attention, self.mlp = attention, mlp

    @property
    def out_room(self) -> int:
        return self.mlp.out_room

    def parameters(self) -> Iterator[nn.Parameter]:
        return chain(self.attention.parameters(), self.mlp.parameters())

    def record(
        self, residual: Tensor, delta: Tensor | None, stream: Stream, *, product: bool = True
    ) -> tuple[AttentionSaved, MLPSaved]:
        first = self.attention.record(residual, delta, stream)
        between = self.attention.output(first)
        first = replace(first, delta=self.attention.attention.o_proj.kept_out(between))
        return first, self.mlp.record(first.x, between, stream, product=product)

    def forward(self, residual: Tensor, delta: Tensor | None, stream: Stream) -> tuple[Tensor, Tensor, LayerSaved]:
        first, second = self.record(residual, delta, stream)
        delta, product_kept = self.mlp.output(second, apart=True)
        return second.x, delta, LayerSaved(first.x, product_kept)

    def backward(
        self, saved: LayerSaved, d: Tensor, stream: Stream, gradients: WeightGradients, room: int | None
    ) -> Tensor | None:
        product = "product" not in self.mlp.dropped or self.mlp.mlp.down_proj.reads_out  # which is made again of it
        first, second = self.record(saved.x, None, stream, product=product)
        second = replace(second, product_kept=saved.product_kept)
        read = room is not None or any(weight.requires_grad for weight in self.attention.parameters())
        between = self.mlp.backward(second, d, stream, gradients, self.attention.out_room if read else None)
        del second, d
        return None if between is None else self.attention.backward(first, between, stream, gradients, room)


class _Run(torch.autograd.Function):
    """A unit under autograd. Its weights are arguments so that their gradients can be returned."""

    @staticmethod
    def forward(
        ctx: Any,
        unit: Unit,
        stream: Stream,
        room: int,
        leaves: bool,
        residual: Tensor,
        delta: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x, out, saved = unit.forward(residual, delta, stream)
        ctx.unit, ctx.stream, ctx.kind, ctx.has_delta = unit, stream, type(saved), delta is not None
        ctx.room, ctx.parcel = room, None
        tensors = [getattr(saved, field.name) for field in fields(saved)]
        if stream.offload is not None and leaves and any(ctx.needs_input_grad):
            ctx.parcel = stream.offload.put(tensors)
        else:
            ctx.save_for_backward(*tensors)
        return x, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x: Tensor, d_out: Tensor) -> tuple[Tensor | None, ...]:
        assert d_x.data_ptr() == d_out.data_ptr(), "both outputs feed one sum, and nothing else"
        assert ctx.unit is not None, "backward overwrites what forward kept: it runs once"
        gradients = WeightGradients(ctx.stream.sink)
        room = ctx.room if ctx.needs_input_grad[4] or ctx.needs_input_grad[5] else None
        d = ctx.unit.backward(_Run._saved(ctx), d_x, ctx.stream, gradients, room)
        returned = gradients.of(ctx.unit.parameters())
        ctx.unit = None
        return *(None,) * 4, d, d if ctx.has_delta else None, *returned

    @staticmethod
    def _saved(ctx: Any) -> Any:
        """What the unit's forward pass saved; what the one before it left on the host is on its way."""
        if ctx.parcel is not None:
            return ctx.kind(*ctx.stream.offload.get(ctx.parcel))
        if ctx.stream.offload is not None:
            ctx.stream.offload.ahead()
        return ctx.kind(*ctx.saved_tensors)


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind its norm and beside its residual."""

    def __init__(self, config: ModelConfig, index: int, ops: Ops, **factory: Any) -> None:
        super().__init__()
        attention = NormedAttention if config.qk_norm else Attention
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops, **factory)
        self.self_attn = attention(config, config.windows[index], ops, **factory)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops, **factory)
        self.mlp = MLP(config, ops, **factory)
        self._halves = (
            AttentionHalf(self.input_layernorm, self.self_attn, ops),
            MLPHalf(self.post_attention_layernorm, self.mlp, config.activation, ops),
        )
        self.recompute = "light"
        self.offloads = False  # whether what it keeps is on the host until backward reads it, where the stream has it

    @property
    def recompute(self) -> Recompute:
        """What is computed again in backward: "none", "light", "mlp" or "full"; see the top of this file."""
        return self._recompute

    @recompute.setter
    def recompute(self, policy: Recompute) -> None:
        self._recompute = policy
        self._units: tuple[Unit, ...] = (WholeLayer(*self._halves),) if policy == "full" else self._halves
        for half in self._halves:
            half.recomputed = _RECOMPUTED[policy]

    def projections_changed(self) -> None:
        """Says that projections were put in."""
        self._halves[1].projections_changed()

    @property
    def glu_joined(self) -> bool:
        """Whether its GLU may be a part of the matmuls around it: not with all adapters."""
        return self._halves[1].glu_joined

    @property
    def out_room(self) -> int:
        """The room that its backward pass wants behind the gradient of its outputs."""
        return self._units[-1].out_room

    def forward(
        self, residual: Tensor, delta: Tensor | None, stream: Stream, room: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """(T, H) each -> the pair behind this layer, whose sum is the stream. Backward leaves `room` behind the
        gradient of the inputs."""
        for unit in self._units:
            residual, delta = _Run.apply(unit, stream, room, self.offloads, residual, delta, *unit.parameters())
            room = unit.out_room
        return residual, delta
