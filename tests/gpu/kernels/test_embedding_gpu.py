"""The fused embedding on CUDA: gathers bit for bit, gradients against float64 and no worse than eager, repeatable."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from chronicals.kernels.embedding import embedding as plain
from tests.kernels.numerics import nan_filled_memory, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# gradients of the upstream's dtype: summed in float32, rounded once
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SHAPES = [
    (1, 896, 50),
    (7, 760, 50),
    (33, 5, 3),
    (760, 1128, 97),
    (16384, 896, 151936),
    (8192, 4096, 128256),
    (2049, 5120, 7),
]


@pytest.fixture(autouse=True)
def _nan_filled_memory() -> Iterator[None]:
    with nan_filled_memory():
        yield


def zipf(slots: int, vocab: int) -> Tensor:
    """Token k about as often as 1 / (k + 1): a twentieth of a large batch is token 0."""
    return (float(vocab) ** torch.rand(slots, device="cuda", dtype=torch.float64) - 1).long().clamp(0, vocab - 1)


def order(tokens: Tensor) -> Tensor:
    return tokens.argsort(stable=True).int()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    from chronicals.kernels.fused.embedding import embedding

    slots, hidden, vocab = shape
    tokens, weight = zipf(slots, vocab), torch.randn(vocab, hidden, device="cuda").to(dtype).requires_grad_()
    out = embedding(tokens, weight, order(tokens))
    assert torch.equal(out, weight[tokens])
    upstream = torch.randn(slots, hidden, device="cuda").to(dtype)
    (grad,) = torch.autograd.grad(out, weight, upstream, retain_graph=True)
    ids, back = tokens.unique(return_inverse=True)
    exact = torch.zeros(len(ids), hidden, dtype=torch.float64, device="cuda").index_add_(0, back, upstream.double())
    assert relative_error(grad[ids], exact) < TOLERANCE[dtype]
    (eager,) = torch.autograd.grad(F.embedding(tokens, weight), weight, upstream)
    assert relative_error(grad[ids], exact) <= 1.01 * relative_error(eager[ids], exact) + 1e-7
    grad[ids] = 0
    assert (grad == 0).all()


@pytest.mark.parametrize("kept", DTYPES)
@pytest.mark.parametrize("add", [False, True])
def test_into_a_buffer(kept: torch.dtype, add: bool) -> None:
    """bf16 upstream into each kind of gradient buffer, a strided view of it; the same bits again."""
    from chronicals.kernels.fused.embedding import embedding_backward

    slots, hidden, vocab = 16384, 896, 4000
    tokens, upstream = zipf(slots, vocab), torch.randn(slots, hidden + 8, device="cuda").bfloat16()[:, 8:]
    wide = torch.randn(vocab, hidden + 16, device="cuda").to(kept)
    results = []
    for _ in range(2):
        buffer = wide.clone()
        grad = buffer[:, 16:]
        embedding_backward(upstream, tokens, order(tokens), grad, add=add)
        assert torch.equal(buffer[:, :16], wide[:, :16])
        results.append(grad)
    assert torch.equal(*results)
    exact = torch.zeros(vocab, hidden, dtype=torch.float64, device="cuda").index_add_(0, tokens, upstream.double())
    exact += wide[:, 16:].double() if add else 0
    assert relative_error(results[0], exact) < TOLERANCE[kept]
    absent = torch.ones(vocab, dtype=torch.bool, device="cuda").index_fill_(0, tokens, False)
    assert torch.equal(results[0][absent], wide[absent, 16:] if add else torch.zeros_like(results[0][absent]))


@pytest.mark.parametrize(
    "runs",
    [(1,), (31, 2), (32, 33), (63, 2), (64, 65), (5, 200, 1), (32 * 17, 3), (30, 64 * 33 + 1), (9000,), (1,) * 100],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_of_every_length(runs: tuple[int, ...], dtype: torch.dtype) -> None:
    from chronicals.kernels.fused.embedding import embedding_backward

    tokens = torch.cat([torch.full((n,), i) for i, n in enumerate(runs)])[torch.randperm(sum(runs))].cuda()
    grad = torch.empty(len(runs) + 1, 200, device="cuda")
    upstream = torch.randn(len(tokens), 200, device="cuda").to(dtype)
    embedding_backward(upstream, tokens, order(tokens), grad, add=False)
    exact = torch.zeros(len(grad), 200, dtype=torch.float64, device="cuda").index_add_(0, tokens, upstream.double())
    assert relative_error(grad, exact) < 2e-6


def test_no_tokens_and_tokens_that_the_table_lacks() -> None:
    from chronicals.kernels.fused.embedding import embedding

    weight = torch.randn(5, 300, device="cuda", requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64, device="cuda")
    assert embedding(none, weight, order(none)).shape == (0, 300)
    tokens = torch.tensor([0, 5, -1, 4], device="cuda")
    out = embedding(tokens, weight, order(tokens))
    assert out.isnan().any(1).tolist() == [False, True, True, False]
    (grad,) = torch.autograd.grad(out, weight, torch.ones(4, 300, device="cuda"))
    assert grad.sum(1).tolist() == [300, 0, 0, 0, 300]


def test_plain_and_fused_agree() -> None:
    from chronicals.kernels.fused.embedding import embedding

    tokens, weight = zipf(1128, 300), torch.randn(300, 760, device="cuda").requires_grad_()
    upstream = torch.randn(1128, 760, device="cuda")
    grads = [torch.autograd.grad(op(tokens, weight, order(tokens)), weight, upstream)[0] for op in (embedding, plain)]
    assert relative_error(*grads) < 2e-6
