"""Cross-entropy of a linear head over the supervised rows, in chunks: neither (T, V) nor (R, V) logits ever exist.

For a supervised row with hidden state h and target t, with z = logit_scale * W h, soft-capped to `c * tanh(z / c)`
where asked, and lse = log sum_j exp z_j, e the label smoothing and g the z-loss weight:

    loss = lse - (1 - e) z_t - e mean_j(z_j) + g lse^2
    dloss/dz_j = (1 + 2 g lse) softmax(z)_j - (1 - e) [j = t] - e / V

The result is `grad_scale` times the losses, summed or each. As the scale of a sum is known beforehand, its dlogits are
final in the forward pass: a chunk's logits turn into dlogits in place, give their part of dH and dW, and are gone
before the next chunk. The backward pass only multiplies, by an incoming gradient that is hardly ever other than 1.
Where each row's loss is asked for, its gradient is not known yet, so the backward pass makes the chunk's logits again.
Label smoothing is Szegedy et al. 2016 as in `torch.nn.functional.cross_entropy`, the z-loss PaLM's (Chowdhery et al.
2022, section 5). Softmax is float32; dW adds up in float32 and is returned in the weight's dtype, or handed to a sink.

Left out: class weights, a bias. The math in full: docs/math/linear-cross-entropy.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from chronicals.kernels.grad_sink import GradSink

IGNORE_INDEX = -100
CHUNK_ROWS = 4096
FRUGAL_BYTES = 90_000_000  # of a chunk's logits in mode "frugal"
MODES = ("auto", "fast", "frugal")
REDUCTIONS = ("sum", "none")


class HeadOptions(NamedTuple):
    """What is done to the logits and added to the loss; one set for a model."""

    softcap: float | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0


class Call(NamedTuple):
    """One call of the op, its arguments checked."""

    hidden: Tensor
    weight: Tensor
    target_rows: Tensor
    targets: Tensor
    grad_scale: Tensor
    options: HeadOptions
    reduction: str
    mode: str
    chunk_rows: int | None
    sink: GradSink | None

    @property
    def wants_gradients(self) -> bool:
        return torch.is_grad_enabled() and (self.hidden.requires_grad or self.weight.requires_grad)


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    target_rows: Tensor,
    targets: Tensor,
    grad_scale: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "sum",
) -> Tensor:
    """`linear_cross_entropy` with all supervised rows' logits at once, in the inputs' own dtype: meant for float64."""
    supervised = targets != IGNORE_INDEX
    logits = logit_scale * hidden[target_rows[supervised].long()] @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets[supervised], reduction="none", label_smoothing=label_smoothing)
    losses = grad_scale * (losses + z_loss * logits.logsumexp(-1).square())
    return losses.sum() if reduction == "sum" else losses.new_zeros(len(targets)).masked_scatter(supervised, losses)


def _chunk_losses_(logits: Tensor, targets: Tensor, scale: Tensor | None, options: HeadOptions) -> Tensor:
    """The losses (C,) of one chunk, unscaled. `logits` (C, V) are overwritten: by dlogits times `scale` (C,) or (1,)
    where there is one."""
    supervised = targets != IGNORE_INDEX
    column = targets.clamp(min=0).unsqueeze(1)
    smoothing, softcap = options.label_smoothing, options.softcap
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    capped = logits.clone() if softcap is not None and scale is not None else None
    target_logit = logits.gather(1, column).squeeze(1)
    mean_logit = logits.mean(1) if smoothing else torch.zeros_like(target_logit)
    peak = logits.amax(1)
    total = logits.sub_(peak.unsqueeze(1)).exp_().sum(1)
    lse = peak + total.log()
    losses = lse - (1 - smoothing) * target_logit - smoothing * mean_logit + options.z_loss * lse.square()
    losses = torch.where(supervised, losses, 0.0)
    if scale is None:
        return losses
    logits.mul_(((1 + 2 * options.z_loss * lse) / total).unsqueeze(1))
    logits.scatter_add_(1, column, torch.full_like(target_logit, smoothing - 1).unsqueeze(1))
    if smoothing:
        logits.sub_(smoothing / logits.shape[1])
    if softcap is not None and capped is not None:
        logits.mul_(capped.div_(softcap).square_().neg_().add_(1))
    logits.mul_(torch.where(supervised, scale * options.logit_scale, 0.0).unsqueeze(1))
    return losses


def _walk(
    hidden: Tensor,
    weight: Tensor,
    target_rows: Tensor,
    targets: Tensor,
    scale: Tensor | None,
    needs: tuple[bool, ...],
    options: HeadOptions,
    chunk_rows: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Over the chunks: unscaled losses (R,), and the gradients that `needs` asks for, times `scale` (R,) or (1,)."""
    tokens, wide = len(hidden), torch.promote_types(hidden.dtype, torch.float32)
    # row T takes what the padding entries add (zeros) and is cut off at the end
    dhidden = hidden.new_zeros(tokens + 1, hidden.shape[1]) if scale is not None and needs[0] else None
    dweight = torch.zeros_like(weight, dtype=wide) if scale is not None and needs[1] else None
    losses = torch.zeros(len(targets), dtype=wide, device=hidden.device)
    for start in range(0, len(targets), chunk_rows):
        part = slice(start, start + chunk_rows)
        rows, chunk = target_rows[part], targets[part]
        supervised = (chunk != IGNORE_INDEX).unsqueeze(1)
        # zeroed, not just masked later: the row that a padding entry reads may hold anything, NaN included
        h = torch.where(supervised, hidden[rows.clamp(max=tokens - 1)], 0.0)
        logits = (h @ weight.T).to(wide)
        if options.logit_scale != 1.0:
            logits.mul_(options.logit_scale)
        of_chunk = scale[part] if scale is not None and len(scale) == len(targets) else scale
        losses[part] = _chunk_losses_(logits, chunk, of_chunk, options)
        if scale is not None:
            logits = logits.to(weight.dtype)
        if dhidden is not None:
            dhidden.index_add_(0, rows, logits @ weight)
        if dweight is not None and weight.dtype == wide:
            dweight.addmm_(logits.T, h)
        elif dweight is not None:
            dweight += logits.T @ h
    return losses, None if dhidden is None else dhidden[:tokens], dweight


def _hand_over(dweight: Tensor | None, weight: Tensor, sink: GradSink | None) -> tuple[Tensor | None, Tensor | None]:
    """The buffer that now holds dW, and what autograd gets for the weight."""
    if dweight is None:
        return None, None
    if sink is None:
        dweight = dweight.to(weight.dtype)
        return dweight, dweight
    buffer, add = sink.open(weight)
    buffer.add_(dweight) if add else buffer.copy_(dweight)
    return buffer, sink.close(weight, buffer)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target_rows: Tensor,
        targets: Tensor,
        grad_scale: Tensor,
        options: HeadOptions,
        chunk_rows: int,
        sink: GradSink | None,
    ) -> Tensor:
        losses, dhidden, dweight = _walk(
            hidden, weight, target_rows, targets, grad_scale, ctx.needs_input_grad, options, chunk_rows
        )
        ctx.gradients = dhidden, *_hand_over(dweight, weight, sink)
        return (losses * grad_scale).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, buffer, dweight = ctx.gradients
        if grad.device.type != "cpu" or grad != 1:  # on a GPU the question would be a synchronisation
            if buffer is not None and dweight is None:
                # what went into the sink's buffer cannot be told from what was there: a factor must not pass unseen
                buffer.mul_(torch.where(grad == 1, grad, math.nan))
            dhidden = None if dhidden is None else dhidden * grad.to(dhidden.dtype)
            dweight = None if dweight is None else dweight * grad.to(dweight.dtype)
        return dhidden, dweight, *(None,) * 6


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target_rows: Tensor,
        targets: Tensor,
        grad_scale: Tensor,
        options: HeadOptions,
        chunk_rows: int,
        sink: GradSink | None,
    ) -> Tensor:
        losses, _, _ = _walk(hidden, weight, target_rows, targets, None, (False, False), options, chunk_rows)
        ctx.save_for_backward(hidden, weight, target_rows, targets, grad_scale)
        ctx.rest = options, chunk_rows, sink
        return losses * grad_scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target_rows, targets, grad_scale = ctx.saved_tensors
        options, chunk_rows, sink = ctx.rest
        scale = grad * grad_scale
        _, dhidden, dweight = _walk(
            hidden, weight, target_rows, targets, scale, ctx.needs_input_grad, options, chunk_rows
        )
        return dhidden, _hand_over(dweight, weight, sink)[1], *(None,) * 6


def _plain(call: Call) -> Tensor:
    wide = torch.promote_types(call.hidden.dtype, torch.float32)
    rows = call.chunk_rows or CHUNK_ROWS
    if call.mode == "frugal":
        rows = max(1, min(rows, FRUGAL_BYTES // (len(call.weight) * wide.itemsize)))
    inputs = (*call[:4], call.grad_scale.to(wide), call.options, rows, call.sink)
    if call.reduction == "none":
        losses: Tensor = _Rows.apply(*inputs)
        return losses
    loss: Tensor = _Sum.apply(*inputs) if call.wants_gradients else _Rows.apply(*inputs).sum()
    return loss


def _check(call: Call) -> None:
    hidden, weight, target_rows, targets, grad_scale = call[:5]
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden (T, H) and weight (V, H) of one dtype are wanted, not {tuple(hidden.shape)} {hidden.dtype} "
            f"and {tuple(weight.shape)} {weight.dtype}"
        )
    if target_rows.ndim != 1 or target_rows.shape != targets.shape or targets.dtype != torch.int64:
        raise ValueError(
            f"target_rows (R,) and targets (R,) int64 are wanted, not {tuple(target_rows.shape)} and "
            f"{tuple(targets.shape)} {targets.dtype}"
        )
    if grad_scale.shape != (1,):
        raise ValueError(f"grad_scale (1,) is wanted, not {tuple(grad_scale.shape)}")
    for name, value, known in (("reduction", call.reduction, REDUCTIONS), ("mode", call.mode, MODES)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: one of {', '.join(known)}")
    if call.chunk_rows is not None and call.chunk_rows < 1:
        raise ValueError(f"chunk_rows is {call.chunk_rows}: at least 1 is wanted")
    if call.chunk_rows is not None and call.mode == "frugal":
        raise ValueError("chunk_rows is for the modes auto and fast: frugal finds its own block")


def public(implementation: Callable[[Call], Tensor]) -> Callable[..., Tensor]:
    """The op by one of its implementations: its arguments, what they mean and what is refused are the same for all."""

    def linear_cross_entropy(
        hidden: Tensor,
        weight: Tensor,
        target_rows: Tensor,
        targets: Tensor,
        grad_scale: Tensor,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        reduction: str = "sum",
        mode: str = "auto",
        chunk_rows: int | None = None,
        sink: GradSink | None = None,
    ) -> Tensor:
        """`grad_scale` times the supervised rows' cross-entropies, summed or each.

        Args:
            hidden: (T, H).
            weight: (V, H), the head; no gradient is computed for it when it does not require one.
            target_rows: (R,) integers: the row of `hidden` that predicts `targets[i]`; padding entries hold T.
            targets: (R,) int64; -100 in padding entries, which add neither loss nor gradient.
            grad_scale: (1,) float32, 1 / supervised tokens of the optimizer step; no gradient flows to it.
            softcap: logits become `softcap * tanh(logits / softcap)`.
            logit_scale: multiplies the logits before the soft cap.
            label_smoothing: in [0, 1].
            z_loss: weight of the squared log-sum-exp.
            reduction: "sum": (); "none": (R,), 0 in padding entries. With neither smoothing nor z-loss and a
                `grad_scale` of 1, the latter is minus each target's log-probability.
            mode: "fast" takes `chunk_rows` rows at a time, "frugal" as many as keep a chunk's logits within 90 MB,
                "auto" chooses by the free memory, which on the CPU is always "fast".
            chunk_rows: rows whose logits exist at a time; None: 4096, or 1024 of a frozen weight on a GPU. Not with
                "frugal".
            sink: takes the weight's gradient instead of autograd; a factor other than 1 on the way back to a sum of
                losses then makes the gradients NaN, as it comes too late.

        Returns:
            () or (R,) float32 (float64 for float64 inputs). Not twice differentiable.

        Raises:
            ValueError: shapes, dtypes or names that do not fit.
        """
        options = HeadOptions(softcap, logit_scale, label_smoothing, z_loss)
        call = Call(hidden, weight, target_rows, targets, grad_scale, options, reduction, mode, chunk_rows, sink)
        _check(call)
        return implementation(call)

    return linear_cross_entropy


linear_cross_entropy = public(_plain)
