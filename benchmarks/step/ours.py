"""Our arm: the product's own decoder, gradients, guard and optimizer, driven as the trainer drives them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.step.arm import Arm, Spec
from benchmarks.step.reference import Reference
from benchmarks.step.works import (
    BATCHES,
    BETAS,
    EPS,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    Work,
    batches,
)
from chronicals.data.batch import BatchPlan, PackedBatch, collate
from chronicals.data.documents import Documents
from chronicals.kernels.attention import TorchVarlen
from chronicals.models.hf import hf_views, load_config, load_model
from chronicals.optim.adamw import AdamW
from chronicals.optim.formats import format_of
from chronicals.optim.groups import decay_names
from chronicals.train.gradients import Gradients
from chronicals.train.graph import own_stream, step_class
from chronicals.train.guard import Guard
from chronicals.train.loss_scale import loss_scale_for
from chronicals.train.precision import resolve_ops

TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 1e-4}  # of a gradient's norm, against transformers in float32


def packed(work: Work, ids: Tensor) -> PackedBatch:
    """(documents, length) ids as the product's batch: one document a bin, every token but the first supervised."""
    mask = np.ones(work.length, dtype=np.bool_)
    mask[0] = False
    documents = Documents.from_lists([(row.numpy().astype(np.int32), mask) for row in ids])
    bins = [[i] for i in range(work.documents)]
    plan = BatchPlan.of(bins, documents.lengths, capacity=work.length, micro_batch_size=work.documents, pad_id=0)
    return collate(bins, documents, plan, 1.0 / (work.documents * (work.length - 1)))


class Ours(Arm):
    """One window of one micro-batch a step."""

    def __init__(self, spec: Spec, work: Work, folder: Path) -> None:
        self.work, self.folder = work, folder
        device = torch.device(work.device)
        self._stream = ExitStack()  # for as long as this process lives
        self._stream.enter_context(own_stream(device))
        options = spec.options or {}
        self.dtype = torch.bfloat16 if work.device == "cuda" else torch.float32
        ops, kernels = resolve_ops(device, self.dtype, head_dim=load_config(folder).head_dim, deterministic=False)
        if options.get("attention") == "torch":
            ops = replace(ops, attention=TorchVarlen())
        self.model = load_model(folder, dtype=self.dtype, device=device, ops=ops)
        self.recompute = options.get("recompute", "light")
        layers = options.get("layers")
        self.model.set_recompute(self.recompute, int(layers) if layers else None)
        self.parameters = dict(self.model.named_parameters())
        wide = spec.precision == "fp32" or self.dtype == torch.float32
        form = format_of("adamw" if wide else "adamw_bf16_sr", self.dtype)
        trained = self.weights()
        optimizer = AdamW(
            trained,
            betas=BETAS,
            eps=EPS,
            weight_decay=WEIGHT_DECAY,
            decay_names=decay_names(trained),
            state_dtype=form.state_dtype,
            master=form.master,
        )
        self.gradients = Gradients(self.model, self.parameters, accumulate=False)
        notes: list[str] = []
        kind = step_class("auto", device, ops, notes)
        self.run = kind(
            self.model,
            self.gradients,
            optimizer,
            self._guard(optimizer),
            loss_fn=partial(ops.linear_cross_entropy, sink=self.model.sink),
            max_grad_norm=MAX_GRAD_NORM,
            loss_scale=loss_scale_for(self.dtype, device),
        )
        self.chosen = {
            "kernels": kernels,
            "attention": type(ops.attention).__name__,
            "recompute": self.recompute,
            "step": kind.__name__,
            "precision": spec.precision,
        }
        self.batches = [packed(work, ids) for ids in batches(work)]
        self.steps = 0

    def _guard(self, optimizer: AdamW) -> Guard:
        names = {name: [theirs for theirs, _ in hf_views(self.model, {name: p})] for name, p in self.parameters.items()}

        def watched() -> dict[str, Tensor]:
            return self.weights() | optimizer.state()["master"]

        return Guard(names, watched, min_lr=LEARNING_RATE / 10)

    def _live(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.parameters.items()}

    def step(self, index: int) -> None:
        self.steps += 1
        self.output = self.run(self.steps, [self.batches[index % BATCHES]], LEARNING_RATE)

    def loss(self) -> float:
        return float(self.output.loss)

    def grad_norm(self) -> float:
        return float(self.output.grad_norm)

    def weights(self) -> dict[str, Tensor]:
        return dict(hf_views(self.model, self._live()))

    def check_gradients(self) -> dict[str, float]:
        """Of a full batch, by the very unit that the clock will see: where steps are recorded, by its replay."""
        self.run.loss.zero_()
        self.run.run_micro(self.batches[0])
        return self._compared(float(self.run.loss), self.gradients.buffers)

    def _compared(self, loss: float, grads: dict[str, Tensor]) -> dict[str, float]:
        """Loss and every gradient against transformers in float32 on the live weights, fused tensors as a whole."""
        expected, theirs = Reference(self.work, self.folder, self.weights()).run(batches(self.work)[0])
        exact = {name: torch.empty_like(p, dtype=torch.float32) for name, p in self.parameters.items()}
        for name, view in hf_views(self.model, exact):
            view.copy_(theirs[name])
        errors = {name: float((grads[name].float() - g).norm() / g.norm()) for name, g in exact.items()}
        worst = max(errors, key=lambda name: errors[name])
        limit = TOLERANCE[self.dtype]
        assert errors[worst] <= limit, f"the gradient of {worst} is {errors[worst]:.1e} from float32, at most {limit}"
        assert abs(loss / expected - 1) <= limit / 10, f"the loss is {loss:.5f}, transformers' {expected:.5f}"
        return {"worst_gradient": errors[worst], "loss_after_warmup": loss / expected - 1}

    def facts(self) -> dict[str, str]:
        return self.chosen
