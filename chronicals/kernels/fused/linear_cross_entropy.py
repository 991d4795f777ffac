"""Linear cross-entropy on the GPU: cuBLAS for the matmuls, one row kernel between them, gradients made in the forward.

The loss is that of chronicals/kernels/linear_cross_entropy.py; docs/math/linear-cross-entropy.md derives it and both
gradients, dH = dlogits W and dW = dlogits^T H. With R supervised rows, V columns and H features there are two ways:

`fast` walks chunks of rows, each against the whole vocabulary: logits = h W^T, the row kernel turns them into dlogits
in place and into losses, dH = dlogits W, dW += dlogits^T h. Three matmuls of 2 R V H, one write and three reads of the
R V logits beside (four and five with what the matmuls themselves write and read), a chunk of logits in memory. dW adds
up in float32: in the caller's buffer where that is float32, else in a scratch where there is more than one chunk. Where
one chunk is all, its logits lie in memory that the sink lends (gradients that come later), whole or, where that is too
small, their first columns: then both walks of `frugal` run, over two blocks whose logits are kept.

`frugal` walks blocks of columns, each for all rows, twice: first only the maximum and the sum of each row (online
softmax); then the logits again, dlogits in place, the block's rows of dW written once, dH added up in float32. Four
matmuls, a block of logits and dH in memory. It is Cut Cross-Entropy (Wijmans et al. 2024) with cuBLAS's matmuls.

Where no gradient is wanted, or each row's comes in later (`reduction="none"`), both modes are the blocks: the first
walk in the forward, the second in the backward pass, with wide blocks for `fast` and narrow ones for `frugal`.

Rows are gathered by `target_rows` before they meet the matmul, zero where there is no target, and scattered after it,
so that a row which nobody supervises is never read and may hold NaN. Nothing is read back on the host.

Left out: skipping negligible tiles (see cross_entropy_rows.py), class weights, a bias, float64.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from chronicals.kernels.fused.cross_entropy_rows import (
    Softmax,
    cross_entropy_rows_,
    dlogits_of_block_,
    losses_of_block,
)
from chronicals.kernels.fused.supervised_rows import gather_rows, scale_, scatter_rows
from chronicals.kernels.grad_sink import GradSink, matmul_into
from chronicals.kernels.linear_cross_entropy import Call, HeadOptions, public

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK_ROWS = 4096  # below that, matmuls with a small H fall off and dW is re-read often
LEAST_CHUNK_ROWS = 1024
FRUGAL_LOGITS = 90_000_000  # bytes of a block of logits: with dH and h, 132 MB at 8192 x 896 x 151936
FRUGAL_COLUMNS = 6000  # a block of dlogits is then read back from L2, in part
ALIGNMENT = 64  # columns: row strides that cuBLAS's widest loads take, whatever the vocabulary
PLAIN = HeadOptions()
KEPT_FREE = 0.1  # of the free memory, for fragmentation
LEAST_LENT = 0.25  # of the columns: less is not worth a second sweep that finds nothing in L2


class Plan(NamedTuple):
    """How much of the (R, V) logits exists at a time."""

    chunk_rows: int  # against the whole vocabulary; 0: all rows, by blocks of columns
    block_columns: int  # for all rows, where the walk is by blocks

    @classmethod
    def fast(cls, rows: int, vocab: int, chunk_rows: int) -> Plan:
        """Even chunks of at most `chunk_rows`, or blocks of as many logits."""
        chunks = max(1, triton.cdiv(rows, chunk_rows))
        chunk = triton.cdiv(rows, chunks)
        if chunks > 1:
            chunk = min(_round_up(chunk, 128), chunk_rows)  # whole tiles of the matmul
        return cls(chunk, min(vocab, _round_up(triton.cdiv(vocab, chunks), 128)))

    @classmethod
    def frugal(cls, rows: int, vocab: int, itemsize: int) -> Plan:
        """Even blocks of at most `FRUGAL_LOGITS` bytes and `FRUGAL_COLUMNS` columns, but 128 columns at least."""
        most = min(FRUGAL_COLUMNS, FRUGAL_LOGITS // (max(1, rows) * itemsize))
        most = max(128, most // 128 * 128)
        blocks = triton.cdiv(vocab, most)
        return cls(0, min(vocab, _round_up(triton.cdiv(vocab, blocks), 128)))


def _round_up(n: int, multiple: int) -> int:
    return triton.cdiv(n, multiple) * multiple


def plan_for(mode: str, chunk_rows: int | None, rows: int, hidden: Tensor, weight: Tensor, scratch: bool) -> Plan:
    """The plan that a mode stands for. `auto` asks for the free memory once for a shape and keeps to its answer, so
    that a captured graph and its warm-up agree; `scratch`: dW will need a float32 scratch."""
    vocab, features = weight.shape
    if mode == "fast":
        return Plan.fast(rows, vocab, chunk_rows or CHUNK_ROWS)
    if mode == "auto":
        if hidden.device.type != "cuda":
            return Plan.fast(rows, vocab, chunk_rows or CHUNK_ROWS)
        return _by_free_memory(hidden.device, chunk_rows, rows, vocab, features, weight.element_size(), scratch)
    return Plan.frugal(rows, vocab, weight.element_size())


@functools.cache
def _by_free_memory(
    device: torch.device,
    chunk_rows: int | None,
    rows: int,
    vocab: int,
    features: int,
    itemsize: int,
    scratch: bool,
) -> Plan:
    """`fast` with the largest chunk that fits, of 4096, 2048 and 1024 rows; `frugal` where none does."""
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    for chunk in [chunk_rows] if chunk_rows else [CHUNK_ROWS, CHUNK_ROWS // 2, LEAST_CHUNK_ROWS]:
        plan = Plan.fast(rows, vocab, chunk)
        needed = plan.chunk_rows * (_round_up(vocab, ALIGNMENT) + 2 * features) * itemsize
        if scratch and plan.chunk_rows < rows:
            needed += 4 * vocab * features
        if needed <= (1 - KEPT_FREE) * free:
            return plan
    return Plan.frugal(rows, vocab, itemsize)


def _blocks(vocab: int, columns: int) -> list[slice]:
    """Blocks of at most `columns`; what does not fill 8 is one of its own at the end, of two columns at least.

    cuBLAS takes its slow kernels wherever a dimension is not a multiple of 16 bytes, even if the strides are. A product
    of one column is a matrix times a vector to it (`gemvx`), whose offsets are 32 bits: past 2^31 logits it writes
    outside them (seen on an H200, CUDA 13.0, torch 2.11), where every other product here is right.
    """
    aligned = vocab // 8 * 8
    if vocab == aligned + 1 > 1:
        aligned -= 8
    cuts = [*range(0, aligned, columns), aligned, vocab]
    return [slice(start, stop) for start, stop in itertools.pairwise(cuts) if start < stop]


def _logits_buffer(rows: int, columns: int, weight: Tensor, scratch: Tensor | None = None) -> Tensor:
    """(rows, at least `columns`), in `scratch` where there is one."""
    shape = rows, _round_up(columns, ALIGNMENT)
    if scratch is None:
        return torch.empty(shape, dtype=weight.dtype, device=weight.device)
    return scratch.view(weight.dtype)[: shape[0] * shape[1]].view(shape)


def _lent_columns(rows: int, weight: Tensor, scratch: Tensor | None) -> int:
    """How many columns of the logits (rows, V) lie in `scratch`: all, none, or whole tiles of the matmul."""
    vocab = len(weight)
    if scratch is None or rows == 0:
        return 0
    room = scratch.nbytes // (rows * weight.element_size()) // 128 * 128
    if room >= _round_up(vocab, ALIGNMENT):
        return vocab
    room = min(room, (vocab - 2) // 128 * 128)
    return room if room >= LEAST_LENT * vocab else 0


def _kept_logits(rows: int, weight: Tensor, scratch: Tensor, columns: int) -> list[tuple[slice, Tensor]]:
    """Blocks of columns and where the logits of each lie: the first `columns` in `scratch`."""
    rest = _logits_buffer(rows, len(weight) - columns, weight)
    more = _blocks(len(weight) - columns, len(weight))
    return [
        (slice(0, columns), _logits_buffer(rows, columns, weight, scratch)),
        *((slice(columns + block.start, columns + block.stop), rest[:, block]) for block in more),
    ]


def _passing_logits(rows: int, weight: Tensor, columns: int) -> list[tuple[slice, Tensor]]:
    """Blocks of at most `columns`, whose logits lie in one place, one after another."""
    vocab = len(weight)
    buffer = _logits_buffer(rows, min(columns, vocab), weight)
    return [(block, buffer[:, : block.stop - block.start]) for block in _blocks(vocab, columns)]


def _fp32(scratch: Tensor | None, weight: Tensor) -> Tensor | None:
    """`scratch` as float32 of the weight's shape, where it is large enough."""
    if scratch is None or scratch.nbytes < 4 * weight.numel():
        return None
    return scratch.view(torch.float32)[: weight.numel()].view(weight.shape)


def linear_cross_entropy_by_rows(
    hidden: Tensor,
    weight: Tensor,
    target_rows: Tensor,
    targets: Tensor,
    scale: Tensor,
    losses: Tensor,
    dhidden: Tensor | None,
    dweight: Tensor | None,
    *,
    add: bool = False,
    options: HeadOptions = PLAIN,
    chunk_rows: int = CHUNK_ROWS,
    scratch: Tensor | None = None,
) -> None:
    """Losses and gradients in one walk over chunks of rows (`fast`).

    Args:
        hidden: (T, H), last stride 1; only supervised rows are read.
        weight: (V, H).
        target_rows: (R,) int32 or int64, contiguous: rows of `hidden`, each at most once where there is a target.
        targets: (R,) int64 contiguous; -100: no target.
        scale: (1,) float32, multiplies the gradients and not the losses.
        losses: (R,) float32. Overwritten; 0 where there is no target.
        dhidden: (T, H) or longer, last stride 1. Overwritten, by zero where there is no target. None: unwanted.
        dweight: (V, H). Overwritten, or added to if `add`. None: unwanted.
        chunk_rows: rows whose logits exist at a time.
        scratch: (n,) uint8, any contents: where several chunks add up a dW that is not float32, or where the logits of
            a single chunk lie. None, or too small: allocated.
    """
    (rows,), (vocab, features) = target_rows.shape, weight.shape
    chunk_rows = min(chunk_rows, rows)
    if dhidden is not None:
        dhidden.zero_()
    if rows == 0:
        return _nothing_for(dweight, add)
    lent = chunk_rows == rows and _lent_columns(rows, weight, scratch) == vocab
    buffer = _logits_buffer(chunk_rows, vocab, weight, scratch if lent else None)
    h_buffer = torch.empty(chunk_rows, features, dtype=weight.dtype, device=weight.device)
    blocks = _blocks(vocab, vocab)
    exact = torch.float32 if len(blocks) > 1 else weight.dtype  # two products are added up before they are rounded
    dh_buffer = None if dhidden is None else torch.empty_like(h_buffer, dtype=exact)
    total, adding = dweight, add
    if dweight is not None and dweight.dtype != torch.float32 and chunk_rows < rows:
        total, adding = _fp32(scratch, weight), False
        if total is None:
            total = torch.empty(vocab, features, dtype=torch.float32, device=weight.device)
    for start in range(0, rows, chunk_rows):
        part = slice(start, min(start + chunk_rows, rows))
        count = part.stop - start
        h, logits = h_buffer[:count], buffer[:count, :vocab]
        gather_rows(hidden, target_rows[part], targets[part], h)
        for block in blocks:
            torch.mm(h, weight[block].T, out=logits[:, block])
        cross_entropy_rows_(logits, targets[part], scale, losses[part], options)
        for block in blocks:
            if dh_buffer is not None:
                matmul_into(dh_buffer[:count], block.start > 0, logits[:, block], weight[block])
            if total is not None:
                matmul_into(total[block], adding or start > 0, logits[:, block].T, h)
        if dhidden is not None and dh_buffer is not None:
            scatter_rows(dh_buffer[:count], target_rows[part], targets[part], dhidden)
    if dweight is not None and total is not None and total is not dweight:
        dweight.add_(total) if add else dweight.copy_(total)


def linear_cross_entropy_losses(
    hidden: Tensor,
    weight: Tensor,
    target_rows: Tensor,
    targets: Tensor,
    *,
    options: HeadOptions = PLAIN,
    blocks: list[tuple[slice, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Losses and log-sum-exps, (R,) float32 each, in one walk over blocks of columns: the forward without gradients.

    Arguments as in `linear_cross_entropy_by_rows`; `blocks`: of columns, in order, with memory for each one's logits.
    """
    (rows,), (vocab, features) = target_rows.shape, weight.shape
    state = Softmax.empty(rows, weight.device)
    if rows == 0:
        return state.losses, state.lse
    h = torch.empty(rows, features, dtype=weight.dtype, device=weight.device)
    gather_rows(hidden, target_rows, targets, h)
    for block, logits in blocks:
        torch.mm(h, weight[block].T, out=logits)
        losses_of_block(logits, targets, state, block.start, vocab, options)
    return state.losses, state.lse


def linear_cross_entropy_gradients(
    hidden: Tensor,
    weight: Tensor,
    target_rows: Tensor,
    targets: Tensor,
    scale: Tensor,
    lse: Tensor,
    dhidden: Tensor | None,
    dweight: Tensor | None,
    *,
    add: bool = False,
    options: HeadOptions = PLAIN,
    blocks: list[tuple[slice, Tensor]],
    kept: bool = False,
) -> None:
    """Gradients in one walk over blocks of columns, given the log-sum-exps (R,) of the walk before.

    Arguments as in `linear_cross_entropy_by_rows`, but `scale` may be (R,) float32, one a row. dW is written once, so
    it needs no scratch. `kept`: the logits of all `blocks` are there still; they are overwritten.
    """
    (rows,), (vocab, features) = target_rows.shape, weight.shape
    if dhidden is not None:
        dhidden.zero_()
    if rows == 0:
        return _nothing_for(dweight, add)
    h = torch.empty(rows, features, dtype=weight.dtype, device=weight.device)
    gather_rows(hidden, target_rows, targets, h)
    dh = None if dhidden is None else torch.empty_like(h, dtype=torch.float32)
    for block, logits in blocks:
        if not kept:
            torch.mm(h, weight[block].T, out=logits)
        dlogits_of_block_(logits, targets, scale, lse, block.start, vocab, options)
        if dh is not None:
            matmul_into(dh, block.start > 0, logits, weight[block])
        if dweight is not None:
            matmul_into(dweight[block], add, logits.T, h)
    if dh is not None and dhidden is not None:
        scatter_rows(dh, target_rows, targets, dhidden)


def _nothing_for(dweight: Tensor | None, add: bool) -> None:
    if dweight is not None and not add:
        dweight.zero_()


class _Wanted(NamedTuple):
    """The buffers of one call's gradients."""

    dhidden: Tensor | None
    dweight: Tensor | None
    add: bool

    @classmethod
    def open(cls, hidden: Tensor, weight: Tensor, needs: tuple[bool, ...], sink: GradSink | None) -> _Wanted:
        dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if needs[0] else None
        if not needs[1]:
            return cls(dhidden, None, False)
        if sink is None:
            return cls(dhidden, torch.empty(weight.shape, dtype=weight.dtype, device=weight.device), False)
        return cls(dhidden, *sink.open(weight))

    def close(self, weight: Tensor, sink: GradSink | None) -> Tensor | None:
        """What autograd gets for the weight."""
        return self.dweight if sink is None or self.dweight is None else sink.close(weight, self.dweight)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target_rows: Tensor,
        targets: Tensor,
        grad_scale: Tensor,
        plan: Plan,
        options: HeadOptions,
        sink: GradSink | None,
        scratch: Tensor | None,
    ) -> Tensor:
        inputs = (hidden, weight, target_rows, targets)
        wanted = _Wanted.open(hidden, weight, ctx.needs_input_grad, sink)
        gradients = (wanted.dhidden, wanted.dweight)
        rows, vocab = len(targets), len(weight)
        lent = _lent_columns(rows, weight, scratch) if plan.chunk_rows >= rows else 0
        if plan.chunk_rows and (scratch is None or lent in (0, vocab)):
            losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
            linear_cross_entropy_by_rows(
                *inputs,
                grad_scale,
                losses,
                *gradients,
                add=wanted.add,
                options=options,
                chunk_rows=plan.chunk_rows,
                scratch=scratch,
            )
        else:
            kept = bool(plan.chunk_rows)
            if kept and scratch is not None:
                blocks = _kept_logits(rows, weight, scratch, lent)
            else:
                blocks = _passing_logits(rows, weight, plan.block_columns)
            losses, lse = linear_cross_entropy_losses(*inputs, options=options, blocks=blocks)
            linear_cross_entropy_gradients(
                *inputs, grad_scale, lse, *gradients, add=wanted.add, options=options, blocks=blocks, kept=kept
            )
        ctx.gradients = (*gradients, wanted.close(weight, sink))
        return losses.sum() * grad_scale[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy hands its gradients out once; call it again for another backward")
        dhidden, dweight, returned = ctx.gradients
        ctx.gradients = None
        if dweight is not None and returned is None:
            # what went into the sink's buffer cannot be told from what was there: a factor must not pass unseen
            grad = torch.where(grad == 1, grad, float("nan"))
        for gradient in (dhidden, dweight):
            if gradient is not None:
                scale_(gradient, grad)
        return dhidden, returned, *(None,) * 7


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target_rows: Tensor,
        targets: Tensor,
        grad_scale: Tensor,
        block_columns: int,
        options: HeadOptions,
        sink: GradSink | None,
    ) -> Tensor:
        losses, lse = linear_cross_entropy_losses(
            hidden,
            weight,
            target_rows,
            targets,
            options=options,
            blocks=_passing_logits(len(targets), weight, block_columns),
        )
        ctx.save_for_backward(hidden, weight, target_rows, targets, grad_scale, lse)
        ctx.rest = block_columns, options, sink
        return losses * grad_scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target_rows, targets, grad_scale, lse = ctx.saved_tensors
        block_columns, options, sink = ctx.rest
        wanted = _Wanted.open(hidden, weight, ctx.needs_input_grad, sink)
        linear_cross_entropy_gradients(
            hidden,
            weight,
            target_rows,
            targets,
            grad * grad_scale,
            lse,
            wanted.dhidden,
            wanted.dweight,
            add=wanted.add,
            options=options,
            blocks=_passing_logits(len(targets), weight, block_columns),
        )
        return wanted.dhidden, wanted.close(weight, sink), *(None,) * 6


def _fused(call: Call) -> Tensor:
    """Beyond what the op promises: a row has at most one target; a target outside [0, V) other than -100 gives a loss
    of NaN instead of an error, as nothing is read back. In float16, dlogits are rounded with `grad_scale` inside: let
    it carry the loss scale. `backward()` may run once.
    """
    hidden, weight = call.hidden, call.weight
    if hidden.dtype not in DTYPES:
        raise ValueError(f"the fused linear cross-entropy takes float32, bfloat16 and float16, not {hidden.dtype}")
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    target_rows, targets, grad_scale = call.target_rows.contiguous(), call.targets.contiguous(), call.grad_scale.float()
    summed = call.reduction == "sum" and call.wants_gradients
    rounds = summed and weight.requires_grad and weight.dtype != torch.float32
    scratch = call.sink.scratch(weight) if rounds and call.sink is not None else None
    plan = plan_for(
        call.mode, call.chunk_rows, len(target_rows), hidden, weight, rounds and _fp32(scratch, weight) is None
    )
    inputs = (hidden, weight, target_rows, targets, grad_scale)
    if summed:
        loss: Tensor = _Sum.apply(*inputs, plan, call.options, call.sink, scratch)
        return loss
    losses: Tensor = _Rows.apply(*inputs, plan.block_columns, call.options, call.sink)
    return losses.sum() if call.reduction == "sum" else losses


linear_cross_entropy = public(_fused)
