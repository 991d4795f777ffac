"""Tensors past 2^31 elements, where 32-bit offsets end: the last rows are as right as they are alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.kernels.numerics import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    from chronicals.kernels.fused import glu, rmsnorm
    from chronicals.kernels.fused import linear_cross_entropy as head
    from chronicals.kernels.fused.cross_entropy_rows import cross_entropy_rows_
    from chronicals.kernels.linear_cross_entropy import HeadOptions


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


@pytest.mark.large(20)
def test_rms_norm() -> None:
    rows, hidden, eps = 2**31 // 4096 + 7, 4096, 1e-6
    x, weight = torch.ones(rows, hidden, device="cuda", dtype=torch.bfloat16), random(hidden)
    x[-1] = 3 * random(hidden)
    y, rstd = rmsnorm.rmsnorm_forward(x, weight, eps)
    assert torch.equal(y[-1], rmsnorm.rmsnorm_forward(x[-1:], weight, eps)[0][0])
    last = y[-1].clone()
    dx, _ = rmsnorm.rmsnorm_backward(y, x, rstd, weight, out=y)
    assert torch.equal(dx[-1], rmsnorm.rmsnorm_backward(last[None], x[-1:], rstd[-1:], weight)[0][0])


@pytest.mark.large(20)
def test_glu() -> None:
    rows, width = 2**31 // 28672 + 7, 14336
    gate_up = torch.zeros(rows, 2 * width, device="cuda", dtype=torch.bfloat16)
    gate_up[-1] = random(2 * width)
    out = glu.glu_forward(gate_up, "silu")
    product, last = out[-1].clone(), gate_up[-1:].clone()
    assert torch.equal(product, glu.glu_forward(last, "silu")[0])
    glu.glu_backward(out, gate_up, "silu", d_gate_up=gate_up)
    expected = glu.glu_backward(product[None], last, "silu", d_gate_up=torch.empty_like(last))
    assert torch.equal(gate_up[-1:], expected)


@pytest.mark.large(24)
@pytest.mark.parametrize("vocab", [151936, 151937])
def test_logits_of_one_chunk(vocab: int) -> None:
    """2.5e9 logits at a time, for a vocabulary that 8 divides and for one of a column more."""
    tokens, hidden = 16384, 64
    states, weight = random(tokens, hidden), 0.25 * random(vocab, hidden)
    rows = torch.arange(tokens, dtype=torch.int32, device="cuda")
    targets = torch.randint(vocab, (tokens,), device="cuda")
    scale = torch.full((1,), 1 / tokens, device="cuda")

    def gradients(chunk_rows: int) -> tuple[Tensor, ...]:
        wanted = states.requires_grad_(), weight.requires_grad_()
        loss = head.linear_cross_entropy(*wanted, rows, targets, scale, mode="fast", chunk_rows=chunk_rows)
        return loss.detach(), *torch.autograd.grad(loss, wanted)

    for one, other in zip(gradients(tokens), gradients(2048), strict=True):
        assert relative_error(one, other) < 1e-2  # bf16, and other kernels of cuBLAS's; a lost row would be of order 1

    losses = torch.full((tokens,), math.nan, device="cuda")
    logits = torch.empty(tokens, vocab + vocab % 2, device="cuda", dtype=torch.bfloat16)[:, :vocab]
    for start in range(0, tokens, 2048):
        part = slice(start, start + 2048)
        logits[part] = states.detach()[part] @ weight.detach().T
    last = logits[-3:].double()
    cross_entropy_rows_(logits, targets, scale, losses, HeadOptions())
    assert relative_error(losses[-3:], F.cross_entropy(last, targets[-3:], reduction="none")) < 1e-6
    gradient = last.softmax(1)
    gradient[torch.arange(3), targets[-3:]] -= 1
    assert relative_error(logits[-3:], gradient * scale.double()) < 3e-3
