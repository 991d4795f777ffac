"""Both sinks give the same gradients; tied weights, accumulation, and the dtypes between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chronicals.kernels.column_sums import reduce_partials
from chronicals.kernels.grad_sink import (
    Autograd,
    GradSink,
    InPlace,
    Stack,
    WeightGradients,
    matmul_into,
)
from tests.kernels.numerics import nan_filled_memory, relative_error


class Linear(torch.autograd.Function):
    """x W^T + b with a gradient written by hand, as layer halves do it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, sink: GradSink) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.sink = sink
        return x @ weight.t() + bias

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        buffer, add = ctx.sink.open(weight)
        matmul_into(buffer, add, dy.t(), x)
        d_weight = ctx.sink.close(weight, buffer)
        buffer, add = ctx.sink.open(bias)
        d_bias = dy.float().sum(0)
        buffer.add_(d_bias) if add else buffer.copy_(d_bias)
        return dy @ weight, d_weight, ctx.sink.close(bias, buffer), None


def parameters(dtype: torch.dtype = torch.float32) -> tuple[nn.Parameter, nn.Parameter]:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(6, 6, dtype=dtype)), nn.Parameter(torch.randn(6, dtype=dtype))


def train(sink: GradSink, weight: Tensor, bias: Tensor, *, tied: bool, micro_batches: int) -> None:
    for i in range(micro_batches):
        x = torch.randn(9, 6, generator=torch.Generator().manual_seed(i)).to(weight.dtype)
        sink.start()
        out = Linear.apply(x, weight, bias, sink)
        if tied:
            out = Linear.apply(out, weight, bias, sink)
        out.square().sum().backward()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_both_sinks_agree(tied: bool, micro_batches: int) -> None:
    theirs, ours = parameters(), parameters()
    train(Autograd(), *theirs, tied=tied, micro_batches=micro_batches)
    with nan_filled_memory():
        buffers = {parameter: torch.empty_like(parameter, requires_grad=False) for parameter in ours}
    if micro_batches > 1:
        for buffer in buffers.values():
            buffer.zero_()
    train(InPlace(buffers, accumulate=micro_batches > 1), *ours, tied=tied, micro_batches=micro_batches)
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.grad is None
        assert its.grad is not None
        assert relative_error(buffers[mine], its.grad) < 1e-6


@pytest.mark.parametrize("add", [False, True])
def test_bfloat16_operands_add_up_in_float32(add: bool) -> None:
    left, right = torch.randn(5, 40).bfloat16(), torch.randn(40, 7).bfloat16()
    buffer = torch.ones(5, 7) if add else torch.full((5, 7), float("nan"))
    matmul_into(buffer, add, left, right)
    assert relative_error(buffer, left.double() @ right.double() + (1.0 if add else 0.0)) < 1e-6


def test_autograd_gives_the_dtype_that_the_parameter_asks_for() -> None:
    weight, _ = parameters(torch.bfloat16)
    assert Autograd().open(weight)[0].dtype == torch.bfloat16
    weight.grad_dtype = torch.float32  # type: ignore[attr-defined]
    assert Autograd().open(weight)[0].dtype == torch.float32


def test_in_place_refuses_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError) as caught:
        InPlace({}, accumulate=False)
    assert str(caught.value) == "gradients in place are for one process, WORLD_SIZE is 2; use the Autograd sink"


def test_many_micro_batches_need_float32() -> None:
    weight, _ = parameters(torch.bfloat16)
    with pytest.raises(AssertionError, match=r"add up in torch\.bfloat16"):
        InPlace({weight: torch.zeros_like(weight)}, accumulate=True)


def test_parts_of_alike_vectors_lie_together_and_are_added_up_once() -> None:
    first, second = (nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)) for _ in range(2))
    out = torch.full((2, 3), float("nan"))
    sink = InPlace(dict(zip((first, second), out, strict=True)), accumulate=False, stacks=[Stack([first, second], out)])
    for parts in (2, 5):  # another T, other parts
        sink.start()
        for factor, parameter in ((10, second), (1, first)):
            place = sink.partials(parameter, parts)
            assert place is not None and (place.shape, place.dtype) == ((parts, 3), torch.float32)
            place.fill_(factor)
        sink.finish(reduce_partials)
        assert out.tolist() == [[parts] * 3, [10 * parts] * 3]
        out.fill_(0.0)
        sink.finish(reduce_partials)
        assert (out == 0).all(), "nothing came since"
    assert sink.partials(nn.Parameter(torch.zeros(3)), 2) is None, "it has no like"


def test_vectors_that_are_added_up_together_have_equally_many_parts() -> None:
    vectors = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    out = torch.zeros(2, 3)
    sink = InPlace(dict(zip(vectors, out, strict=True)), accumulate=False, stacks=[Stack(vectors, out)])
    sink.partials(vectors[0], 2)
    with pytest.raises(AssertionError, match="5 parts of a vector, and another number of one of its like"):
        sink.partials(vectors[1], 5)


def test_a_vector_that_no_gradient_reached_gets_zero_and_not_the_parts_of_an_earlier_one() -> None:
    vectors = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    out = torch.zeros(2, 3)
    sink = InPlace(dict(zip(vectors, out, strict=True)), accumulate=False, stacks=[Stack(vectors, out)])
    for reached in (vectors, vectors[:1]):
        sink.start()
        for vector in reached:
            place = sink.partials(vector, 2)
            assert place is not None
            place.fill_(1.0)
        sink.finish(reduce_partials)
    assert out.tolist() == [[2.0] * 3, [0.0] * 3]


def test_scratch_is_room_of_gradients_that_come_later() -> None:
    head, other = (nn.Parameter(torch.zeros(n, 8, dtype=torch.bfloat16)) for n in (4, 30))
    flat = torch.zeros(8 * 34 + 128, dtype=torch.bfloat16)
    buffers = {head: flat[:32].view(4, 8), other: flat[32:272].view(30, 8)}
    sink = InPlace(buffers, accumulate=False, flat=flat)
    sink.open(head)
    scratch = sink.scratch(head)
    assert scratch is not None and scratch.dtype == torch.uint8
    assert 0 < len(scratch) <= flat[32:].nbytes and len(scratch) % 16 == 0
    assert scratch.data_ptr() % 256 == 0, "kernels were compiled for this alignment"
    scratch.fill_(1)
    assert flat[:32].abs().sum() == 0, "its own gradient is no scratch"
    assert flat[32:].abs().sum() > 0
    sink.start()
    sink.open(other)
    assert sink.scratch(head) is None, "something is written there"
    assert InPlace(buffers, accumulate=False).scratch(head) is None


@pytest.mark.parametrize("accumulate", [True, False])
def test_gradients_written_together(accumulate: bool) -> None:
    parameters = [torch.nn.Parameter(torch.randn(rows, 5)) for rows in (2, 1, 3)]
    values = [torch.randn_like(parameter) for parameter in parameters]

    def write(buffers: Sequence[Tensor | None], add: bool) -> None:
        for buffer, value in zip(buffers, values, strict=True):
            if buffer is not None:
                buffer.add_(value) if add else buffer.copy_(value)

    sink = InPlace({parameter: torch.zeros_like(parameter) for parameter in parameters}, accumulate=accumulate)
    for times in (1, 2):
        sink.start()
        gradients = WeightGradients(sink)
        gradients.together(parameters, write)
        for parameter, value in zip(parameters, values, strict=True):
            torch.testing.assert_close(sink.buffers[parameter], value * (times if accumulate else 1))
        assert gradients.of(parameters) == (None, None, None)
    parameters[1].requires_grad_(False)
    gradients = WeightGradients(Autograd())
    gradients.together(parameters, write)
    first, frozen, last = gradients.of(parameters)
    assert frozen is None and first is not None and last is not None
    assert torch.equal(first, values[0]) and torch.equal(last, values[2])


def test_nothing_is_written_together_where_all_is_frozen() -> None:
    gradients = WeightGradients(Autograd())
    gradients.together([torch.nn.Parameter(torch.zeros(2), requires_grad=False)], lambda *_: pytest.fail("written"))
