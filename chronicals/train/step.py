"""One optimizer step, whole: forward, loss, backward for each micro-batch, then norm, clip, update.

It has two units, `micro` and `update`, each a function of tensors that stay where they are, so that each can be a CUDA
graph (graph.py). Nothing here reads a value back from the device: the loss, the norms and the guard's verdict stay
tensors, and whoever logs them pays for the read. What is left out: mixed precision by autocast (weights are in the
compute dtype, masters in the optimizer).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from chronicals.adapters.lora import dropout_counter
from chronicals.data.batch import PackedBatch
from chronicals.models.decoder import Decoder
from chronicals.train.gradients import Gradients
from chronicals.train.guard import Guard
from chronicals.train.loss_scale import UNSCALED, LossScale

# hidden, head weight, target rows, targets, grad scale -> loss
LossFn = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Optimizer(Protocol):
    """What a step needs of an optimizer; it writes nothing where `finite` is false."""

    def step(
        self,
        grads: Mapping[str, Tensor],
        lr: float | Tensor,
        clip_scale: Tensor,
        finite: Tensor,
        *,
        zero_grads: bool = False,
    ) -> None: ...


@dataclass(frozen=True)
class StepOutput:
    """Live tensors, which the next step overwrites."""

    loss: Tensor  # () float32: mean loss over the window's supervised tokens
    grad_norm: Tensor  # () float32: global L2 norm before clipping; not finite where the step was skipped


class Step:
    """Trains one window (the micro-batches of one optimizer step) at a call.

    `bins`: of a whole window. They say which micro-batch it is (`Dropout.counter`): how they are divided into
    micro-batches may change on resume, and no mask of dropout may come again.
    """

    def __init__(
        self,
        model: Decoder,
        gradients: Gradients,
        optimizer: Optimizer,
        guard: Guard,
        *,
        loss_fn: LossFn,
        max_grad_norm: float,
        bins: int,
        loss_scale: LossScale = UNSCALED,
    ) -> None:
        self.model, self.gradients, self.optimizer, self.guard = model, gradients, optimizer, guard
        self.loss_fn, self.max_grad_norm, self.loss_scale = loss_fn, max_grad_norm, loss_scale
        self.device = model.head_weight.device
        self.lr, self.loss, self.grad_norm = (torch.zeros((), device=self.device) for _ in range(3))
        self.bins, self.micro_batch = bins, dropout_counter(model)
        self._checked = False

    def __call__(self, step: int, window: Sequence[PackedBatch], lr: float) -> StepOutput:
        """`step` counts from 1, `lr` is its learning rate. Raises GuardError, see guard.py."""
        self.lr.fill_(lr)
        self.loss.zero_()
        for number, batch in enumerate(window):
            self.micro_batch.fill_((step - 1) * self.bins + number)  # of several processes each would need its own
            self.run_micro(batch)
        if not self._checked:
            self.guard.check_gradients_exist(step, self.gradients.missing())
            self._checked = True
        self.run_update()
        self.guard.watch_weights(step, lr)
        return StepOutput(self.loss, self.grad_norm)

    def run_micro(self, batch: PackedBatch) -> None:
        self.micro(to_device(batch, self.device))

    def run_update(self) -> None:
        self.update()

    def micro(self, batch: PackedBatch) -> None:
        """Forward and backward: adds to the loss, writes or adds to the gradients."""
        model = self.model
        hidden = model(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen, batch.token_order)
        grad_scale = self.loss_scale.scaled(batch.grad_scale)
        loss = self.loss_fn(hidden, model.head_weight, batch.target_rows, batch.targets, grad_scale)
        self.guard.check_loss(loss)
        loss.backward()
        self.gradients.finish(model.ops.reduce_partials)
        self.loss += self.loss_scale.unscaled(loss.detach())

    @torch.no_grad()
    def update(self) -> None:
        """Norm, clip, AdamW; where gradients add up, zeros for the next step."""
        norms, total = (self.loss_scale.unscaled(norm) for norm in self.gradients.norms())
        self.grad_norm.copy_(total)
        healthy = self.guard.watch_gradients(self.loss, norms, may_mend=self.loss_scale.may_fall())
        scale = self.loss_scale.unscaled(clip_scale(self.grad_norm, self.max_grad_norm))
        self.optimizer.step(self.gradients.views, self.lr, scale, healthy, zero_grads=self.gradients.accumulate)
        self.loss_scale.update(self.grad_norm)


def clip_scale(grad_norm: Tensor, max_grad_norm: float) -> Tensor:
    """() float32: what gradients are multiplied by so that their norm is at most `max_grad_norm`; 0 clips nothing."""
    if not max_grad_norm:
        return torch.ones_like(grad_norm)
    return (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)  # 1e-6 as in torch.nn.utils.clip_grad_norm_


def to_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """The batch where the model is; to a GPU through page-locked memory, so that the copy waits for nothing."""
    return batch if device.type == "cpu" else batch.pin_memory().to(device, non_blocking=True)
