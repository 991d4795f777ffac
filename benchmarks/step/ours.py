"""Our arm: the product's own decoder, gradients, guard and optimizer, driven as the trainer drives them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.step.adapters import WEIGHTS_FILE, adapter_folder, gate_file, load_gate, peft_config, variant
from benchmarks.step.arm import Arm, Spec
from benchmarks.step.profile import matmul_sides
from benchmarks.step.reference import Reference, arms_dtype, relative_errors
from benchmarks.step.works import (
    BATCHES,
    BETAS,
    EPS,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    Work,
    batches,
)
from chronicals.adapters.joined import JoinedLoRA
from chronicals.adapters.lora import adapter_views
from chronicals.adapters.peft_files import load_adapter
from chronicals.adapters.unfused import LoRAProjection
from chronicals.data.batch import BatchPlan, PackedBatch, collate
from chronicals.data.documents import Documents
from chronicals.kernels.attention import TorchVarlen
from chronicals.kernels.ops import Ops
from chronicals.models.decoder import Decoder
from chronicals.models.hf import hf_views, load_config, load_model, trained_views
from chronicals.models.quantization import NF4
from chronicals.optim.adamw import AdamW
from chronicals.optim.formats import format_of
from chronicals.optim.groups import decay_names
from chronicals.train.gradients import Gradients
from chronicals.train.graph import own_stream, step_class
from chronicals.train.guard import Guard
from chronicals.train.loss_scale import loss_scale_for
from chronicals.train.precision import resolve_ops
from chronicals.train.step import to_device

TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 1e-4}  # of a gradient's norm, against transformers in float32
STAY = 9  # layers of a work for least memory, whose share the device has room for: so a slow link is quick enough too
ROUNDED = 1.5  # times transformers' own distance in the same dtype


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

    quantization: NF4 | None = None

    def __init__(self, spec: Spec, work: Work, folder: Path) -> None:
        self.spec, self.work, self.folder = spec, work, folder
        device = torch.device(work.device)
        self._stream = ExitStack()  # for as long as this process lives
        self._stream.enter_context(own_stream(device))
        options = spec.options or {}
        self.dtype = arms_dtype(work)
        ops, kernels = resolve_ops(device, self.dtype, head_dim=load_config(folder).head_dim, deterministic=False)
        if options.get("attention") == "torch":
            ops = replace(ops, attention=TorchVarlen())
        self.model = self.load(ops, device)
        self.recompute = self._set_memory(options, len(self.model.layers))
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        wide = spec.precision == "fp32" or self.dtype == torch.float32
        form = format_of("adamw" if wide else "adamw_bf16_sr", self.dtype)
        trained = self._views()
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
            bins=1,
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

    def _set_memory(self, options: Mapping[str, str], layers: int) -> str:
        """Says what is computed again and what waits on the host, and tells it."""
        if self.work.least_memory and "recompute" not in options:
            offloaded = max(1, layers - STAY)
            self.model.set_recompute("mlp")
            self.model.set_offload(offloaded)
            return f"mlp, {offloaded} of {layers} layers offloaded"
        recompute, first = options.get("recompute", "light"), options.get("layers")
        self.model.set_recompute(recompute, int(first) if first else None)
        return recompute

    def load(self, ops: Ops, device: torch.device) -> Decoder:
        return load_model(self.folder, dtype=self.dtype, device=device, ops=ops, quantization=self.quantization)

    def _guard(self, optimizer: AdamW) -> Guard:
        names = {name: list(trained_views(self.model, {name: p.detach()})) for name, p in self.parameters.items()}

        def watched() -> dict[str, Tensor]:
            return self._views() | optimizer.state()["master"]

        return Guard(names, watched, min_lr=self.work.learning_rate / 10)

    def _live(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.parameters.items()}

    def _views(self) -> dict[str, Tensor]:
        """By the names of `Gradients.views`, which optimizer and guard go by."""
        return trained_views(self.model, self._live())

    def step(self, index: int) -> None:
        self.steps += 1
        self.output = self.run(self.steps, [self.batches[index % BATCHES]], self.work.learning_rate)

    def loss(self) -> float:
        return float(self.output.loss)

    def grad_norm(self) -> float:
        return float(self.output.grad_norm)

    def weights(self) -> dict[str, Tensor]:
        return self._views()

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
        return judged(loss, grads, expected, exact, TOLERANCE[self.dtype])

    def matmul_sides(self) -> list[tuple[str, int]]:
        """Of one micro-batch, for the profile."""
        batch = to_device(self.batches[0], self.model.head_weight.device)
        return matmul_sides(lambda: self.run.micro(batch))

    def facts(self) -> dict[str, str]:
        offload = self.model.offload
        return self.chosen | ({} if offload is None else {"host memory": f"{offload.host_bytes / 2**30:.1f} GiB"})


def judged(
    loss: float,
    grads: Mapping[str, Tensor],
    expected: float,
    exact: Mapping[str, Tensor],
    limit: float,
    theirs: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """What was seen; AssertionError where a gradient is further than `limit` of its norm from `exact`, or the loss a
    tenth of that from `expected`.

    `theirs`: how far transformers in the same dtype is, by name. A gradient may be `ROUNDED` times as far, where that
    is more than `limit`: some are small differences of large sums (queries' and keys' over thousands of random
    tokens), which no kernels have exact in bf16.
    """
    errors, theirs = relative_errors(grads, exact), theirs or {}
    limits = {name: max(limit, ROUNDED * theirs.get(name, 0.0)) for name in errors}
    worst = max(errors, key=lambda name: errors[name] / limits[name] if math.isfinite(errors[name]) else math.inf)
    assert errors[worst] <= limits[worst], (
        f"the gradient of {worst} is {errors[worst]:.1e} from float32, at most {limits[worst]:.1e}"
    )
    assert abs(loss / expected - 1) <= limit / 10, f"the loss is {loss:.5f}, transformers' {expected:.5f}"
    seen = {"worst_gradient": max(errors.values()), "loss_after_warmup": loss / expected - 1}
    return seen | ({"worst_gradient_of_transformers": max(theirs.values())} if theirs else {})


class OursWithAdapter(Ours):
    """The same with an adapter, read from PEFT's files as a user's is."""

    def load(self, ops: Ops, device: torch.device) -> Decoder:
        self.variant = variant(self.spec)
        self.quantization = NF4() if self.variant == "nf4" else None
        model, place = super().load(ops, device), adapter_folder(self.work, self.folder, self.variant)
        lora = load_adapter(model, place)
        assert lora.dropout == peft_config(self.work, self.variant).lora_dropout
        adapted = [module for module in model.modules() if isinstance(module, LoRAProjection)]
        assert all(isinstance(module, JoinedLoRA) == lora.joins for module in adapted), (
            "the clock is for joined adapters"
        )
        return model.train()  # `load_adapter` leaves it without dropout

    def weights(self) -> dict[str, Tensor]:
        return adapter_views(self.model, self._live())  # a bias of a target has another name there than in `_views`

    def started_from(self) -> Path:
        return adapter_folder(self.work, self.folder, self.variant) / WEIGHTS_FILE

    def check_gradients(self) -> dict[str, float]:
        """Of a full batch in the gate's state, by the unit that the clock will see; then the live state again."""
        if "dropout" in self.variant:
            return {}  # the reference has no masks
        place = adapter_folder(self.work, self.folder, self.variant)
        expected, values, exact, theirs = load_gate(gate_file(self.work, place))
        live = self.weights()
        assert live.keys() == values.keys(), f"trained there or here alone: {sorted(live.keys() ^ values.keys())[:3]}"
        before = {name: tensor.clone() for name, tensor in live.items()}
        for name, tensor in live.items():
            tensor.copy_(values[name])
        self.run.loss.zero_()
        self.run.run_micro(self.batches[0])
        grads = adapter_views(self.model, self.gradients.buffers)
        found = judged(float(self.run.loss), grads, expected, exact, TOLERANCE[self.dtype], theirs)
        for name, tensor in live.items():
            tensor.copy_(before[name])
        return found
