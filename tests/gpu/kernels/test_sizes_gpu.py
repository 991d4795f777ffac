"""Hidden size 5120 as heads (40 of 128), and inputs that are not contiguous, where an op's own tests lack them."""

from __future__ import annotations

import pytest
import torch

from chronicals.kernels.attention import varlen_attention_reference
from chronicals.kernels.embedding import embedding_reference
from chronicals.kernels.rope import rope_reference, rope_tables
from tests.kernels.numerics import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HEADS, WIDTH = (40, 8), 128
if torch.cuda.is_available():
    from chronicals.kernels.fused import rope
    from chronicals.kernels.fused.attention import backend_for
    from chronicals.kernels.fused.embedding import embedding_backward, embedding_forward


def packed(rows: int) -> torch.Tensor:
    """qkv, its heads beside each other: q, k and v are views of it."""
    return torch.randn(rows, (HEADS[0] + 2 * HEADS[1]) * WIDTH, device="cuda").bfloat16()


def test_rope_of_5120() -> None:
    qkv = packed(760)
    positions = torch.arange(760, device="cuda", dtype=torch.int32).flip(0)
    cos, sin = rope_tables(torch.arange(760, device="cuda"), 1e4 ** -torch.linspace(0, 1, WIDTH // 2, device="cuda"))
    heads = qkv.double().unflatten(1, (-1, WIDTH)).split((HEADS[0], HEADS[1], HEADS[1]), dim=1)
    turned = rope_reference(*heads[:2], cos[positions.long()].double(), sin[positions.long()].double())
    rope.rope_qkv_(qkv, cos, sin, *HEADS, positions=positions)
    assert relative_error(qkv, torch.cat((*turned, heads[2]), 1).flatten(1)) < 4e-3


def test_attention_of_5120() -> None:
    qkv, d_out = packed(1128), torch.randn(1128, HEADS[0], WIDTH, device="cuda").bfloat16()
    bounds = torch.tensor([0, 1, 1, 700, 1128, 1128], device="cuda", dtype=torch.int32)
    parts = (HEADS[0], HEADS[1], HEADS[1])
    q, k, v = qkv.unflatten(1, (-1, WIDTH)).split(parts, dim=1)
    backend = backend_for(qkv.device, qkv.dtype, head_dim=WIDTH)
    out, lse = backend.forward(q, k, v, bounds, 768)
    d_qkv = torch.full_like(qkv, float("nan"))
    gradients = d_qkv.unflatten(1, (-1, WIDTH)).split(parts, dim=1)
    backend.backward(d_out, q, k, v, out, lse, bounds, 768, *gradients)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    exact = varlen_attention_reference(*leaves, bounds, 768)
    assert relative_error(out, exact) < 1e-2
    for mine, its in zip(gradients, torch.autograd.grad(exact, leaves, d_out.double()), strict=True):
        assert relative_error(mine, its) < 1e-2


def test_embedding_in_wider_buffers() -> None:
    tokens = torch.randint(50, (760,), device="cuda")
    order = tokens.argsort(stable=True).int()
    table = torch.randn(50, 1000, device="cuda").bfloat16()[:, 40:936]
    out = torch.full((760, 1000), float("nan"), device="cuda", dtype=torch.bfloat16)
    embedding_forward(tokens, table, out=out[:, 8:904])
    assert torch.equal(out[:, 8:904], embedding_reference(tokens, table))
    assert out[:, :8].isnan().all() and out[:, 904:].isnan().all()
    d_out = torch.randn(760, 1000, device="cuda").bfloat16()[:, 16:912]
    grad = torch.full((50, 1000), float("nan"), device="cuda")
    embedding_backward(d_out, tokens, order, grad[:, 24:920], add=False)
    exact = torch.zeros(50, 896, device="cuda", dtype=torch.float64).index_add_(0, tokens, d_out.double())
    assert relative_error(grad[:, 24:920], exact) < 2e-6
    assert grad[:, :24].isnan().all() and grad[:, 920:].isnan().all()
