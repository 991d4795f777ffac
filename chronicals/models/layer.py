"""One transformer layer: two halves, attention and MLP, each with a backward pass written by hand.

A half takes `(residual, delta)`, the stream and what the half before it adds to it, and returns the same pair: the add
happens inside its norm, which reads and writes the stream once.

    x = residual + delta;  h = norm(x)
    attention:  delta' = o_proj(attention(rope(qkv_proj(h))))          returns (x, delta')
    MLP:        delta' = down_proj(glu(gate_up_proj(h)))               returns (x, delta')

Whoever comes next adds the two, so both have one and the same gradient d, and backward returns one tensor for both
inputs: d plus what comes back through the norm. Weight gradients go to the model's `GradSink`.

What is kept for backward, and what is computed again, is a layer's `recompute`:

    none    everything that backward reads is kept
    light   but the normed inputs and the GLU's product: elementwise passes make them again, bit for bit
    mlp     nor the gate-up projection's output: one more matmul
    full    nothing but the layer's input: the whole layer again, except its last projection

Inputs of projections and gradients of their outputs are allocated with the room that the projections want behind them
(projection.py); what a projection left behind an input that is not kept is kept by itself, being thin. A gradient that
nobody reads, as there is nothing trained before it, is not computed.

Left out: dropout, and norms after the halves (Gemma 2).

Shapes: T tokens, H hidden, Nq and Nk query and key heads, D head width, F intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from chronicals.kernels.grad_sink import GradSink, WeightGradients
from chronicals.kernels.ops import Ops
from chronicals.models.config import ModelConfig
from chronicals.models.projection import Projection, outlet, with_room

Recompute = Literal["none", "light", "mlp", "full"]
_DROPPED: dict[Recompute, tuple[str, ...]] = {
    "none": (),
    "light": ("normed", "product"),
    "mlp": ("normed", "product", "gate_up"),
}


@dataclass(frozen=True)
class Stream:
    """What every layer must know of the tokens, and where it leaves its weights' gradients."""

    cos: Tensor  # (P, R/2) float32, a row for each position; without positions (T, R/2), one for each token
    sin: Tensor
    positions: Tensor | None  # (T,)
    cu_seqlens: Tensor  # (documents + 1,) int32
    max_seqlen: int
    sink: GradSink


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
        place = self.place(x.numel() // x.shape[-1], gradients)
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

    def place(self, rows: int, gradients: WeightGradients) -> Tensor | None:
        """Where to leave the weight's gradient in parts; None: hand them to `sum`."""
        return gradients.place(self.weight, self.ops.partial_programs(rows, len(self.weight), self.weight.device))

    def sum(self, partial: Tensor | None, place: Tensor | None, gradients: WeightGradients) -> None:
        """Adds up the parts that nobody else will."""
        if partial is not None and place is None:
            gradients.sum(self.weight, partial, self.ops.reduce_partials)


class Attention(nn.Module):
    """The weights of grouped-query attention, and what happens to q and k between projection and attention."""

    def __init__(self, config: ModelConfig, window: int | None, ops: Ops, **factory: Any) -> None:
        super().__init__()
        self.queries, self.keys, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.window, self.ops = window, ops
        heads = self.queries + 2 * self.keys
        self.qkv_proj = Projection(config.hidden_size, heads * self.width, ops, bias=config.qkv_bias, **factory)
        self.o_proj = Projection(self.queries * self.width, config.hidden_size, ops, bias=config.o_bias, **factory)

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, (Nq + 2 Nk) D) -> views q (T, Nq, D), k and v (T, Nk, D)."""
        q, k, v = qkv.unflatten(1, (-1, self.width)).split((self.queries, self.keys, self.keys), dim=1)
        return q, k, v

    def outlet(self, qkv: Tensor) -> Tensor | None:
        """Where attention writes (T, Nq, D), if o_proj wants room behind its rows."""
        out = outlet(qkv, self.queries * self.width, self.o_proj.in_room)
        return None if out is None else out.unflatten(1, (-1, self.width))

    def turn(self, qkv: Tensor, stream: Stream) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What attention reads its q, k and v from, and rstd of q and k where they are normed; may overwrite `qkv`."""
        self.ops.rope_qkv_(qkv, stream.cos, stream.sin, self.queries, self.keys, positions=stream.positions)
        return qkv, None, None

    def turn_back(self, d_qkv: Tensor, saved: AttentionSaved, stream: Stream, gradients: WeightGradients) -> None:
        """Makes of the gradient of what `turn` returned that of its input, in place."""
        self.ops.rope_qkv_(
            d_qkv, stream.cos, stream.sin, self.queries, self.keys, positions=stream.positions, inverse=True
        )


class NormedAttention(Attention):
    """Attention that norms each head of q and k before they turn (Qwen3)."""

    def __init__(self, config: ModelConfig, window: int | None, ops: Ops, **factory: Any) -> None:
        super().__init__(config, window, ops, **factory)
        self.q_norm = RMSNorm(self.width, config.rms_norm_eps, ops, **factory)
        self.k_norm = RMSNorm(self.width, config.rms_norm_eps, ops, **factory)

    def turn(self, qkv: Tensor, stream: Stream) -> tuple[Tensor, Tensor | None, Tensor | None]:
        turned = torch.empty_like(qkv)
        (q, k, v), (q_out, k_out, v_out) = self.heads(qkv), self.heads(turned)
        _, q_rstd = self.q_norm(q, out=q_out)
        _, k_rstd = self.k_norm(k, out=k_out)
        v_out.copy_(v)
        return super().turn(turned, stream)[0], q_rstd, k_rstd

    def turn_back(self, d_qkv: Tensor, saved: AttentionSaved, stream: Stream, gradients: WeightGradients) -> None:
        super().turn_back(d_qkv, saved, stream, gradients)
        norms = (self.q_norm, self.k_norm)
        x, d = (t.unflatten(1, (-1, self.width))[:, : self.queries + self.keys] for t in (saved.qkv, d_qkv))
        places = [norm.place(len(x) * self.queries, gradients) for norm in norms]
        _, partials = self.ops.qk_rmsnorm_backward(
            d,
            x,
            (saved.q_rstd, saved.k_rstd),
            [norm.weight for norm in norms],
            self.queries,
            out=d,
            weight_grads=[norm.weight.requires_grad for norm in norms],
            partials=places,
        )
        for norm, partial, place in zip(norms, partials, places, strict=True):
            norm.sum(partial, place, gradients)


class MLP(nn.Module):
    """The weights of a gated feed-forward."""

    def __init__(self, config: ModelConfig, ops: Ops, **factory: Any) -> None:
        super().__init__()
        hidden, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = Projection(hidden, 2 * width, ops, bias=bias, **factory)
        self.down_proj = Projection(width, hidden, ops, bias=bias, **factory)


@dataclass(frozen=True)
class AttentionSaved:
    x: Tensor  # (T, H), the sum that was normed
    rstd: Tensor  # (T,) float32
    normed: Tensor | None  # (T, H)
    normed_kept: Tensor | None  # what qkv_proj left behind `normed`, where that is not kept
    qkv: Tensor  # (T, (Nq + 2 Nk) D), as projected; turned in place where q and k are not normed
    turned: Tensor  # the same shape: what attention read; where q and k are not normed it is `qkv`
    q_rstd: Tensor | None
    k_rstd: Tensor | None
    out: Tensor  # (T, Nq, D)
    lse: Tensor  # (Nq, T) float32
    delta: Tensor | None = None  # (T, H), what o_proj made of `out`, if it wants that


@dataclass(frozen=True)
class MLPSaved:
    x: Tensor  # (T, H), the sum that was normed
    rstd: Tensor  # (T,) float32
    normed: Tensor | None  # (T, H)
    normed_kept: Tensor | None  # what gate_up_proj left behind `normed`, where that is not kept
    gate_up: Tensor | None  # (T, 2F)
    product: Tensor | None  # (T, F)
    product_kept: Tensor | None  # what down_proj left behind `product`
    delta: Tensor | None = None  # (T, H), what down_proj made of `product`, if it wants that


@dataclass(frozen=True)
class LayerSaved:
    x: Tensor  # (T, H), the sum that the first half normed
    product_kept: Tensor | None  # as in MLPSaved: the last projection does not run again


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


class AttentionHalf:
    """Grouped-query attention over packed documents, behind its norm."""

    def __init__(self, norm: RMSNorm, attention: Attention, ops: Ops) -> None:
        self.norm, self.attention, self.ops = norm, attention, ops
        self.dropped: tuple[str, ...] = ()

    @property
    def out_room(self) -> int:
        return self.attention.o_proj.out_room

    def parameters(self) -> Iterator[nn.Parameter]:
        return chain(self.norm.parameters(), self.attention.parameters())

    def record(self, residual: Tensor, delta: Tensor | None, stream: Stream) -> AttentionSaved:
        """All of the forward pass but the last projection."""
        attention = self.attention
        x, normed, rstd = self.norm.add(residual, delta, attention.qkv_proj.in_room)
        apart = attention.qkv_proj.apart(normed) if "normed" in self.dropped else None
        qkv = attention.qkv_proj(normed, apart=apart)
        turned, q_rstd, k_rstd = attention.turn(qkv, stream)
        out, lse = self.ops.attention.forward(
            *attention.heads(turned),
            stream.cu_seqlens,
            stream.max_seqlen,
            window=attention.window,
            out=attention.outlet(qkv),
        )
        return AttentionSaved(x, rstd, normed, apart, qkv, turned, q_rstd, k_rstd, out, lse)

    def output(self, saved: AttentionSaved) -> Tensor:
        """The last projection: (T, H)."""
        return self.attention.o_proj(saved.out.flatten(1))

    def forward(self, residual: Tensor, delta: Tensor | None, stream: Stream) -> tuple[Tensor, Tensor, AttentionSaved]:
        saved = self.record(residual, delta, stream)
        delta = self.output(saved)
        if "normed" in self.dropped:
            saved = replace(saved, normed=None)
        return saved.x, delta, replace(saved, delta=self.attention.o_proj.kept_out(delta))

    def backward(
        self, saved: AttentionSaved, d: Tensor, stream: Stream, gradients: WeightGradients, room: int | None
    ) -> Tensor | None:
        attention, out = self.attention, saved.out.flatten(1)
        d_out = attention.o_proj.backward(d, out, attention.o_proj.kept(out), gradients, y=saved.delta)
        assert d_out is not None
        d_out = d_out.view_as(saved.out)
        d_qkv = with_room(saved.turned, saved.turned.shape[1], attention.qkv_proj.out_room)
        self.ops.attention.backward(
            d_out,
            *attention.heads(saved.turned),
            saved.out,
            saved.lse,
            stream.cu_seqlens,
            stream.max_seqlen,
            *attention.heads(d_qkv),
            window=attention.window,
        )
        del d_out
        attention.turn_back(d_qkv, saved, stream, gradients)
        normed, kept = saved.normed, _kept(attention.qkv_proj, saved.normed, saved.normed_kept)
        normed = self.norm.again(saved.x, saved.rstd, attention.qkv_proj.in_room) if normed is None else normed
        return _behind_norm(self.norm, attention.qkv_proj, saved, normed, kept, d_qkv, None, d, gradients, room)


class MLPHalf:
    """Gated feed-forward, behind its norm."""

    def __init__(self, norm: RMSNorm, mlp: MLP, activation: str) -> None:
        self.norm, self.mlp, self.activation = norm, mlp, activation
        self.dropped: tuple[str, ...] = ()

    @property
    def out_room(self) -> int:
        return self.mlp.down_proj.out_room

    def parameters(self) -> Iterator[nn.Parameter]:
        return chain(self.norm.parameters(), self.mlp.parameters())

    def glu(self, normed: Tensor, *, product: bool = True, apart: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(T, H) -> gate and up (T, 2F), where their gradient will lie too, and the product (T, F) where it is
        wanted."""
        gate_up_proj, down_proj = self.mlp.gate_up_proj, self.mlp.down_proj
        gate_up = outlet(normed, gate_up_proj.weight.shape[0], gate_up_proj.out_room)
        out = outlet(normed, down_proj.weight.shape[1], down_proj.in_room if product else 0)
        return gate_up_proj.glu(normed, self.activation, product=product, gate_up=gate_up, out=out, apart=apart)

    def record(self, residual: Tensor, delta: Tensor | None, stream: Stream) -> MLPSaved:
        """All of the forward pass but the last projection."""
        x, normed, rstd = self.norm.add(residual, delta, self.mlp.gate_up_proj.in_room)
        gate_up_again = "gate_up" in self.dropped  # and with it what stands behind `normed`
        apart = self.mlp.gate_up_proj.apart(normed) if "normed" in self.dropped and not gate_up_again else None
        return MLPSaved(x, rstd, normed, apart, *self.glu(normed, apart=apart), None)

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
        norm, gate_up_proj, down_proj = self.norm, self.mlp.gate_up_proj, self.mlp.down_proj
        normed = norm.again(saved.x, saved.rstd, gate_up_proj.in_room) if saved.normed is None else saved.normed
        gate_up = self.glu(normed, product=False)[0] if saved.gate_up is None else saved.gate_up
        y = gate_up_proj.kept_out(gate_up)
        d_gate_up = gate_up if y is None else torch.empty_like(gate_up)
        kept = _kept(down_proj, saved.product, saved.product_kept)
        down_proj.glu_backward(
            d, gate_up, self.activation, saved.product, kept, gradients, d_gate_up=d_gate_up, y=saved.delta
        )
        kept = _kept(gate_up_proj, normed, saved.normed_kept)
        return _behind_norm(norm, gate_up_proj, saved, normed, kept, d_gate_up, y, d, gradients, room)


def _kept(projection: Projection, x: Tensor | None, alone: Tensor | None) -> Tensor | None:
    """What the projection left behind x: kept alone, or still there."""
    return projection.kept(x) if alone is None and x is not None else alone


def _behind_norm(
    norm: RMSNorm,
    projection: Projection,
    saved: AttentionSaved | MLPSaved,
    normed: Tensor,
    kept: Tensor | None,
    d_out: Tensor,
    y: Tensor | None,
    d: Tensor,
    gradients: WeightGradients,
    room: int | None,
) -> Tensor | None:
    """Back through a half's first projection and its norm: d_out (T, out), and d (T, H), which passes the half by ->
    (T, H)."""
    read = room is not None or norm.weight.requires_grad
    d_normed = projection.backward(d_out, normed, kept, gradients, y=y, read=read)
    if d_normed is None:
        return None
    out = outlet(d, d.shape[1], room or 0)
    return norm.backward(d_normed, saved.x, saved.rstd, gradients, d_residual=d, out=out)


class WholeLayer:
    """Both halves; only the layer's input is kept, and backward begins by running them again."""

    def __init__(self, attention: AttentionHalf, mlp: MLPHalf) -> None:
        self.attention, self.mlp = attention, mlp

    @property
    def out_room(self) -> int:
        return self.mlp.out_room

    def parameters(self) -> Iterator[nn.Parameter]:
        return chain(self.attention.parameters(), self.mlp.parameters())

    def record(self, residual: Tensor, delta: Tensor | None, stream: Stream) -> tuple[AttentionSaved, MLPSaved]:
        first = self.attention.record(residual, delta, stream)
        between = self.attention.output(first)
        first = replace(first, delta=self.attention.attention.o_proj.kept_out(between))
        return first, self.mlp.record(first.x, between, stream)

    def forward(self, residual: Tensor, delta: Tensor | None, stream: Stream) -> tuple[Tensor, Tensor, LayerSaved]:
        first, second = self.record(residual, delta, stream)
        delta, product_kept = self.mlp.output(second, apart=True)
        return second.x, delta, LayerSaved(first.x, product_kept)

    def backward(
        self, saved: LayerSaved, d: Tensor, stream: Stream, gradients: WeightGradients, room: int | None
    ) -> Tensor | None:
        first, second = self.record(saved.x, None, stream)
        second = replace(second, product_kept=saved.product_kept)
        read = room is not None or any(weight.requires_grad for weight in self.attention.parameters())
        between = self.mlp.backward(second, d, stream, gradients, self.attention.out_room if read else None)
        del second, d
        return None if between is None else self.attention.backward(first, between, stream, gradients, room)


class _Run(torch.autograd.Function):
    """A unit under autograd. Its weights are arguments so that their gradients can be returned."""

    @staticmethod
    def forward(
        ctx: Any, unit: Unit, stream: Stream, room: int, residual: Tensor, delta: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, out, saved = unit.forward(residual, delta, stream)
        ctx.unit, ctx.stream, ctx.kind, ctx.has_delta = unit, stream, type(saved), delta is not None
        ctx.room = room
        ctx.save_for_backward(*(getattr(saved, field.name) for field in fields(saved)))
        return x, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x: Tensor, d_out: Tensor) -> tuple[Tensor | None, ...]:
        assert d_x.data_ptr() == d_out.data_ptr(), "both outputs feed one sum, and nothing else"
        assert ctx.unit is not None, "backward overwrites what forward kept: it runs once"
        gradients = WeightGradients(ctx.stream.sink)
        room = ctx.room if ctx.needs_input_grad[3] or ctx.needs_input_grad[4] else None
        d = ctx.unit.backward(ctx.kind(*ctx.saved_tensors), d_x, ctx.stream, gradients, room)
        returned = gradients.of(ctx.unit.parameters())
        ctx.unit = None
        return None, None, None, d, d if ctx.has_delta else None, *returned


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
            MLPHalf(self.post_attention_layernorm, self.mlp, config.activation),
        )
        self.recompute = "light"

    @property
    def recompute(self) -> Recompute:
        """What is computed again in backward: "none", "light", "mlp" or "full"; see the top of this file."""
        return self._recompute

    @recompute.setter
    def recompute(self, policy: Recompute) -> None:
        self._recompute = policy
        self._units: tuple[Unit, ...] = (WholeLayer(*self._halves),) if policy == "full" else self._halves
        for half in self._halves:
            half.dropped = _DROPPED.get(policy, ())

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
            residual, delta = _Run.apply(unit, stream, room, residual, delta, *unit.parameters())
            room = unit.out_room
        return residual, delta


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
