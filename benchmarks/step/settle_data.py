"""Packed batches, transformers' float32 answer for them, and the graphs that run them, for `settle_interfaces.py`.

What: `collate` lays documents and pad documents end to end; `StaticBatch` is the set of buffers that graphs read;
`reference` runs every document alone through transformers in float32; `Run` owns a model, a sink, buffers and graphs.
Left out: a data loader, best-fit packing, pinned double buffering.
"""

from dataclasses import dataclass, fields
from itertools import pairwise

import settle_kernels as kernels
import torch
from settle_ops import AutogradSink, Decoder, InPlaceSink, Shape
from torch import Tensor

IGNORED = -100


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class StaticBatch:
    tokens: Tensor  # (T,) int64
    positions: Tensor  # (T,) int32
    cu_seqlens: Tensor  # (capacity + 1,) int32; unused entries repeat T
    target_rows: Tensor  # (T,) int32; a graph for R rows reads the first R; padding entries are T, the dummy row
    targets: Tensor  # (T,) int64, -100 in padding entries
    grad_scale: Tensor  # (1,) float32
    token_order: Tensor  # (T,) int32, slots sorted by token (for the embedding's gradient)
    token_starts: Tensor  # (T + 1,) int32, where each distinct token's run begins, the rest T
    max_seqlen: int
    num_targets: int

    def to(self, device) -> "StaticBatch":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return StaticBatch(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in moved.items()})

    def pinned(self) -> "StaticBatch":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return StaticBatch(**{k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in moved.items()})

    def load(self, other: "StaticBatch") -> None:
        """Between replays: new contents, same addresses. max_seqlen is baked into the graph and may not grow."""
        for f in fields(self):
            if isinstance(getattr(self, f.name), Tensor):
                getattr(self, f.name).copy_(getattr(other, f.name), non_blocking=True)


@dataclass(frozen=True)
class Document:
    tokens: Tensor  # (n,) int64
    targets: Tensor  # (n,) int64, already shifted, -100 where not supervised


def make_document(length: int, vocab: int, generator, supervised_from: int = 0) -> Document:
    """Zipf-like tokens, because real batches repeat a few tokens often."""
    tokens = (vocab ** torch.rand(length, generator=generator) - 1).long().clamp_(0, vocab - 1)
    targets = torch.full_like(tokens, IGNORED)
    targets[supervised_from : length - 1] = tokens[supervised_from + 1 :]
    return Document(tokens, targets)


def collate(bins: list[list[Document]], bin_size: int, capacity: int, max_seqlen: int, scale: float | None = None):
    """Bins end to end, each closed by one pad document where it is not full. -> StaticBatch on the CPU."""
    total = len(bins) * bin_size
    tokens, positions = torch.zeros(total, dtype=torch.long), torch.zeros(total, dtype=torch.int32)
    targets = torch.full((total,), IGNORED)
    bounds = [0]
    for index, documents in enumerate(bins):
        at = index * bin_size
        for document in documents:
            end = at + len(document.tokens)
            tokens[at:end], targets[at:end] = document.tokens, document.targets
            positions[at:end] = torch.arange(end - at)
            bounds.append(end)
            at = end
        assert at <= (index + 1) * bin_size
        if at < (index + 1) * bin_size:
            positions[at : (index + 1) * bin_size] = torch.arange((index + 1) * bin_size - at)
            bounds.append((index + 1) * bin_size)
    assert len(bounds) - 1 <= capacity and max(b - a for a, b in pairwise(bounds)) <= max_seqlen
    rows = (targets != IGNORED).nonzero().squeeze(1)
    target_rows = torch.full((total,), total, dtype=torch.int32)
    target_rows[: len(rows)] = rows
    row_targets = torch.full((total,), IGNORED)
    row_targets[: len(rows)] = targets[rows]
    order = torch.argsort(tokens, stable=True)
    new_run = torch.ones(total, dtype=torch.bool)
    new_run[1:] = tokens[order][1:] != tokens[order][:-1]
    starts = torch.full((total + 1,), total, dtype=torch.int32)
    runs = new_run.nonzero().squeeze(1)
    starts[: len(runs)] = runs
    return StaticBatch(
        tokens, positions, torch.tensor(bounds + [total] * (capacity + 1 - len(bounds)), dtype=torch.int32),
        target_rows, row_targets, torch.tensor([scale if scale is not None else 1.0 / max(len(rows), 1)]),
        order.int(), starts, max_seqlen, len(rows),
    )  # fmt: skip


def transformers_model(shape: Shape, device):
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, max_position_embeddings=32768, rope_theta=shape.theta, tie_word_embeddings=True,
        rms_norm_eps=shape.eps,
    )  # fmt: skip
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def fused_tensors(model, read) -> dict[str, Tensor]:
    """Our fused layout of a transformers model, under our parameters' names; `read` picks weight or gradient."""
    out: list = [("embedding", read(model.model.embed_tokens.weight))]
    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        out += [
            (f"layers.{i}.attention_norm", read(layer.input_layernorm.weight)),
            (f"layers.{i}.qkv", torch.cat([read(p.weight) for p in qkv])),
            (f"layers.{i}.qkv_bias", torch.cat([read(p.bias) for p in qkv])),
            (f"layers.{i}.o", read(attention.o_proj.weight)),
            (f"layers.{i}.mlp_norm", read(layer.post_attention_layernorm.weight)),
            (f"layers.{i}.gate_up", torch.cat([read(mlp.gate_proj.weight), read(mlp.up_proj.weight)])),
            (f"layers.{i}.down", read(mlp.down_proj.weight)),
        ]
    return dict(out, norm=read(model.model.norm.weight))


def reference(model, documents: list[Document], device) -> tuple[float, dict[str, Tensor]]:
    """Each document alone through transformers: mean loss over supervised tokens and its gradients in our layout."""
    model.zero_grad(set_to_none=True)
    count = sum(int((d.targets != IGNORED).sum()) for d in documents)
    loss = 0.0
    for document in documents:
        if not bool((document.targets != IGNORED).any()):
            continue
        logits = model(input_ids=document.tokens[None].to(device)).logits[0].float()
        part = torch.nn.functional.cross_entropy(logits, document.targets.to(device), reduction="sum") / count
        part.backward()
        loss += part.item()
    return loss, {name: grad.clone() for name, grad in fused_tensors(model, lambda p: p.grad).items()}


class Run:
    """One arm: a model, its gradient sink and flat buffers, the static batch, and the graphs captured from them.

    sink: "in_place" | "autograd_stolen" (.grad None before capture, autograd keeps the tensor backward returns) |
    "autograd_static" (.grad are views of our flat buffer, autograd adds to them).
    """

    def __init__(self, shape, attention, batch, sink, grad_dtype, accumulate, device, dtype, chunk=8192, weights=None):
        self.model = Decoder(shape, attention, max(batch.max_seqlen, 64), device, dtype, chunk)
        if weights is not None:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(weights[name])
        self.batch, self.sink_name, self.accumulate = batch.to(device), sink, accumulate
        self.total = len(batch.tokens)
        self.loss = torch.zeros((), device=device)
        self.flat_grad = None
        if sink != "autograd_stolen":
            self.flat_grad = torch.zeros(self.model.flat.numel(), device=device, dtype=grad_dtype)
            views = self.model.grad_views(self.flat_grad)
        if sink == "in_place":
            self.model.sink = InPlaceSink(views, accumulate)
        else:
            self.model.sink = AutogradSink()
            for parameter in self.model.parameters() if sink == "autograd_static" else ():
                if grad_dtype != dtype:
                    parameter.grad_dtype = grad_dtype
                parameter.grad = views[parameter]
        self.m = self.v = None

    def grads(self) -> dict[str, Tensor]:
        views = (
            self.model.sink.buffers if self.sink_name == "in_place" else {p: p.grad for p in self.model.parameters()}
        )
        return {name: views[p] for name, p in self.model.named_parameters()}

    def micro(self, rows: int | None = None) -> None:
        """Forward and backward of the static batch; gradients and the loss end in static buffers."""
        adds_to_static_grad = self.sink_name == "autograd_static" and not self.accumulate
        if adds_to_static_grad:
            self.flat_grad.zero_()
        loss = self.model(self.batch, self.total if rows is None else rows)
        self.loss.add_(loss.detach()) if self.accumulate else self.loss.copy_(loss.detach())
        loss.backward()

    def make_optimizer(self) -> None:
        self.m, self.v = torch.zeros_like(self.model.flat), torch.zeros_like(self.model.flat)
        device = self.model.flat.device
        self.lr, self.step = torch.tensor(1e-5, device=device), torch.zeros((), device=device)
        self.norm = torch.zeros((), device=device)

    def update(self) -> None:
        """Norm, clip, AdamW, and zeroing where micro adds. Stolen gradients have no flat buffer: a kernel each."""
        self.step.add_(1)
        if self.flat_grad is not None:
            self.norm.copy_(torch.linalg.vector_norm(self.flat_grad, dtype=torch.float32))
            kernels.adamw_(
                self.model.flat, self.flat_grad, self.m, self.v, self.norm, self.lr, self.step, self.accumulate
            )
            return
        parameters = list(self.model.parameters())
        self.norm.copy_(
            torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.grad for p in parameters])).float())
        )
        m, v = self.model.grad_views(self.m), self.model.grad_views(self.v)
        for p in parameters:
            kernels.adamw_(p.data, p.grad, m[p], v[p], self.norm, self.lr, self.step, False)

    def forget_grads(self) -> None:
        if self.sink_name == "autograd_stolen":
            for parameter in self.model.parameters():
                parameter.grad = None
        else:
            self.flat_grad.zero_()
        self.loss.zero_()
