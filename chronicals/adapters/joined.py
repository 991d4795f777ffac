"""LoRA inside the matmuls of the frozen weight: one each way, whatever part of a fused projection has adapters.

With the adapters of a projection stacked, A (R, in) and B (out, R), which has a block for each target, one buffer holds

    U = [[W, B], [A, 0]]            (out + R, in + R)

    forward     t = s x A'          y = [x | t] [W, B]' + b
    backward    u = s dy B          dx = [dy | u] [W; A]        dB = dy' t        dA = u' x

t and u lie in the room behind x and dy (models/projection.py), so nothing is copied or read again to be added to, and
the thin matmuls that make them read x and dy once for all targets. For backward t alone is kept, which is (T, R).

Where dy is much wider than x, as gate's and up's is, u's pass over it takes longer than one over dx. If the tiles that
the matmul cuts dx into have columns to spare, it makes u beside dx for nothing, and what is left adds to dx; likewise t
of a down projection:

    [dx | v] = dy [W, B]        u = s v        dx += u A
    [y | v] = x [W; A]'         t = s v        y += t B'

dx and y are rounded once more then, as they are where adapters are not joined.

Where x was normed and the norm is not kept, it is not made again: dA = u' x = ((u / rms)' z) times the norm's weight by
columns, z the norm's input (`backward_unnormed`).

W is a view of U. A and B of each target stay parameters of their own, as PEFT has them, and are copied into U at the
start of each micro-batch (`placements`). Dropout and DoRA, which are more than one matmul, are in joined_variants.py.

Shapes: T tokens, R the sum of the ranks, rounded up to `ROOM`: what is beyond it is zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from chronicals.adapters.unfused import Dropout, LoRAProjection, Target
from chronicals.kernels.grad_sink import WeightGradients
from chronicals.kernels.lora_thin import Block
from chronicals.models.projection import GLU, Projection, widened

WIDER = 4  # times, from which on t or u is made beside the other product of its matmul
TILE = 256  # columns that a matmul of cuBLAS cuts its output into, at the most that matters
ROOM = 16  # elements: rows of wide buffers begin at multiples that matmuls ask for (8) and Triton knows of (16)


class JoinedLoRA(LoRAProjection):
    """A projection with adapters of some of its parts, joined with its weight in one buffer.

    Args:
        base: the projection whose place it takes; its weight moves into the buffer.
        targets: by the last part of their names.

    Attributes:
        t_beside: whether forward makes t beside y, where the projection's output is not a GLU's input.
        u_beside: whether backward makes u beside dx, where x is not a GLU's product (v with dropout: always).
    """

    joined: Tensor
    scales: Tensor | None
    joins_glu = True
    joins_glu_grad = True
    t_wider: int | None = WIDER  # times, from which on t is made beside y; None: never
    u_wider: int | None = WIDER  # the same for u, beside dx

    def __init__(self, base: Projection, targets: Mapping[str, Target], dropout: Dropout | None = None) -> None:
        super().__init__(base, targets, dropout)
        ranks = [target.r for target in targets.values()]
        starts = [0, *itertools.accumulate(ranks)]
        self.blocks = [
            Block(target.part.start, target.out_features, start, target.r)
            for target, start in zip(targets.values(), starts, strict=False)
        ]
        self.rank = starts[-1]
        self.in_room = self.out_room = -(-self.rank // ROOM) * ROOM
        rows, columns = self.weight.shape
        self.t_beside = self.bias is None and self._fits_beside(rows, columns, self.t_wider)
        self.u_beside = self._fits_beside(columns, rows, self.u_wider)
        self._join()
        self._scale_ranks()

    def _fits_beside(self, narrow: int, wide: int, wider: int | None) -> bool:
        """Whether thin columns beside an output that is `narrow` cost less than a pass over an input that is `wide`."""
        return wider is not None and wide >= wider * narrow and -narrow % TILE >= self.in_room

    def _scale_ranks(self) -> None:
        """One factor for all ranks, or one each, float32 whatever the dtype of the rest."""
        scalings = [target.scaling for target in self.targets.values()]
        alike = len(set(scalings)) == 1
        self.alpha = scalings[0] if alike else 1.0
        each = torch.tensor(scalings, dtype=torch.promote_types(self.joined.dtype, torch.float32))
        each = each.repeat_interleave(torch.tensor([target.r for target in self.targets.values()]))
        each = F.pad(each, (0, self.in_room - self.rank))
        self.scales = None if alike else each.to(self.joined.device)

    def _join(self) -> None:
        """Makes the buffer, with the weight in it."""
        rows, columns = self.weight.shape
        joined = self.weight.new_zeros(rows + self.out_room, columns + self.in_room)
        joined[:rows, :columns] = self.weight.detach()
        self.register_buffer("joined", joined, persistent=False)
        self._share()

    def _share(self) -> None:
        """The weight's memory is its part of the buffer."""
        rows, columns = self.weight.shape
        self.weight.data = self.joined[:rows, :columns]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> JoinedLoRA:
        super()._apply(fn, recurse)
        self._share()
        self._scale_ranks()
        return self

    def placements(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows, columns = self.weight.shape
        a_stack, b_stack = self.joined[rows:, :columns], self.joined[:rows, columns:]
        for block, (_, a, b) in zip(self.blocks, self.adapters(), strict=True):
            yield a, a_stack[block.ranks]
            yield b, b_stack[block.outputs, block.ranks]

    def apart(self, x: Tensor) -> Tensor:
        return x.new_empty(len(x), self.in_room)

    def whole(self, *, weight: bool = True) -> Tensor:
        """U, all of it to be read, or but for the `weight`."""
        return self.joined

    def operands(self, x: Tensor, apart: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows, columns = self.weight.shape
        left = widened(x, self.in_room)
        t = left[:, columns:]
        self.ops.lora_down(x, self.joined[rows:, :columns], alpha=self.alpha, scales=self.scales, out=t, copy=apart)
        return left, self.joined[:rows]

    def fill_grad_room(self, d_out: Tensor) -> None:
        rows, columns = self.weight.shape
        b, u = self.joined[:rows, columns:], widened(d_out, self.out_room)[:, rows:]
        self.ops.lora_up_backward(d_out, b, self.blocks, alpha=self.alpha, scales=self.scales, out=u)

    def grad_operands(self, d_out: Tensor) -> tuple[Tensor, Tensor]:
        self.fill_grad_room(d_out)
        return widened(d_out, self.out_room), self.joined[:, : self.weight.shape[1]]

    def forward(self, x: Tensor, out: Tensor | None = None, apart: Tensor | None = None) -> Tensor:
        if not self.t_beside:
            return Projection.forward(self, x, out, apart)
        assert out is None, "y has t's columns behind it"
        rows, columns = self.weight.shape
        wide, t = x @ self.whole()[:, :columns].t(), self.kept(x) if apart is None else apart
        return self._add(wide, self.joined[:rows, columns:].t(), t)

    def _add(self, wide: Tensor, right: Tensor, kept: Tensor, rows: Tensor | None = None) -> Tensor:
        """(T, N + R), [y | v] -> y + s v R, R (R, N) being `right`; s v is written to `kept` (T, R), times `rows`."""
        y, thin = wide.split(right.shape[::-1], dim=1)
        return self.ops.lora_add_(y, thin, right, alpha=self.alpha, scales=self.scales, kept=kept, rows=rows)

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
        if not (self.u_beside and read):
            return super().backward(d_out, x, kept, gradients, y=y, read=read)
        rows, columns = self.weight.shape
        wide, u = d_out @ self.whole()[:rows], widened(d_out, self.out_room)[:, rows:]
        d_x = self._add(wide, self.joined[rows:, :columns], u)
        self.weight_grads(d_out, x, kept, gradients)
        return d_x

    @property
    def takes_unnormed(self) -> bool:  # type: ignore[override]
        """Not in float16, whose range u / rms may leave."""
        return self.joined.dtype != torch.float16

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
        rows, columns = self.weight.shape
        joined, u, d_x = self.whole(weight=read), d_out.new_empty(len(d_out), self.out_room), None
        if read and self.u_beside:
            d_x = self._add(d_out @ joined[:rows], joined[rows:, :columns], u, rstd)
        else:
            left, b = widened(d_out, self.out_room), joined[:rows, columns:]
            scaling: dict[str, Any] = {"alpha": self.alpha, "scales": self.scales}
            self.ops.lora_up_backward(d_out, b, self.blocks, **scaling, out=left[:, rows:], copy=u, rows=rstd)
            d_x = left @ joined[:, :columns] if read else None
        self._adapter_grads(d_out, u, x, kept, gradients, norm=norm)
        return d_x

    def input_grad(self, d_out: Tensor) -> Tensor:
        return Projection.input_grad(self, d_out)

    def glu(self, x: Tensor, glu: GLU, **options: Any) -> tuple[Tensor, Tensor | None]:
        return Projection.glu(self, x, glu, **options)

    def glu_grad(self, d_out: Tensor, gate_up: Tensor, glu: GLU, **options: Any) -> Tensor | None:
        return Projection.glu_grad(self, d_out, gate_up, glu, **options)

    def kept(self, x: Tensor) -> Tensor:
        return widened(x, self.in_room)[:, x.shape[1] :]

    def weight_grads(self, d_out: Tensor, x: Tensor, kept: Tensor | None, gradients: WeightGradients) -> None:
        assert kept is not None, "t goes with x"
        self._adapter_grads(d_out, widened(d_out, self.out_room)[:, d_out.shape[1] :], x, kept, gradients)

    def _adapter_grads(
        self,
        d_out: Tensor,
        u: Tensor | None,
        x: Tensor | None,
        kept: Tensor,
        gradients: WeightGradients,
        **options: Tensor | None,
    ) -> None:
        """Of A, B and the bias; `options` of `lora_grads`."""
        pairs = [(a, b) for _, a, b in self.adapters()]

        def write(buffers: Sequence[Tensor | None], add: bool) -> None:
            self.ops.lora_grads(d_out, u, x, kept, self.blocks, buffers[::2], buffers[1::2], add=add, **options)

        gradients.together([parameter for pair in pairs for parameter in pair], write)
        self.bias_grad(d_out, gradients)
