"""The interfaces under trial: varlen attention, gradient sinks, layer halves and a decoder made of them.

What: `varlen_attention` on FlashAttention-4, on torch's own FlashAttention-2 and on dense float32; the two gradient
sinks; one autograd function for the attention half of a layer, one for the MLP half, one for final norm and loss.
Why: `settle_interfaces.py` runs them under CUDA graphs and compares them with transformers, so that the product's
`kernels/` and `models/` can be written against signatures that are known to work.
Left out: other families, LoRA, FP8, recompute choices, several GPUs.

Shapes: T tokens, R supervised rows, H hidden, F intermediate, V vocabulary, D documents (capacity), N heads,
K kv heads.
"""

from dataclasses import dataclass
from itertools import pairwise

import settle_kernels as kernels
import torch
from torch import Tensor, nn

POISON = False  # fill what attention writes with NaN first, so that a row nobody writes is seen


def new_buffer(shape, like: Tensor) -> Tensor:
    buffer = torch.empty(shape, device=like.device, dtype=like.dtype)
    return buffer.fill_(float("nan")) if POISON else buffer


# --- attention -------------------------------------------------------------------------------------------------------
# forward(q (T, N, d), k, v (T, K, d), cu_seqlens (D + 1,), max_seqlen, window, softcap, scale, out)
#     -> out (T, N, d), lse (N, T)
# backward(d_out, q, k, v, out, lse, ..., dq, dk, dv): writes the three it is given, which may be views of one buffer.
# window: how many keys a query sees, itself included (Hugging Face's `sliding_window`); None: all before it.


class FlashAttention4:
    name = "fa4"

    def __init__(self, deterministic: bool = False):
        from flash_attn.cute import interface

        self.interface, self.deterministic = interface, deterministic

    def _options(self, cu_seqlens, max_seqlen, window, softcap, scale) -> dict:
        return {
            "cu_seqlens_q": cu_seqlens,
            "cu_seqlens_k": cu_seqlens,
            "max_seqlen_q": max_seqlen,
            "max_seqlen_k": max_seqlen,
            "causal": True,
            "window_size_left": None if window is None else window - 1,
            "window_size_right": None if window is None else 0,
            "softcap": softcap,
            "softmax_scale": scale,
        }

    def forward(self, q, k, v, cu_seqlens, max_seqlen, window=None, softcap=0.0, scale=None, out=None):
        options = self._options(cu_seqlens, max_seqlen, window, softcap, scale)
        return self.interface._flash_attn_fwd(q, k, v, return_lse=True, out=out, **options)[:2]

    def backward(
        self, d_out, q, k, v, out, lse, cu_seqlens, max_seqlen, dq, dk, dv, window=None, softcap=0.0, scale=None
    ):
        options = self._options(cu_seqlens, max_seqlen, window, softcap, scale)
        self.interface._flash_attn_bwd(
            q, k, v, out, d_out, lse, deterministic=self.deterministic, dq=dq, dk=dk, dv=dv, **options
        )


class TorchVarlen:
    """What torch.nn.attention.varlen.varlen_attn calls: no soft cap, and gradients that must be copied."""

    name = "torch"
    deterministic = False

    @staticmethod
    def _window(window):
        return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}

    def forward(self, q, k, v, cu_seqlens, max_seqlen, window=None, softcap=0.0, scale=None, out=None):
        if softcap:
            raise ValueError("torch varlen_attn has no soft cap: install flash-attn-4")
        res, lse, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            0.0,
            True,
            False,
            scale=scale,
            **self._window(window),
        )
        return (res if out is None else out.copy_(res)), lse

    def backward(
        self, d_out, q, k, v, out, lse, cu_seqlens, max_seqlen, dq, dk, dv, window=None, softcap=0.0, scale=None
    ):
        rng_state = torch.empty(2, dtype=torch.uint64, device=q.device)  # read by dropout alone, which is 0
        unused = torch.empty(0, device=q.device)
        grads = torch.ops.aten._flash_attention_backward(
            d_out, q, k, v, out, lse, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, True,
            rng_state, unused, scale=scale, **self._window(window),
        )  # fmt: skip
        for view, grad in zip((dq, dk, dv), grads, strict=True):
            view.copy_(grad)


class DenseReference:
    """Document by document in float32, through autograd. Reads cu_seqlens on the host: not for graphs."""

    name = "dense"
    deterministic = True

    def _run(self, q, k, v, cu_seqlens, window, softcap, scale):
        out = torch.zeros_like(q)
        lse = torch.zeros(q.shape[1], q.shape[0], device=q.device)
        bounds = cu_seqlens.tolist()
        groups = q.shape[1] // k.shape[1]
        for a, b in pairwise(bounds):
            if a == b:
                continue
            key, value = (t[a:b].repeat_interleave(groups, 1) for t in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q[a:b], key) * (scale or q.shape[2] ** -0.5)
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            at = torch.arange(b - a, device=q.device)
            hidden = (at[None, :] > at[:, None]) | (at[None, :] <= at[:, None] - (window or b - a))
            scores = scores.masked_fill(hidden, -float("inf"))
            lse[:, a:b] = scores.logsumexp(-1)
            out = out.index_put((at + a,), torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
        return out, lse

    def forward(self, q, k, v, cu_seqlens, max_seqlen, window=None, softcap=0.0, scale=None, out=None):
        res, lse = self._run(q.float(), k.float(), v.float(), cu_seqlens, window, softcap, scale)
        return (res.to(q.dtype) if out is None else out.copy_(res)), lse

    def backward(
        self, d_out, q, k, v, out, lse, cu_seqlens, max_seqlen, dq, dk, dv, window=None, softcap=0.0, scale=None
    ):
        leaves = [t.detach().float().requires_grad_() for t in (q, k, v)]
        with torch.enable_grad():
            res, _ = self._run(*leaves, cu_seqlens, window, softcap, scale)
            grads = torch.autograd.grad(res, leaves, d_out.float())
        for view, grad in zip((dq, dk, dv), grads, strict=True):
            view.copy_(grad)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp_min(1e-20)).item()


# --- gradient sinks --------------------------------------------------------------------------------------------------


def matmul_into(buffer: Tensor, add: bool, left: Tensor, right: Tensor) -> None:
    """buffer = left @ right, or += where `add`; a float32 buffer takes bf16 operands without a rounding in between."""
    if buffer.dtype == left.dtype:
        buffer.addmm_(left, right) if add else torch.mm(left, right, out=buffer)
    elif add:
        torch.addmm(buffer, left, right, out_dtype=buffer.dtype, out=buffer)
    else:
        torch.mm(left, right, out_dtype=buffer.dtype, out=buffer)


class InPlaceSink:
    """Weight gradients go to buffers of our own; autograd gets None, so no hook of a parameter fires.

    A parameter written twice in one micro-batch (tied embeddings) is added to the second time, whatever `accumulate`.
    """

    def __init__(self, buffers: dict[nn.Parameter, Tensor], accumulate: bool):
        self.buffers, self.accumulate, self.written = buffers, accumulate, set()

    def start(self) -> None:
        self.written.clear()

    def open(self, parameter: nn.Parameter) -> tuple[Tensor, bool]:
        """-> where to write the gradient, and whether to add to what is there."""
        add = self.accumulate or parameter in self.written
        self.written.add(parameter)
        return self.buffers[parameter], add

    def close(self, parameter: nn.Parameter, buffer: Tensor) -> Tensor | None:
        """-> what the autograd function returns for the parameter."""
        return None


class AutogradSink:
    """Weight gradients are returned to autograd in the dtype of `.grad`, so that DDP's and FSDP2's hooks fire."""

    def start(self) -> None:
        pass

    def open(self, parameter: nn.Parameter) -> tuple[Tensor, bool]:
        return torch.empty_like(parameter, dtype=getattr(parameter, "grad_dtype", None) or parameter.dtype), False

    def close(self, parameter: nn.Parameter, buffer: Tensor) -> Tensor | None:
        return buffer


def sink_matmul(sink, parameter, left, right):
    buffer, add = sink.open(parameter)
    matmul_into(buffer, add, left, right)
    return sink.close(parameter, buffer)


def sink_vector(sink, parameter, gradient):
    buffer, add = sink.open(parameter)
    buffer.add_(gradient) if add else buffer.copy_(gradient)
    return sink.close(parameter, buffer)


# --- model -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    hidden: int = 896
    layers: int = 24
    intermediate: int = 4864
    heads: int = 14
    kv_heads: int = 2
    head_dim: int = 64
    vocab: int = 151936
    eps: float = 1e-6
    theta: float = 1e6

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


def split_qkv(packed: Tensor, shape: Shape):
    """(T, (N + 2K) d) -> views q (T, N, d), k (T, K, d), v (T, K, d)."""
    q, k, v = packed.split([shape.heads * shape.head_dim, *[shape.kv_heads * shape.head_dim] * 2], 1)
    return (
        q.unflatten(1, (-1, shape.head_dim)),
        k.unflatten(1, (-1, shape.head_dim)),
        v.unflatten(1, (-1, shape.head_dim)),
    )


class AttentionHalf(torch.autograd.Function):
    """(residual, delta) -> (residual + delta, attention of its norm).

    Both outputs feed one sum, so that their gradients are one tensor; backward returns one tensor for both inputs in
    turn, and no addition is left to autograd.
    """

    @staticmethod
    def forward(ctx, residual, delta, norm, qkv_weight, qkv_bias, o_weight, model, batch):
        shape = model.shape
        x, h, rstd = kernels.rmsnorm(residual, delta, norm, shape.eps)
        qkv = torch.addmm(qkv_bias, h, qkv_weight.t())
        kernels.rope_(qkv, batch.positions, model.cos, model.sin, shape.heads + shape.kv_heads, shape.head_dim, 1.0)
        q, k, v = split_qkv(qkv, shape)
        out = new_buffer(q.shape, qkv) if POISON else None
        out, lse = model.attention.forward(q, k, v, batch.cu_seqlens, batch.max_seqlen, out=out)
        ctx.save_for_backward(x, rstd, qkv, out, lse, norm, qkv_weight, qkv_bias, o_weight)
        ctx.model, ctx.batch, ctx.first = model, batch, delta is None
        return x, out.flatten(1) @ o_weight.t()

    @staticmethod
    def backward(ctx, dx, d_delta):
        x, rstd, qkv, out, lse, norm, qkv_weight, qkv_bias, o_weight = ctx.saved_tensors
        model, batch, shape = ctx.model, ctx.batch, ctx.model.shape
        assert dx.data_ptr() == d_delta.data_ptr(), "the two outputs feed one sum"
        sink = model.sink
        d_o_weight = sink_matmul(sink, o_weight, dx.t(), out.flatten(1))
        d_out = (dx @ o_weight).unflatten(1, (-1, shape.head_dim))
        dqkv = new_buffer(qkv.shape, qkv)
        model.attention.backward(
            d_out, *split_qkv(qkv, shape), out, lse, batch.cu_seqlens, batch.max_seqlen, *split_qkv(dqkv, shape)
        )
        kernels.rope_(dqkv, batch.positions, model.cos, model.sin, shape.heads + shape.kv_heads, shape.head_dim, -1.0)
        _, h, _ = kernels.rmsnorm(x, None, norm, shape.eps)  # recomputed: cheaper than keeping it
        d_qkv_weight = sink_matmul(sink, qkv_weight, dqkv.t(), h)
        d_bias = sink_vector(sink, qkv_bias, dqkv.sum(0, dtype=torch.float32))
        dx, d_norm = kernels.rmsnorm_backward(dqkv @ qkv_weight, x, rstd, norm, dx)
        d_norm = sink_vector(sink, norm, d_norm)
        return dx, None if ctx.first else dx, d_norm, d_qkv_weight, d_bias, d_o_weight, None, None


class MlpHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, delta, norm, gate_up_weight, down_weight, model):
        x, h, rstd = kernels.rmsnorm(residual, delta, norm, model.shape.eps)
        gate_up = h @ gate_up_weight.t()
        ctx.save_for_backward(x, rstd, gate_up, norm, gate_up_weight, down_weight)
        ctx.model = model
        return x, kernels.swiglu(gate_up) @ down_weight.t()

    @staticmethod
    def backward(ctx, dx, d_delta):
        x, rstd, gate_up, norm, gate_up_weight, down_weight = ctx.saved_tensors
        assert dx.data_ptr() == d_delta.data_ptr(), "the two outputs feed one sum"
        sink = ctx.model.sink
        product = dx @ down_weight
        kernels.swiglu_backward_(gate_up, product)  # gate_up becomes its gradient, product the recomputed SwiGLU
        d_down = sink_matmul(sink, down_weight, dx.t(), product)
        del product
        _, h, _ = kernels.rmsnorm(x, None, norm, ctx.model.shape.eps)
        d_gate_up = sink_matmul(sink, gate_up_weight, gate_up.t(), h)
        dx, d_norm = kernels.rmsnorm_backward(gate_up @ gate_up_weight, x, rstd, norm, dx)
        return dx, dx, sink_vector(sink, norm, d_norm), d_gate_up, d_down, None


class NormLoss(torch.autograd.Function):
    """Final norm and linear cross-entropy over R rows. Gradients are made in forward; no logits leave it."""

    @staticmethod
    def forward(ctx, residual, delta, norm, weight, model, batch, rows):
        tokens, hidden = residual.shape
        h = torch.empty(tokens + 1, hidden, device=residual.device, dtype=residual.dtype)
        h[tokens].zero_()  # the dummy row that padding entries of target_rows point at
        x, _, rstd = kernels.rmsnorm(residual, delta, norm, model.shape.eps, y=h)
        target_rows, targets = batch.target_rows[:rows].long(), batch.targets[:rows]  # index_copy_ refuses int32
        picked = h.index_select(0, target_rows)
        del h
        d_picked = torch.empty_like(picked)
        losses = torch.empty(rows, device=x.device, dtype=torch.float32)
        buffer, add = model.sink.open(weight)
        for start in range(0, rows, model.chunk):
            part = slice(start, min(start + model.chunk, rows))
            logits = picked[part] @ weight.t()
            kernels.cross_entropy_(logits, targets[part], losses[part], batch.grad_scale)
            torch.mm(logits, weight, out=d_picked[part])
            matmul_into(buffer, add or start > 0, logits.t(), picked[part])
            del logits
        d_weight = model.sink.close(weight, buffer)
        dh = torch.zeros(tokens + 1, hidden, device=x.device, dtype=x.dtype).index_copy_(0, target_rows, d_picked)
        ctx.save_for_backward(dh, x, rstd, norm)
        ctx.model, ctx.d_weight = model, d_weight
        return losses.sum() * batch.grad_scale[0]

    @staticmethod
    def backward(ctx, d_loss):  # d_loss is 1: the scale is grad_scale's, already inside
        dh, x, rstd, norm = ctx.saved_tensors
        dx, d_norm = kernels.rmsnorm_backward(dh[:-1], x, rstd, norm, None)
        d_weight, ctx.d_weight = ctx.d_weight, None
        return dx, dx, sink_vector(ctx.model.sink, norm, d_norm), d_weight, None, None, None


class Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, model, batch):
        ctx.model, ctx.batch, ctx.weight = model, batch, weight
        return weight.index_select(0, batch.tokens)

    @staticmethod
    def backward(ctx, dx):
        batch = ctx.batch
        buffer, add = ctx.model.sink.open(ctx.weight)
        if not add:
            buffer.zero_()
        kernels.embedding_backward_(dx, batch.tokens, batch.token_order, batch.token_starts, buffer)
        return ctx.model.sink.close(ctx.weight, buffer), None, None


class Layer(nn.Module):
    def __init__(self, take, shape: Shape):
        super().__init__()
        self.attention_norm = take(shape.hidden)
        self.qkv = take(shape.qkv, shape.hidden)
        self.qkv_bias = take(shape.qkv)
        self.o = take(shape.hidden, shape.heads * shape.head_dim)
        self.mlp_norm = take(shape.hidden)
        self.gate_up = take(2 * shape.intermediate, shape.hidden)
        self.down = take(shape.hidden, shape.intermediate)

    def forward(self, residual, delta, model, batch):
        residual, delta = AttentionHalf.apply(
            residual, delta, self.attention_norm, self.qkv, self.qkv_bias, self.o, model, batch
        )
        return MlpHalf.apply(residual, delta, self.mlp_norm, self.gate_up, self.down, model)


class Decoder(nn.Module):
    """All parameters are views of one flat buffer (an optimizer kernel sweeps it), each an ordinary nn.Parameter."""

    def __init__(self, shape: Shape, attention, max_positions: int, device, dtype, chunk: int = 8192):
        super().__init__()
        self.shape, self.attention, self.chunk, self.sink = shape, attention, chunk, None
        per_layer = shape.hidden * (2 + shape.qkv + shape.heads * shape.head_dim + 3 * shape.intermediate) + shape.qkv
        count = shape.vocab * shape.hidden + shape.hidden + shape.layers * per_layer
        self.flat = torch.empty(count, device=device, dtype=dtype)
        self.offset = 0
        self.embedding = self.take(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(self.take, shape) for _ in range(shape.layers))
        self.norm = self.take(shape.hidden)
        assert self.offset == count
        frequency = shape.theta ** (-torch.arange(0, shape.head_dim, 2, device=device).float() / shape.head_dim)
        angle = torch.arange(max_positions, device=device).float()[:, None] * frequency
        self.cos, self.sin = angle.cos().contiguous(), angle.sin().contiguous()

    def take(self, *size: int) -> nn.Parameter:
        count = torch.Size(size).numel()
        view = self.flat[self.offset : self.offset + count].view(size)
        self.offset += count
        return nn.Parameter(view.normal_(std=0.02).add_(1.0) if len(size) == 1 else view.normal_(std=0.02))

    def grad_views(self, flat: Tensor) -> dict[nn.Parameter, Tensor]:
        """The same cuts of another flat buffer."""
        return {p: flat[p.storage_offset() : p.storage_offset() + p.numel()].view_as(p) for p in self.parameters()}

    def forward(self, batch, rows: int) -> Tensor:
        self.sink.start()
        residual, delta = Embedding.apply(self.embedding, self, batch), None
        for layer in self.layers:
            residual, delta = layer(residual, delta, self, batch)
        return NormLoss.apply(residual, delta, self.norm, self.embedding, self, batch, rows)
