"""Grouped-query attention: its weights, and the half of a layer that runs it behind its norm, with a backward pass
written by hand.

    delta' = o_proj(attention(rope(qkv_proj(norm(x)))))

Left out: dropout of attention's weights, key/value cache.

Shapes: T tokens, H hidden, Nq and Nk query and key heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from chronicals.kernels.grad_sink import WeightGradients
from chronicals.kernels.ops import Ops
from chronicals.models.config import ModelConfig
from chronicals.models.half import Half, Normed, Stream
from chronicals.models.norm import RMSNorm
from chronicals.models.projection import Projection, outlet, with_room


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
        programs = self.ops.qk_partial_programs(len(x), self.queries, self.keys, self.width, x.device)
        places = [gradients.place(norm.weight, count) for norm, count in zip(norms, programs, strict=True)]
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


@dataclass(frozen=True)
class AttentionSaved(Normed):
    qkv: Tensor  # (T, (Nq + 2 Nk) D), as projected; turned in place where q and k are not normed
    turned: Tensor  # the same shape: what attention read; where q and k are not normed it is `qkv`
    q_rstd: Tensor | None
    k_rstd: Tensor | None
    out: Tensor  # (T, Nq, D)
    lse: Tensor  # (Nq, T) float32
    delta: Tensor | None = None  # (T, H), what o_proj made of `out`, if it wants that


class AttentionHalf(Half):
    """Grouped-query attention over packed documents, behind its norm."""

    def __init__(self, norm: RMSNorm, attention: Attention, ops: Ops) -> None:
        super().__init__(norm, attention)
        self.attention, self.ops = attention, ops

    @property
    def out_room(self) -> int:
        return self.attention.o_proj.out_room

    @property
    def unread(self) -> tuple[str, ...]:
        return ("normed",) if self.attention.qkv_proj.takes_unnormed else ()

    def record(self, residual: Tensor, delta: Tensor | None, stream: Stream) -> AttentionSaved:
        """All of the forward pass but the last projection."""
        attention = self.attention
        x, normed, rstd = self.norm.add(residual, delta, attention.qkv_proj.in_room)
        dropped = "normed" in self.dropped
        apart = attention.qkv_proj.apart(normed) if dropped else None
        qkv = attention.qkv_proj(normed, apart=apart)
        turned, q_rstd, k_rstd = attention.turn(qkv, stream)
        out, lse = self.ops.attention.forward(
            *attention.heads(turned),
            stream.cu_seqlens,
            stream.max_seqlen,
            window=attention.window,
            out=attention.outlet(qkv),
        )
        return AttentionSaved(x, rstd, None if dropped else normed, apart, qkv, turned, q_rstd, k_rstd, out, lse)

    def output(self, saved: AttentionSaved) -> Tensor:
        """The last projection: (T, H)."""
        return self.attention.o_proj(saved.out.flatten(1))

    def forward(self, residual: Tensor, delta: Tensor | None, stream: Stream) -> tuple[Tensor, Tensor, AttentionSaved]:
        saved = self.record(residual, delta, stream)
        delta = self.output(saved)
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
        normed = self.normed(saved, attention.qkv_proj)
        return self.behind_norm(attention.qkv_proj, saved, normed, d_qkv, d, gradients, room)
