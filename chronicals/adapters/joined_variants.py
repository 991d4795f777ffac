"""Dropout and DoRA around joined matmuls (joined.py), and both variants for weights in 4 bits.

Dropout: forward is joined as ever, with t made from masked inputs. In backward each mask is on the outer side of its
product, so that

    [dx | v] = dy [W, B], then dx += sum_i s_i M_i (v_i A_i)          dA_i = s_i v_i' (M_i x)

whose second half is one pass over x and dx. Where x was normed, what the norm read is enough (joined.py). Where x is a
GLU's product, that pass makes it from gate and up and leaves their gradient. It makes it even where forward's is kept,
by the GLU's own formula: on Hopper forward's, which came out of a matmul's kernel, differs from it in last bits, and
what is kept must not show in the gradients. In evaluation mode it is `JoinedLoRA`.

DoRA: y = c z + b, z what is joined, c = m / |W + s B A| worked out at the start of each micro-batch (`scaled_rows`).
Backward needs y, or makes z again with one more matmul, and writes dz = c dy over it, with the room behind that u
wants; the rest is `JoinedLoRA` for dz. Gate's and up's y is there anyway, o's and down's is kept, (T, H) each; that of
q, k and v has turned, and a bias that is much larger would have rounded z away in it: z is made again.

Left out: DoRA with dropout, which is a second matmul of full size in PEFT: unfused.py.

Shapes: T tokens, R the sum of the ranks, rounded up; v (T, R).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from chronicals.adapters.joined import JoinedLoRA
from chronicals.adapters.joined_nf4 import JoinedNF4LoRA
from chronicals.adapters.unfused import DoRAProjection, Dropout, Target
from chronicals.kernels.dora import DoRARows
from chronicals.kernels.grad_sink import WeightGradients
from chronicals.kernels.lora import LoRADropout, Part
from chronicals.models.projection import GLU, Projection, widened, with_room


class JoinedDropout(JoinedLoRA):
    """`JoinedLoRA` with dropout of its adapters' inputs while training."""

    t_wider = None  # it is of masked inputs
    takes_unglued = True

    def __init__(self, base: Projection, targets: Mapping[str, Target], dropout: Dropout | None = None) -> None:
        super().__init__(base, targets, dropout)
        self.masked = self._masked()

    def _masked(self) -> LoRADropout:
        assert self.dropout is not None
        parts = [
            Part(block.start, block.rank, target.scaling, target.stream)
            for block, target in zip(self.blocks, self.targets.values(), strict=True)
        ]
        return self.ops.lora_dropout(parts, self.dropout.p, seed=self.dropout.seed, device=self.joined.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> JoinedDropout:
        super()._apply(fn, recurse)
        self.masked = self._masked()
        return self

    def operands(self, x: Tensor, apart: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self.drops:
            return super().operands(x, apart)
        assert self.dropout is not None
        rows, columns = self.weight.shape
        left = widened(x, self.in_room)
        t = left[:, columns:]
        self.masked.down(x, self.joined[rows:, :columns], self.dropout.counter, out=t, copy=apart)
        for thin in (t,) if apart is None else (t, apart):
            thin[:, self.rank :].zero_()
        return left, self.joined[:rows]

    def backward(
        self,
        d_out: Tensor,
        x: Tensor,
        kept: Tensor | None,
        gradients: WeightGradients,
        *,
        y: Tensor | None = None,
        read: bool = True,
    ) -> Tensor | None:
        if not self.drops:
            return super().backward(d_out, x, kept, gradients, y=y, read=read)
        assert kept is not None
        return self._masked_backward(d_out, x, kept, gradients, read=read)

    def backward_unnormed(
        self,
        d_out: Tensor,
        x: Tensor,
        rstd: Tensor,
        norm: Tensor,
        kept: Tensor,
        gradients: WeightGradients,
        *,
        read: bool = True,
    ) -> Tensor | None:
        if not self.drops:
            return super().backward_unnormed(d_out, x, rstd, norm, kept, gradients, read=read)
        return self._masked_backward(d_out, x, kept, gradients, read=read, rstd=rstd, norm=norm)

    def _masked_backward(
        self,
        d_out: Tensor,
        x: Tensor,
        kept: Tensor,
        gradients: WeightGradients,
        *,
        read: bool,
        rstd: Tensor | None = None,
        norm: Tensor | None = None,
    ) -> Tensor | None:
        assert self.dropout is not None
        d_x, v, a = self._through_weight(d_out, read=read)
        partials = self.masked.up_(d_x, x, v, a, self.dropout.counter, rstd=rstd, norm=norm)
        self._adapter_grads(d_out, None, None, kept, gradients, parts=partials)
        return d_x

    def _through_weight(self, d_out: Tensor, *, read: bool = True) -> tuple[Tensor | None, Tensor, Tensor]:
        """dy W (T, in), where that is `read`; v = dy B (T, R); and all A, stacked (R, in)."""
        rows, columns = self.weight.shape
        joined = self.whole(weight=read)
        if read:  # a pass adds to dx anyway, and a tile more costs no more than another pass over dy
            d_x, v = (d_out @ joined[:rows]).split((columns, self.in_room), dim=1)
            return d_x, v, joined[rows:, :columns]
        v = d_out.new_empty(len(d_out), self.in_room)
        self.ops.lora_up_backward(d_out, joined[:rows, columns:], self.blocks, alpha=1.0, out=v)
        return None, v, joined[rows:, :columns]

    def glu_backward(
        self,
        d_out: Tensor,
        gate_up: Tensor,
        glu: GLU,
        product: Tensor | None,
        kept: Tensor | None,
        gradients: WeightGradients,
        *,
        d_gate_up: Tensor,
        y: Tensor | None = None,
    ) -> None:
        if not self.drops:
            super().glu_backward(d_out, gate_up, glu, product, kept, gradients, d_gate_up=d_gate_up, y=y)
            return
        assert self.dropout is not None and kept is not None
        d_product, v, a = self._through_weight(d_out)
        assert d_product is not None
        partials = self.masked.up_glu(
            d_product, gate_up, glu.activation, v, a, self.dropout.counter, d_gate_up=d_gate_up
        )
        self._adapter_grads(d_out, None, None, kept, gradients, parts=partials)


class JoinedNF4Dropout(JoinedNF4LoRA, JoinedDropout):
    """The same beside a weight in 4 bits."""


class JoinedDoRA(JoinedLoRA, DoRAProjection):
    """`JoinedLoRA` with a trained magnitude for each row of its targets' weights.

    Attributes:
        c: (out,) float32 (float64 for float64), magnitude / norm of each row; 1 where there is no adapter.
        inverse_norm: (out,), likewise.
    """

    joins_glu = False
    t_wider = u_wider = None
    takes_unnormed = False
    reads_out = True

    def __init__(self, base: Projection, targets: Mapping[str, Target], dropout: Dropout | None = None) -> None:
        super().__init__(base, targets, dropout)
        ends = [0, *(edge for target in targets.values() for edge in (target.part.start, target.part.stop))]
        edges = [*ends, self.weight.shape[0]]
        self.others = [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]
        self._make_scales()

    def _make_scales(self) -> None:
        wide = torch.promote_types(self.joined.dtype, torch.float32)
        self.c, self.inverse_norm = self.joined.new_ones(2, self.weight.shape[0], dtype=wide)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> JoinedDoRA:
        super()._apply(fn, recurse)
        self._make_scales()
        return self

    def scaled_rows(self) -> Iterator[DoRARows]:
        for magnitude, (target, a, b) in zip(self.lora_magnitude_vector.values(), self.adapters(), strict=True):
            rows = target.part
            yield DoRARows(self.weight[rows], a, b, target.scaling, magnitude, self.c[rows], self.inverse_norm[rows])

    def forward(self, x: Tensor, out: Tensor | None = None, apart: Tensor | None = None) -> Tensor:
        return self.ops.scale_columns_(self._before_scales(x, out, apart), self.c, self.bias)

    def _before_scales(self, x: Tensor, out: Tensor | None = None, apart: Tensor | None = None) -> Tensor:
        """z, with room behind it."""
        left, right = self.operands(x, apart)
        out = with_room(x, len(right), self.out_room) if out is None else out
        return torch.mm(left, right.t(), out=out)

    def glu(
        self, x: Tensor, glu: GLU, *, product: bool = True, out: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        gate_up, apart = options.pop("gate_up", None), options.pop("apart", None)
        assert not options
        if not product:
            return self(x, gate_up, apart), None
        z = self._before_scales(x, gate_up, apart)
        return z, self.ops.scaled_glu_forward_(z, self.c, self.bias, glu.activation, out=out)

    def backward(
        self,
        d_out: Tensor,
        x: Tensor,
        kept: Tensor | None,
        gradients: WeightGradients,
        *,
        y: Tensor | None = None,
        read: bool = True,
    ) -> Tensor | None:
        return super().backward(self._through_scales(d_out, x, y, gradients), x, kept, gradients, read=read)

    def glu_backward(
        self,
        d_out: Tensor,
        gate_up: Tensor,
        glu: GLU,
        product: Tensor | None,
        kept: Tensor | None,
        gradients: WeightGradients,
        *,
        d_gate_up: Tensor,
        y: Tensor | None = None,
    ) -> None:
        d_z = self._through_scales(d_out, product, y, gradients)
        super().glu_backward(d_z, gate_up, glu, product, kept, gradients, d_gate_up=d_gate_up)

    def _through_scales(self, d_out: Tensor, x: Tensor | None, y: Tensor | None, gradients: WeightGradients) -> Tensor:
        """dz, with room behind it, written over y; the gradients of magnitudes and of the bias."""
        Projection.bias_grad(self, d_out, gradients)
        if y is None:
            assert x is not None, "either y or x is kept"
            z, factor, bias = self._before_scales(x), self.inverse_norm, None
        else:
            z, factor, bias = y, self.inverse_norm / self.c, self.bias
        parts = [(self.lora_magnitude_vector[name], target.part) for name, target in self.targets.items()]
        for magnitude, part in parts:
            d_part, z_part = d_out[:, part], z[:, part]
            place = gradients.place(magnitude, self.ops.column_parts(*d_part.shape, d_part.device))
            partials = self.ops.dora_backward(
                d_part,
                z_part,
                self.c[part],
                factor[part],
                out=z_part,
                bias=None if bias is None else bias[part],
                partial=place,
            )
            if place is None and magnitude.requires_grad:
                gradients.sum(magnitude, partials, self.ops.reduce_partials)
        for part in self.others:
            z[:, part] = d_out[:, part]
        return z

    def bias_grad(self, d_out: Tensor, gradients: WeightGradients) -> None:
        """It is not of dz, and was made with it."""


class JoinedNF4DoRA(JoinedNF4LoRA, JoinedDoRA):
    """The same beside a weight in 4 bits, whose scales are worked out when it is made wide for forward."""

    _write_scales: Callable[[], None] | None

    def _make_scales(self) -> None:
        super()._make_scales()
        self._write_scales = None  # made at the first use

    def scaled_rows(self) -> Iterator[DoRARows]:
        return iter(())

    def operands(self, x: Tensor, apart: Tensor | None = None) -> tuple[Tensor, Tensor]:
        found = super().operands(x, apart)
        if self._write_scales is None:
            self._write_scales = self.ops.dora_scales(list(super().scaled_rows()))
        self._write_scales()
        return found
