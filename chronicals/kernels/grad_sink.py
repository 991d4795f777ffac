"""Where a weight's gradient goes: into buffers of our own, or back to autograd.

Whoever computes a weight gradient by hand (projections, norms, the loss head) asks the model's one sink, chosen when
the model is built:

    buffer, add = sink.open(parameter)
    matmul_into(buffer, add, d_out.t(), x)      # or vector_into, for norms and biases
    return sink.close(parameter, buffer)        # what the autograd function returns for the parameter

A layer half has several weights, frozen ones among them: it writes them through one `WeightGradients`.

`InPlace` writes float32 or bf16 buffers directly: a float32 gradient cannot live in the `.grad` of a bf16 parameter,
and nothing is copied or zeroed. `Autograd` returns the gradient, so that the hooks of DDP and FSDP2 fire; under
`InPlace` they fire too, with None, and each rank would train alone without a word. Hence it is refused there.
Nothing may drain, check or count gradients in a parameter hook under `InPlace`: read the buffers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor


class GradSink(Protocol):
    def start(self) -> None:
        """A new micro-batch begins; the decoder's forward calls it."""

    def open(self, parameter: Tensor) -> tuple[Tensor, bool]:
        """Where to write the gradient, in the parameter's shape, and whether to add to what is there."""

    def close(self, parameter: Tensor, buffer: Tensor) -> Tensor | None:
        """The gradient is written; what the autograd function returns for the parameter."""

    def scratch(self, parameter: Tensor) -> Tensor | None:
        """Memory to work in before `parameter` is closed: float32, of its shape, contents undefined. None: there is
        none to spare."""


class InPlace:
    """Gradients go into `buffers`, and autograd gets None.

    A parameter written twice in a micro-batch (tied embeddings: the head writes, the embedding adds) is added to the
    second time; with `accumulate` also the first, and whoever owns the buffers zeroes them once a step.

    Args:
        buffers: parameter -> its buffer, of its shape, float32 or the parameter's dtype; float32 where `accumulate`.
        accumulate: a step has several micro-batches.
        flat: (N,) what all 16-bit buffers are views of, where they are: lent as scratch.

    Raises:
        ValueError: there are several processes (WORLD_SIZE), whose gradients nobody would reduce.
    """

    def __init__(self, buffers: Mapping[Tensor, Tensor], *, accumulate: bool, flat: Tensor | None = None) -> None:
        world = os.environ.get("WORLD_SIZE", "1")
        if world != "1":
            raise ValueError(f"gradients in place are for one process, WORLD_SIZE is {world}; use the Autograd sink")
        for parameter, buffer in buffers.items():
            assert buffer.shape == parameter.shape, f"a buffer {tuple(buffer.shape)} for {tuple(parameter.shape)}"
            assert buffer.dtype == torch.float32 or not accumulate, f"many micro-batches add up in {buffer.dtype}"
        self.buffers, self.accumulate, self.flat = buffers, accumulate, flat
        self.written: set[Tensor] = set()  # this micro-batch
        self.reached: set[Tensor] = set()  # ever

    def start(self) -> None:
        self.written.clear()

    def open(self, parameter: Tensor) -> tuple[Tensor, bool]:
        add = self.accumulate or parameter in self.written
        self.written.add(parameter)
        self.reached.add(parameter)
        return self.buffers[parameter], add

    def close(self, parameter: Tensor, buffer: Tensor) -> None:
        return None

    def scratch(self, parameter: Tensor) -> Tensor | None:
        """Space of gradients that come later. The head is the first to write, when activations fill the memory."""
        if self.flat is None or self.accumulate or self.written - {parameter}:
            return None
        own = self.buffers[parameter]
        start = (own.data_ptr() - self.flat.data_ptr()) // self.flat.element_size()
        room = max(self.flat[:start], self.flat[start + own.numel() :], key=len)
        needed = parameter.numel() * torch.float32.itemsize // self.flat.element_size()
        aligned = -(-room.data_ptr() // 256) * 256 - room.data_ptr()
        room = room[aligned // self.flat.element_size() :][:needed]
        return room.view(torch.float32).view(parameter.shape) if len(room) == needed else None


class Autograd:
    """Gradients are new tensors of the parameter's `grad_dtype`, which autograd adds up and hands to its hooks."""

    def start(self) -> None:
        pass

    def open(self, parameter: Tensor) -> tuple[Tensor, bool]:
        return torch.empty_like(parameter, dtype=getattr(parameter, "grad_dtype", None) or parameter.dtype), False

    def close(self, parameter: Tensor, buffer: Tensor) -> Tensor:
        return buffer

    def scratch(self, parameter: Tensor) -> None:
        return None


def matmul_into(buffer: Tensor, add: bool, left: Tensor, right: Tensor) -> None:
    """`buffer = left @ right`, or `+=` where `add`. (M, N), (M, K), (K, N).

    A float32 buffer takes half precision operands without rounding in between: on CUDA inside the matmul, elsewhere
    by widening them.
    """
    if buffer.dtype != left.dtype and not buffer.is_cuda:
        left, right = left.to(buffer.dtype), right.to(buffer.dtype)
    if buffer.dtype == left.dtype:
        torch.addmm(buffer, left, right, out=buffer) if add else torch.mm(left, right, out=buffer)
    elif add:
        torch.addmm(buffer, left, right, out_dtype=buffer.dtype, out=buffer)
    else:
        torch.mm(left, right, out_dtype=buffer.dtype, out=buffer)


def vector_into(buffer: Tensor, add: bool, gradient: Tensor) -> None:
    """`buffer = gradient`, or `+=` where `add`; `gradient` was reduced in float32."""
    buffer.add_(gradient) if add else buffer.copy_(gradient)


class WeightGradients:
    """The weight gradients of one backward call: written into the sink one by one, returned to autograd together."""

    def __init__(self, sink: GradSink) -> None:
        self.sink = sink
        self._returned: dict[Tensor, Tensor | None] = {}

    def matmul(self, parameter: Tensor, left: Tensor, right: Tensor) -> None:
        """`left @ right` is the gradient of `parameter`; nothing is computed for a frozen one. (M, K), (K, N)."""
        if parameter.requires_grad:
            buffer, add = self.sink.open(parameter)
            matmul_into(buffer, add, left, right)
            self._returned[parameter] = self.sink.close(parameter, buffer)

    def vector(self, parameter: Tensor, gradient: Tensor) -> None:
        """`gradient`, of the parameter's shape, is its gradient."""
        if parameter.requires_grad:
            buffer, add = self.sink.open(parameter)
            vector_into(buffer, add, gradient)
            self._returned[parameter] = self.sink.close(parameter, buffer)

    def sums(self, parameter: Tensor, reduce: Callable[..., Tensor]) -> None:
        """Its gradient is what `reduce(dtype, out=)` returns in that dtype, or writes to `out` where that is given."""
        if parameter.requires_grad:
            buffer, add = self.sink.open(parameter)
            buffer.add_(reduce(torch.float32)) if add else reduce(buffer.dtype, out=buffer)
            self._returned[parameter] = self.sink.close(parameter, buffer)

    def of(self, parameters: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
        """What an autograd function returns for them; None where there is nothing to return."""
        return tuple(self._returned.get(parameter) for parameter in parameters)
