"""One model with adapters, forward and backward apart: transformers and PEFT as they come, and ours.

Forward is from token ids to the mean loss, backward from there to every adapter's gradient. Our loss head computes the
gradient of the hidden states in its forward pass, so that much of backward is timed as forward. The loss is scaled by
`SCALE`, as float16 training does, in every arm.

Ours is launched kernel by kernel (`Ours`), as the peer is, and replayed from CUDA graphs (`Graphed`), as it trains;
both with `recompute: mlp`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.lora.models import RECOMPUTE, Model, fill
from benchmarks.step.adapters import PLAIN, peft_config, stored_name, trained
from benchmarks.step.ours import packed
from benchmarks.step.reference import Reference, empty_model
from benchmarks.step.works import Work, batches
from chronicals.adapters.lora import LoRA, adapter_tensors, add_lora, all_linear
from chronicals.models.config import ModelConfig
from chronicals.models.decoder import Decoder
from chronicals.models.hf import hf_views
from chronicals.train.gradients import Gradients
from chronicals.train.precision import resolve_ops
from chronicals.train.step import to_device

SCALE = 2.0**14


class Peft:
    """transformers and PEFT, unpatched, adapters in the model's dtype."""

    def __init__(self, model: Model, rank: int) -> None:
        self.model = peft_model(model, rank, model.dtype)
        self.model.train()

    def load(self, work: Work) -> None:
        """Take this setting's batch."""
        self.tokens = batches(work)[0].to(work.device)

    def forward(self) -> None:
        self.loss = self.model(input_ids=self.tokens, labels=self.tokens).loss * SCALE

    def backward(self) -> None:
        self.loss.backward()

    def reset(self) -> None:
        """Between two trials; what a pass that ran out of memory kept goes too."""
        self.loss = None
        self.model.zero_grad(set_to_none=True)

    def values(self) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of the last pass, by PEFT's names."""
        found = {n: p.grad.float() / SCALE for n, p in self.model.named_parameters() if p.grad is not None}
        return float(self.loss) / SCALE, {stored_name(name): grad for name, grad in found.items()}


def peft_model(model: Model, rank: int, dtype: torch.dtype) -> Any:
    from peft import get_peft_model

    work = model.gate(rank)
    base = empty_model(work, dtype)
    fill({name: p.data for name, p in base.named_parameters()})
    adapted = get_peft_model(base, peft_config(work, PLAIN), autocast_adapter_dtype=False)
    fill(trained(adapted))
    return adapted


class Exact(Reference):
    """PEFT in float32 on the weights that float16 holds."""

    def __init__(self, model: Model, rank: int) -> None:
        self.work, self.model = model.gate(rank), peft_model(model, rank, torch.float32)

    def values(self) -> tuple[float, dict[str, Tensor]]:
        loss, grads = self.run(batches(self.work)[0])
        return loss, {stored_name(name): grad.cpu() for name, grad in grads.items()}


class Ours:
    """The product's decoder, launched kernel by kernel; on a stream that is not the default one, so that `Graphed` may
    record it."""

    def __init__(self, model: Model, rank: int) -> None:
        work, device = model.gate(rank), torch.device(model.device)
        config = ModelConfig.from_hf(work.shape.config())
        ops, _ = resolve_ops(device, model.dtype, head_dim=config.head_dim, deterministic=False)
        self.model = Decoder(config, ops, device=device, dtype=model.dtype)
        fill(dict(hf_views(self.model, {name: p.data for name, p in self.model.named_parameters()})))
        assert work.lora is not None
        self.model.set_recompute(RECOMPUTE)
        add_lora(self.model, LoRA(rank, work.lora.alpha, all_linear(config)))
        fill(adapter_tensors(self.model))
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.gradients = Gradients(self.model, parameters, accumulate=False)

    def load(self, work: Work) -> None:
        """Take this setting's batch."""
        self.batch = to_device(packed(work, batches(work)[0]), self.model.head_weight.device)
        self.grad_scale = self.batch.grad_scale * SCALE

    def forward(self) -> None:
        model, batch = self.model, self.batch
        hidden = model(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen, batch.token_order)
        rows = batch.target_rows, batch.targets, self.grad_scale
        self.loss = model.ops.linear_cross_entropy(hidden, model.head_weight, *rows, sink=model.sink)

    def backward(self) -> None:
        self.loss.backward()
        self.gradients.finish(self.model.ops.reduce_partials)

    def reset(self) -> None:
        """Gradients are written, not added to; what a pass that ran out of memory kept goes."""
        self.loss = None

    def values(self) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of the last pass, by PEFT's names."""
        return float(self.loss) / SCALE, {name: grad.float() / SCALE for name, grad in self.gradients.views.items()}


class Graphed:
    """The same passes, each recorded once as a graph; both share a pool, as backward reads what forward kept."""

    def __init__(self, ours: Ours) -> None:
        self.ours, self.pool = ours, torch.cuda.graph_pool_handle()
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}
        for buffer in ours.gradients.buffers.values():
            buffer.zero_()  # the other's gradients would pass for those of graphs that write none

    def _run(self, name: str) -> None:
        if name in self.graphs:
            return self.graphs[name].replay()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
            getattr(self.ours, name)()
        self.graphs[name] = graph

    def forward(self) -> None:
        self._run("forward")

    def backward(self) -> None:
        self._run("backward")

    def reset(self) -> None:
        """Nothing: the loss is where the graphs write it."""

    def values(self) -> tuple[float, dict[str, Tensor]]:
        return self.ours.values()
