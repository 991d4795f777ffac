"""One optimizer step, whole: forward, loss, backward over the window's micro-batches, norm, clip, update.

Nothing here reads a value back from the device. The loss, the norms and the guard's verdict stay tensors; whoever
logs them pays for the read. What is left out: mixed precision by autocast (weights are in the compute dtype, masters
in the optimizer) and loss scaling (bf16 has float32's range).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from chronicals.data.batch import PackedBatch
from chronicals.models.decoder import Decoder
from chronicals.models.hf import hf_views
from chronicals.train.gradients import Gradients
from chronicals.train.guard import Guard

LossFn = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor], Tensor
]  # hidden, head weight, target rows, targets, grad scale


class Optimizer(Protocol):
    """What a step needs of an optimizer; it writes nothing where `finite` is false."""

    def step(self, grads: Mapping[str, Tensor], lr: float, clip_scale: Tensor, finite: Tensor) -> None: ...


@dataclass(frozen=True)
class StepOutput:
    loss: Tensor  # () float32: mean loss over the window's supervised tokens
    grad_norm: Tensor  # () float32: global L2 norm before clipping


def train_step(
    step: int,
    model: Decoder,
    window: Sequence[PackedBatch],
    gradients: Gradients,
    optimizer: Optimizer,
    guard: Guard,
    *,
    lr: float,
    max_grad_norm: float,
    loss_fn: LossFn,
) -> StepOutput:
    """Train one window (the micro-batches of one optimizer step); `step` counts from 1. Raises GuardError, see
    guard.py."""
    loss = torch.zeros((), device=model.head_weight.device)
    for batch in window:
        hidden = model(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen, batch.token_order)
        part = loss_fn(hidden, model.head_weight, batch.target_rows, batch.targets, batch.grad_scale)
        guard.check_loss(step, part)
        part.backward()
        loss += part.detach()

    grads = gradients.collect()
    guard.check_gradients_exist(step, grads)
    norms = tensor_norms([view for _, view in hf_views(model, grads)])
    grad_norm = torch.linalg.vector_norm(norms)
    healthy = guard.watch_gradients(step, loss, norms)
    optimizer.step(grads, lr, clip_scale(grad_norm, max_grad_norm), healthy)
    guard.watch_weights(step, lr)
    gradients.clear()
    return StepOutput(loss, grad_norm)


def tensor_norms(tensors: Sequence[Tensor]) -> Tensor:
    """(P,) float32: the L2 norm of each of P tensors, summed in float32 in a fixed order whatever their dtype."""
    return torch.stack(torch._foreach_norm(list(tensors), 2, torch.float32))


def clip_scale(grad_norm: Tensor, max_grad_norm: float) -> Tensor:
    """() float32: what gradients are multiplied by so that their norm is at most `max_grad_norm`; 0 clips nothing."""
    if not max_grad_norm:
        return torch.ones_like(grad_norm)
    return (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)  # 1e-6 as in torch.nn.utils.clip_grad_norm_


def to_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """The batch where the model is; to a GPU through page-locked memory, so that the copy waits for nothing."""
    return batch if device.type == "cpu" else batch.pin_memory().to(device, non_blocking=True)
