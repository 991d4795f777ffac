"""Linear maps of the decoder, as one class with one seam: whatever multiplies by a weight goes through a projection.

A plain projection holds its weight as it is; a store may make it anew for each use (nf4.py). A LoRA projection takes
its place in a built model (adapters/lora.py). The layers do not know which one they run. Forward and backward are
methods without autograd: the layer halves call them, inside an autograd function of theirs (layer.py).

A projection may want room: free columns behind the rows of its input and of its output's gradient, where it puts what
belongs to them, so that one matmul reads both. Whoever produces such a tensor allocates it with `with_room` or hands
`outlet` to the op that writes it; a plain projection wants none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chronicals.kernels.dora import DoRARows
from chronicals.kernels.glu_matmul import MatmulThenGLU
from chronicals.kernels.grad_sink import WeightGradients
from chronicals.kernels.ops import Ops


def with_room(like: Tensor, columns: int, room: int) -> Tensor:
    """(T, columns) to be written, T the rows of `like`; `room` free columns lie behind each row."""
    return like.new_empty(len(like), columns + room)[:, :columns]


def outlet(like: Tensor, columns: int, room: int) -> Tensor | None:
    """`with_room` for an op's `out`; None, and the op makes its own, where no room is wanted."""
    return with_room(like, columns, room) if room else None


def widened(x: Tensor, room: int) -> Tensor:
    """(T, columns) from `with_room` -> (T, columns + room), the room included."""
    width = x.shape[1] + room
    single = len(x) < 2  # whose stride says nothing: views by heads and back lose it
    assert single or x.stride() == (width, 1), f"{x.shape[1]} columns and no room of {room} behind: {x.stride()}"
    return x.as_strided((len(x), width), (width, 1), x.storage_offset())


@dataclass(frozen=True)
class GLU:
    """The gated linear unit between two projections: which one, and who computes it. That is one choice for both
    directions, as backward makes forward's product again and other kernels round it otherwise. Dropout goes back by a
    kernel of its own (adapters/joined_variants.py)."""

    activation: str
    matmul: MatmulThenGLU


class Store(nn.Module, ABC):
    """What a projection's weight is made of."""

    @abstractmethod
    def into(self, weight: Tensor) -> Tensor:
        """Makes the weight, (out, in), where it is not there already; returns it."""


class Kept(Store):
    """The weight is there."""

    def into(self, weight: Tensor) -> Tensor:
        return weight


class Projection(nn.Module):
    """`y = x W^T + b`, weight (out, in), the fused outputs of several Hugging Face projections stacked along `out`.

    Parameters are uninitialised until `Decoder.init_weights` or `load_model` fills them.

    Attributes:
        in_room: columns of room that `forward` wants behind its input.
        out_room: columns of room that `input_grad` wants behind the gradient of its output.
        takes_unnormed: whether `backward_unnormed` does without a forward's input that a norm made.
        takes_unglued: whether `glu_backward` does without a forward's input that a GLU made, while training.
        reads_out: whether `backward` wants the output, or makes it again of the input.
        joins_glu: whether its output is one matmul of `operands`, so that the GLU behind it may be a part of that.
        joins_glu_grad: whether that GLU may be although this projection comes behind it: the gradient of its input is
            one matmul, of `grad_operands`, which takes the GLU's gradient in, or it makes the product again itself,
            whatever is kept (dropout).
    """

    in_room = 0
    out_room = 0
    takes_unnormed = False
    takes_unglued = False
    reads_out = False
    joins_glu = True
    joins_glu_grad = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ops: Ops,
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.ops = ops
        self.store: Store = Kept()
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    def use(self) -> Tensor:
        """(out, in): the weight to multiply by, until another projection is used."""
        return self.store.into(self.weight)

    def apart(self, x: Tensor) -> Tensor | None:
        """For `operands` to write: what `weight_grads` will want that stands behind x, for whoever does not keep x.
        None: nothing."""
        return None

    def operands(self, x: Tensor, apart: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(T, in) -> left and right of `y = left @ right.T + bias`, for a matmul that has more to do; fills the room
        behind x, and `apart`."""
        return x, self.use()

    def fill_grad_room(self, d_out: Tensor) -> None:
        """(T, out): fills the room behind d_out, for `weight_grads`."""

    def grad_operands(self, d_out: Tensor) -> tuple[Tensor, Tensor]:
        """(T, out) -> left and right of `dx = left @ right`; fills the room behind d_out."""
        return d_out, self.use()

    def forward(self, x: Tensor, out: Tensor | None = None, apart: Tensor | None = None) -> Tensor:
        """(T, in) -> (T, out), written to `out` where given; `apart` as in `operands`."""
        left, right = self.operands(x, apart)
        if out is None:
            return F.linear(left, right, self.bias)
        if self.bias is None:
            return torch.mm(left, right.t(), out=out)
        return torch.addmm(self.bias, left, right.t(), out=out)

    def input_grad(self, d_out: Tensor) -> Tensor:
        """(T, out) -> (T, in)."""
        left, right = self.grad_operands(d_out)
        return left @ right

    def kept(self, x: Tensor) -> Tensor | None:
        """What `weight_grads` will want that stands behind x, where x is kept: a view, or None."""
        return None

    def kept_out(self, y: Tensor) -> Tensor | None:
        """What `backward` will want of y, the output: y, or None. Then nobody else may write to y."""
        return y if self.reads_out else None

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
        """Back through `forward`: `input_grad`, and `weight_grads`.

        Args:
            d_out, x, kept, gradients: as in `weight_grads`.
            y: `kept_out` of the forward's output, which is overwritten. None where it is not there any more.
            read: whether somebody reads the gradient of x.

        Returns:
            (T, in), or None where nobody reads it.
        """
        d_x = None
        if read:
            d_x = self.input_grad(d_out)
        else:
            self.fill_grad_room(d_out)
        self.weight_grads(d_out, x, kept, gradients)
        return d_x

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
        """`backward`, where it `takes_unnormed`; the forward's input was `x rstd norm`: (T, in), (T,) by rows and (in,)
        by columns."""
        raise NotImplementedError

    def glu(
        self,
        x: Tensor,
        glu: GLU,
        *,
        product: bool = True,
        gate_up: Tensor | None = None,
        out: Tensor | None = None,
        apart: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` to (T, out), the gate's columns and then up's, and where it is wanted their product (T, out / 2);
        written to `gate_up` and `out` where given."""
        return glu.matmul.forward(
            *self.operands(x, apart), glu.activation, bias=self.bias, product=product, gate_up=gate_up, out=out
        )

    def glu_grad(self, d_out: Tensor, gate_up: Tensor, glu: GLU, *, d_gate_up: Tensor, again: bool) -> Tensor | None:
        """`input_grad` where the input is a GLU's product, and on through that GLU: the gradient of gate_up (T, 2 in),
        written to `d_gate_up`, which may be gate_up. Returns the product (T, in) where it is wanted `again`."""
        return glu.matmul.backward(
            *self.grad_operands(d_out), gate_up, glu.activation, d_gate_up=d_gate_up, again=again
        )

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
        """`backward` where the input is a GLU's `product`, and on through that GLU as `glu_grad` does. Product None: it
        was not kept."""
        again = self.glu_grad(d_out, gate_up, glu, d_gate_up=d_gate_up, again=product is None)
        product = again if product is None else product
        assert product is not None
        self.weight_grads(d_out, product, kept, gradients)

    def weight_grads(self, d_out: Tensor, x: Tensor, kept: Tensor | None, gradients: WeightGradients) -> None:
        """The gradients of its parameters, behind `input_grad` or `fill_grad_room` of the same d_out.

        Args:
            d_out: (T, out), what stands in the room behind it included.
            x: (T, in), the forward's input; nothing behind it is read.
            kept: of the forward's input.
            gradients: where they go.
        """
        gradients.matmul(self.weight, d_out.t(), x)
        self.bias_grad(d_out, gradients)

    def bias_grad(self, d_out: Tensor, gradients: WeightGradients) -> None:
        """The gradient of the bias, where it is trained."""
        if self.bias is not None:
            self.vector_grad(self.bias, d_out, gradients)

    def vector_grad(self, parameter: nn.Parameter, rows: Tensor, gradients: WeightGradients) -> None:
        """The sum of `rows` (T, N) is the gradient of `parameter` (N,), where that is trained."""
        if parameter.requires_grad:
            place = gradients.place(parameter, self.ops.column_parts(*rows.shape, rows.device))
            partials = self.ops.column_partials(rows, partial=place)
            if place is None:
                gradients.sum(parameter, partials, self.ops.reduce_partials)

    def placements(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What must be copied before each forward pass of the model: pairs for `ops.place_adapters`."""
        return iter(())

    def scaled_rows(self) -> Iterator[DoRARows]:
        """What must be worked out before each forward pass of the model: for `ops.dora_scales`."""
        return iter(())
