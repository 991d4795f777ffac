"""Cross-entropy of a linear head over the supervised rows, in chunks: neither (T, V) nor (R, V) logits ever exist.

For a supervised row with hidden state h and target t, with z = logit_scale * W h, soft-capped to `c * tanh(z / c)`
where asked, and lse = log sum_j exp z_j, e the label smoothing and g the z-loss weight:

    loss = lse - (1 - e) z_t - e mean_j(z_j) + g lse^2
    dloss/dz_j = (1 + 2 g lse) softmax(z)_j - (1 - e) [j = t] - e / V

The result is `grad_scale * sum of losses`. As the scale is known beforehand, dlogits are final in the forward pass: a
chunk's logits turn into dlogits in place, give their part of dH and dW, and are gone before the next chunk. The
backward pass only multiplies by the incoming gradient. Label smoothing is Szegedy et al. 2016 as in
`torch.nn.functional.cross_entropy`, the z-loss PaLM's (Chowdhery et al. 2022, section 5). Softmax is float32; dW adds
up in float32 and is returned in the weight's dtype.

Left out: class weights, each row's own loss, a bias.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORE_INDEX = -100


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
) -> Tensor:
    """`linear_cross_entropy` with all supervised rows' logits at once, in the inputs' own dtype: meant for float64."""
    supervised = targets != IGNORE_INDEX
    logits = logit_scale * hidden[target_rows[supervised].long()] @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, targets[supervised], reduction="sum", label_smoothing=label_smoothing)
    return grad_scale[0] * (loss + z_loss * logits.logsumexp(-1).square().sum())


class _Options(NamedTuple):
    softcap: float | None
    logit_scale: float
    label_smoothing: float
    z_loss: float
    chunk_rows: int
    with_grad: bool


def _chunk_loss_(logits: Tensor, targets: Tensor, grad_scale: Tensor, options: _Options) -> Tensor:
    """The sum of losses of one chunk, unscaled; `logits` (C, V) become dlogits times `grad_scale` in place."""
    supervised = targets != IGNORE_INDEX
    column = targets.clamp(min=0).unsqueeze(1)
    smoothing, softcap = options.label_smoothing, options.softcap
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    capped = logits.clone() if softcap is not None and options.with_grad else None
    target_logit = logits.gather(1, column).squeeze(1)
    mean_logit = logits.mean(1) if smoothing else torch.zeros_like(target_logit)
    peak = logits.amax(1)
    total = logits.sub_(peak.unsqueeze(1)).exp_().sum(1)
    lse = peak + total.log()
    loss = lse - (1 - smoothing) * target_logit - smoothing * mean_logit + options.z_loss * lse.square()
    loss = torch.where(supervised, loss, 0.0).sum()
    if not options.with_grad:
        return loss
    logits.mul_(((1 + 2 * options.z_loss * lse) / total).unsqueeze(1))
    logits.scatter_add_(1, column, torch.full_like(target_logit, smoothing - 1).unsqueeze(1))
    if smoothing:
        logits.sub_(smoothing / logits.shape[1])
    if softcap is not None and capped is not None:
        logits.mul_(capped.div_(softcap).square_().neg_().add_(1))
    logits.mul_(torch.where(supervised, grad_scale * options.logit_scale, 0.0).unsqueeze(1))
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target_rows: Tensor,
        targets: Tensor,
        grad_scale: Tensor,
        options: _Options,
    ) -> Tensor:
        tokens, wide = len(hidden), torch.promote_types(hidden.dtype, torch.float32)
        hidden_grad = options.with_grad and ctx.needs_input_grad[0]
        weight_grad = options.with_grad and ctx.needs_input_grad[1]
        options = options._replace(with_grad=hidden_grad or weight_grad)
        # row T takes what the padding entries add (zeros) and is cut off at the end
        dhidden = hidden.new_zeros(tokens + 1, hidden.shape[1]) if hidden_grad else None
        dweight = torch.zeros_like(weight, dtype=wide) if weight_grad else None
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        grad_scale = grad_scale.to(wide)
        for rows, chunk in zip(target_rows.split(options.chunk_rows), targets.split(options.chunk_rows), strict=True):
            supervised = (chunk != IGNORE_INDEX).unsqueeze(1)
            # zeroed, not just masked later: the row that a padding entry reads may hold anything, NaN included
            h = torch.where(supervised, hidden[rows.clamp(max=tokens - 1)], 0.0)
            logits = (h @ weight.T).to(wide)
            if options.logit_scale != 1.0:
                logits.mul_(options.logit_scale)
            loss += _chunk_loss_(logits, chunk, grad_scale, options)
            if dhidden is not None or dweight is not None:
                logits = logits.to(weight.dtype)
            if dhidden is not None:
                dhidden.index_add_(0, rows, logits @ weight)
            if dweight is not None and weight.dtype == wide:
                dweight.addmm_(logits.T, h)
            elif dweight is not None:
                dweight += logits.T @ h
        ctx.save_for_backward(
            None if dhidden is None else dhidden[:tokens], None if dweight is None else dweight.to(weight.dtype)
        )
        return loss * grad_scale[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        return (
            None if dhidden is None else dhidden * grad.to(dhidden.dtype),
            None if dweight is None else dweight * grad.to(dweight.dtype),
            *(None,) * 4,
        )


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
    chunk_rows: int = 4096,
) -> Tensor:
    """`grad_scale` times the sum of the supervised rows' cross-entropies.

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
        chunk_rows: rows whose logits exist at a time; memory is `chunk_rows * V` float32.

    Returns:
        () float32 (float64 for float64 inputs). Not twice differentiable.
    """
    options = _Options(softcap, logit_scale, label_smoothing, z_loss, chunk_rows, torch.is_grad_enabled())
    return _LinearCrossEntropy.apply(hidden, weight, target_rows, targets, grad_scale, options)
