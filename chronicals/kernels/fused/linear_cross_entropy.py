"""Linear cross-entropy on the GPU: cuBLAS for the matmuls, one row kernel between them, gradients made in the forward.

The loss is that of chronicals/kernels/linear_cross_entropy.py; docs/math/linear-cross-entropy.md derives it and both
gradients, dH = dlogits W and dW = dlogits^T H. With R supervised rows, V columns and H features there are two ways:

`fast` walks chunks of rows, each against the whole vocabulary: logits = h W^T, the row kernel turns them into dlogits
in place and into losses, dH = dlogits W, dW += dlogits^T h. Three matmuls of 2 R V H, one write and three reads of the
R V logits beside (four and five with what the matmuls themselves write and read), a chunk of logits in memory. dW adds
up in float32: in the caller's buffer where that is float32, else in a scratch where there is more than one chunk. Where
one chunk is all and a part of its logits lies in memory that the sink lends (logits.py), both walks of `frugal` run,
over two blocks whose logits are kept.

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

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chronicals.kernels.fused.cross_entropy_rows import (
    Softmax,
    cross_entropy_rows_,
    dlogits_of_block_,
    losses_of_block,
)
from chronicals.kernels.fused.logits import (
    Plan,
    as_float32,
    column_blocks,
    kept_logits,
    logits_buffer,
    passing_logits,
    plan_for,
)
from chronicals.kernels.fused.supervised_rows import gather_rows, scale_, scatter_rows
from chronicals.kernels.grad_sink import GradSink, matmul_into
from chronicals.kernels.linear_cross_entropy import Call, HeadOptions, public

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = HeadOptions()


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
    plan: Plan,
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
        plan: of `fast`, all columns lent or none.
        scratch: (n,) uint8, any contents: where several chunks add up a dW that is not float32 (None, or too small:
            allocated), or where the logits of a single chunk lie.
    """
    (rows,), (vocab, features) = target_rows.shape, weight.shape
    chunk_rows = plan.chunk_rows
    if dhidden is not None:
        dhidden.zero_()
    if rows == 0:
        return _nothing_for(dweight, add)
    buffer = logits_buffer(chunk_rows, vocab, weight, scratch if plan.lent_columns else None)
    h_buffer = torch.empty(chunk_rows, features, dtype=weight.dtype, device=weight.device)
    blocks = column_blocks(vocab, vocab)
    exact = torch.float32 if len(blocks) > 1 else weight.dtype  # two products are added up before they are rounded
    dh_buffer = None if dhidden is None else torch.empty_like(h_buffer, dtype=exact)
    total, adding = dweight, add
    if dweight is not None and dweight.dtype != torch.float32 and chunk_rows < rows:
        total, adding = as_float32(scratch, weight), False
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
        rows = len(targets)
        if plan.chunk_rows and plan.lent_columns in (0, len(weight)):
            losses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
            linear_cross_entropy_by_rows(
                *inputs,
                grad_scale,
                losses,
                *gradients,
                add=wanted.add,
                options=options,
                plan=plan,
                scratch=scratch,
            )
        else:
            kept = plan.lent_columns > 0
            if kept:
                blocks = kept_logits(rows, weight, scratch, plan.lent_columns)
            else:
                blocks = passing_logits(rows, weight, plan.block_columns)
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
            blocks=passing_logits(len(targets), weight, block_columns),
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
            blocks=passing_logits(len(targets), weight, block_columns),
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
    plan = plan_for(call.mode, call.chunk_rows, len(target_rows), weight, rounds, scratch)
    inputs = (hidden, weight, target_rows, targets, grad_scale)
    if summed:
        loss: Tensor = _Sum.apply(*inputs, plan, call.options, call.sink, scratch)
        return loss
    losses: Tensor = _Rows.apply(*inputs, plan.block_columns, call.options, call.sink)
    return losses.sum() if call.reduction == "sum" else losses


linear_cross_entropy = public(_fused)
