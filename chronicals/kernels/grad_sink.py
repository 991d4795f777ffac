"""Where a weight's gradient goes: into buffers of our own, or back to autograd.

Whoever computes a weight gradient by hand (projections, norms, the loss head) asks the model's one sink, `Autograd`
until a trainer sets another:

    buffer, add = sink.open(parameter)
    matmul_into(buffer, add, d_out.t(), x)
    return sink.close(parameter, buffer)        # what the autograd function returns for the parameter

A layer half has several weights, frozen ones among them: it writes them through one `WeightGradients`. The gradients
of vectors, norms' weights and biases, are sums over all rows: kernels leave them in parts (see `Stack`).

`InPlace` writes float32 or 16-bit buffers directly: a float32 gradient cannot live in the `.grad` of a 16-bit
parameter, and nothing is copied or zeroed. `Autograd` returns the gradient, so that the hooks of DDP and FSDP2 fire;
under `InPlace` they fire too, with None, and each rank would train alone without a word. Hence it is refused there.
Nothing may drain, check or count gradients in a parameter hook under `InPlace`: read the buffers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

Reduce = Callable[..., Tensor]  # reduce_partials(partials, dtype, out=, add=)


class GradSink(Protocol):
    def start(self) -> None:
        """A new micro-batch begins; the decoder's forward calls it."""

    def open(self, parameter: Tensor) -> tuple[Tensor, bool]:
        """Where to write the gradient, in the parameter's shape, and whether to add to what is there."""

    def close(self, parameter: Tensor, buffer: Tensor) -> Tensor | None:
        """The gradient is written; what the autograd function returns for the parameter."""

    def partials(self, parameter: Tensor, parts: int) -> Tensor | None:
        """(parts, N) float32 to write: a vector's gradient in parts, which the sink adds up later with those of its
        like in other layers. None: the caller adds them up."""

    def scratch(self, parameter: Tensor) -> Tensor | None:
        """(n,) uint8, memory to work in before `parameter` is closed, contents undefined. None: there is none to
        spare."""


class Stack:
    """Vectors of one role, one a layer, whose gradients are added up from their parts in one launch.

    Args:
        parameters: n of (N,).
        out: (n, N), their gradients' buffers as one view.
    """

    def __init__(self, parameters: Sequence[Tensor], out: Tensor) -> None:
        self.places = {parameter: i for i, parameter in enumerate(parameters)}
        self.out = out
        self.partials: Tensor | None = None  # (n, parts, N) float32, made at the first use

    def place(self, parameter: Tensor, parts: int, *, first: bool) -> Tensor:
        """(parts, N) to write. `first`: of this micro-batch; the others then have as many parts."""
        if self.partials is None or self.partials.shape[1] != parts:
            assert first, f"{parts} parts of a vector, and another number of one of its like"
            n, width = self.out.shape
            self.partials = self.out.new_zeros(n, parts, width, dtype=torch.float32)
        return self.partials[self.places[parameter]]


class InPlace:
    """Gradients go into `buffers`, and autograd gets None.

    A parameter written twice in a micro-batch (tied embeddings: the head writes, the embedding adds) is added to the
    second time; with `accumulate` also the first, and whoever owns the buffers zeroes them once a step.

    Args:
        buffers: parameter -> its buffer, of its shape, float32 or the parameter's dtype; float32 where `accumulate`.
        accumulate: a step has several micro-batches.
        flat: (N,) what all 16-bit buffers are views of, where they are: lent as scratch. None with `accumulate`, where
            nothing may be lent.
        stacks: vectors whose parts are added up by `finish`, which ends a micro-batch then.

    Raises:
        ValueError: there are several processes (WORLD_SIZE), whose gradients nobody would reduce.
    """

    def __init__(
        self,
        buffers: Mapping[Tensor, Tensor],
        *,
        accumulate: bool,
        flat: Tensor | None = None,
        stacks: Sequence[Stack] = (),
    ) -> None:
        world = os.environ.get("WORLD_SIZE", "1")
        if world != "1":
            raise ValueError(f"gradients in place are for one process, WORLD_SIZE is {world}; use the Autograd sink")
        for parameter, buffer in buffers.items():
            assert buffer.shape == parameter.shape, f"a buffer {tuple(buffer.shape)} for {tuple(parameter.shape)}"
            assert buffer.dtype == torch.float32 or not accumulate, f"many micro-batches add up in {buffer.dtype}"
        assert flat is None or not accumulate, "what adds up is never free"
        self.buffers, self.accumulate, self.flat = buffers, accumulate, flat
        self._stacks = {parameter: stack for stack in stacks for parameter in stack.places}
        self._waiting: dict[Stack, None] = {}  # in the order in which they came
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

    def partials(self, parameter: Tensor, parts: int) -> Tensor | None:
        stack = self._stacks.get(parameter)
        if stack is None:
            return None
        assert parameter not in self.written, "a second set of parts would overwrite the first"
        place = stack.place(parameter, parts, first=stack not in self._waiting)
        self.written.add(parameter)
        self.reached.add(parameter)
        self._waiting[stack] = None
        return place

    def finish(self, reduce: Reduce) -> None:
        """Adds up the parts that came in this micro-batch; `reduce` is the ops' `reduce_partials`."""
        for stack in self._waiting:
            assert stack.partials is not None
            for parameter, place in stack.places.items():
                if parameter not in self.written:  # no gradient reached it: zero, not the parts of an earlier one
                    stack.partials[place].zero_()
            reduce(stack.partials, stack.out.dtype, out=stack.out, add=self.accumulate)
        self._waiting.clear()

    def scratch(self, parameter: Tensor) -> Tensor | None:
        """Space of gradients that come later. The head is the first to write, when activations fill the memory."""
        if self.flat is None or self.written - {parameter}:
            return None
        own = self.buffers[parameter]
        start = (own.data_ptr() - self.flat.data_ptr()) // self.flat.element_size()
        room = max(self.flat[:start], self.flat[start + own.numel() :], key=len).view(torch.uint8)
        aligned = -room.data_ptr() % 256
        room = room[aligned : aligned + (len(room) - aligned) // 16 * 16]
        return room if len(room) else None


class Autograd:
    """Gradients are new tensors of the parameter's `grad_dtype`, which autograd adds up and hands to its hooks."""

    def start(self) -> None:
        pass

    def open(self, parameter: Tensor) -> tuple[Tensor, bool]:
        return torch.empty_like(parameter, dtype=getattr(parameter, "grad_dtype", None) or parameter.dtype), False

    def close(self, parameter: Tensor, buffer: Tensor) -> Tensor:
        return buffer

    def partials(self, parameter: Tensor, parts: int) -> None:
        return None

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

    def together(self, parameters: Sequence[Tensor], write: Callable[[Sequence[Tensor | None], bool], None]) -> None:
        """`write(buffers, add)` writes the gradients of these parameters, or adds to them; None stands for a frozen
        one."""
        opened = {parameter: self.sink.open(parameter) for parameter in parameters if parameter.requires_grad}
        if not opened:
            return
        adds = {add for _, add in opened.values()}
        assert len(adds) == 1, "some were written before"
        write([opened[parameter][0] if parameter in opened else None for parameter in parameters], adds.pop())
        for parameter, (buffer, _) in opened.items():
            self._returned[parameter] = self.sink.close(parameter, buffer)

    def place(self, parameter: Tensor, parts: int) -> Tensor | None:
        """Where to leave the gradient of a vector (N,) in parts: (parts, N) float32, and that was all; None: hand them
        to `sum`."""
        return self.sink.partials(parameter, parts) if parameter.requires_grad else None

    def sum(self, parameter: Tensor, partials: Tensor, reduce: Reduce) -> None:
        """The sum of `partials` (parts, N) is the gradient of `parameter`, which is not frozen: nobody makes parts for
        one that is. `reduce` is the ops' `reduce_partials`."""
        buffer, add = self.sink.open(parameter)
        reduce(partials, buffer.dtype, out=buffer, add=add)
        self._returned[parameter] = self.sink.close(parameter, buffer)

    def of(self, parameters: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
        """What an autograd function returns for them; None where there is nothing to return."""
        return tuple(self._returned.get(parameter) for parameter in parameters)
