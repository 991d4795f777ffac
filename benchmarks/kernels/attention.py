"""Attention over packed documents: the backend that `ops.fused()` chooses beside torch's FlashAttention-2 and cuDNN.

The floor of memory traffic says little here, so there is no target against it; where FlashAttention-4 runs on an H200,
it must be no slower than it was there when it was chosen, but for 5%.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.harness import Arm, Call, Case, assert_no_worse, relative_error
from chronicals.kernels.attention import TorchVarlen, varlen_attention_reference
from chronicals.kernels.attention_backend import AttentionBackend
from chronicals.kernels.fused.attention import FlashAttention4, backend_for, is_installed

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Work:
    name: str
    heads: int
    kv_heads: int
    head_dim: int
    lengths: tuple[int, ...]
    chosen_ms: tuple[float, float]  # FlashAttention-4 on an H200 when it was chosen: forward, backward

    @property
    def rows(self) -> int:
        return sum(self.lengths)

    @property
    def parts(self) -> tuple[int, int, int]:
        return self.heads, self.kv_heads, self.kv_heads

    @property
    def max_seqlen(self) -> int:
        return -(-max(self.lengths) // 128) * 128

    def flops(self, matmuls: int) -> int:
        """Of so many matmuls a pair of tokens: 2 forward, 5 backward."""
        return matmuls * 2 * self.heads * self.head_dim * sum(n * (n + 1) // 2 for n in self.lengths)

    def boundaries(self) -> Tensor:
        """Slots as a run would have: the next multiple of 64."""
        bounds = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
        slots = -(-len(self.lengths) // 64) * 64
        return torch.tensor(bounds + bounds[-1:] * (slots + 1 - len(bounds)), dtype=torch.int32, device="cuda")


def ragged(rows: int) -> tuple[int, ...]:
    """Documents of 80 to 400 tokens, as chats are."""
    generator, lengths = torch.Generator().manual_seed(3), list[int]()
    while (room := rows - sum(lengths)) > 0:
        lengths.append(min(room, int(torch.randint(80, 401, (1,), generator=generator))))
    return tuple(lengths)


WORKS = (
    Work("8 x 2048, 14/2 x 64", 14, 2, 64, (2048,) * 8, (0.162, 0.422)),
    Work("ragged 16384, 14/2 x 64", 14, 2, 64, ragged(16384), (0.085, 0.271)),
    Work("4 x 2048, 32/8 x 128", 32, 8, 128, (2048,) * 4, (0.272, 0.842)),
)


def chosen(work: Work) -> AttentionBackend:
    return backend_for(torch.device("cuda"), BF16, head_dim=work.head_dim)


def tensors(work: Work) -> tuple[Tensor, Tensor]:
    """A packed qkv buffer, and the gradient of the output."""
    packed = torch.randn(work.rows, sum(work.parts), work.head_dim, device="cuda", dtype=BF16)
    return packed, torch.randn(work.rows, work.heads, work.head_dim, device="cuda", dtype=BF16)


def forward_of(work: Work, make: type[TorchVarlen] | None = None) -> Arm:
    def arm() -> Call:
        packed, _ = tensors(work)
        backend, bounds = chosen(work) if make is None else make(), work.boundaries()
        q, k, v = packed.split(work.parts, dim=1)
        return lambda: backend.forward(q, k, v, bounds, work.max_seqlen)

    return arm


def backward_of(work: Work, make: type[TorchVarlen] | None = None) -> Arm:
    def arm() -> Call:
        packed, d_out = tensors(work)
        backend, bounds = chosen(work) if make is None else make(), work.boundaries()
        q, k, v = packed.split(work.parts, dim=1)
        out, lse = backend.forward(q, k, v, bounds, work.max_seqlen)
        grads = torch.empty_like(packed).split(work.parts, dim=1)
        return lambda: backend.backward(d_out, q, k, v, out, lse, bounds, work.max_seqlen, *grads)

    return arm


def dense(work: Work, *, backward: bool) -> Arm:
    """cuDNN on documents of one length, laid out as it likes best."""

    def arm() -> Call:
        shape = len(work.lengths), work.lengths[0], -1, work.head_dim
        packed, d_out = tensors(work)
        q, k, v = (x.reshape(shape).transpose(1, 2).detach().requires_grad_() for x in packed.split(work.parts, dim=1))
        upstream = d_out.reshape(shape).transpose(1, 2)

        def forward() -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        if not backward:
            return forward
        out = forward()
        return lambda: torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True)

    return arm


def plain(work: Work, packed: Tensor, d_out: Tensor, bounds: Tensor) -> dict[str, Tensor]:
    """Document by document as transformers' eager attention: matmuls in the inputs' dtype, softmax in float32."""
    leaf = packed.detach().requires_grad_()
    out = varlen_attention_reference(*leaf.split(work.parts, dim=1), bounds, 0)
    return {"out": out.detach(), "d_packed": torch.autograd.grad(out, leaf, d_out)[0]}


def parts_of(work: Work, d_packed: Tensor) -> dict[str, Tensor]:
    return dict(zip(("dq", "dk", "dv"), d_packed.split(work.parts, dim=1), strict=True))


def gate(work: Work) -> None:
    """Values and gradients against float64: no worse than eager's in bf16, nor than FlashAttention-2's."""
    packed, d_out = tensors(work)
    bounds, errors = work.boundaries(), []
    eager = plain(work, packed, d_out, bounds)
    both = plain(work, packed.double(), d_out.double(), bounds)
    exact, d_exact = both["out"], both["d_packed"]
    for backend in (chosen(work), TorchVarlen()):
        q, k, v = packed.split(work.parts, dim=1)
        out, lse = backend.forward(q, k, v, bounds, work.max_seqlen)
        d_packed = torch.full_like(packed, float("nan"))
        grads = d_packed.split(work.parts, dim=1)
        backend.backward(d_out, q, k, v, out, lse, bounds, work.max_seqlen, *grads)
        if not errors:
            found = {"out": out, "d_packed": d_packed} | parts_of(work, d_packed)
            assert_no_worse(found, eager | parts_of(work, eager["d_packed"]), both | parts_of(work, d_exact))
        errors.append((relative_error(out, exact), relative_error(d_packed, d_exact)))
    (out_error, grad_error), (torch_out_error, torch_grad_error) = errors
    assert out_error <= max(1.05 * torch_out_error, 3e-3), f"out is {out_error:.1e} off, torch's {torch_out_error:.1e}"
    assert grad_error <= max(1.05 * torch_grad_error, 3e-3), f"{grad_error:.1e} off, torch's {torch_grad_error:.1e}"


def cases() -> Iterator[Case]:
    for work in WORKS:
        rows = work.rows * work.head_dim * 2  # bytes of one head
        read, written = sum(work.parts) * rows, work.heads * rows
        for backward in (False, True):
            of = backward_of if backward else forward_of
            peers = {"fa2": of(work, TorchVarlen)}
            if len(set(work.lengths)) == 1:
                peers["cudnn"] = dense(work, backward=backward)
            at_most = 1.05e-3 * work.chosen_ms[backward]
            yield Case(
                op="attention",
                shape=work.name,
                direction="backward" if backward else "forward",
                bytes=2 * (read + written) if backward else read + written,  # q k v out dout in, dqkv written
                gate=lambda work=work: gate(work),
                ours=of(work),
                peers=peers,
                flops=work.flops(5 if backward else 2),
                target=None,
                at_most=at_most if expects_fa4(work) else None,
            )


def expects_fa4(work: Work) -> bool:
    if not (is_installed() and torch.cuda.is_available() and "H200" in torch.cuda.get_device_name()):
        return False
    return isinstance(chosen(work), FlashAttention4)
