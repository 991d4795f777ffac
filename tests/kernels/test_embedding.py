"""Embedding: its reference, and a gradient whose sums are wide, ordered and repeatable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from chronicals.kernels.embedding import embedding, embedding_reference
from tests.kernels.numerics import assert_matches, relative_error


def order(tokens: Tensor) -> Tensor:
    return tokens.argsort(stable=True).int()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [1, 7, 130])
def test_matches_reference(dtype: torch.dtype, slots: int) -> None:
    tokens = torch.randint(20, (slots,))
    weight = torch.randn(20, 6).to(dtype)
    assert_matches(lambda w: embedding(tokens, w, order(tokens)), lambda w: embedding_reference(tokens, w), [weight])
    assert torch.equal(embedding(tokens, weight, order(tokens)), weight[tokens])


def test_gradient_of_the_reference() -> None:
    tokens, weight = torch.tensor([3, 0, 3, 3]), torch.randn(5, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: embedding_reference(tokens, w), (weight,))
    (grad,) = torch.autograd.grad(embedding_reference(tokens, weight).sum(), weight)
    assert grad.tolist() == [[1, 1], [0, 0], [0, 0], [3, 3], [0, 0]]


def test_a_frequent_token_is_summed_wide() -> None:
    """1 + 4000 / 1024: torch's own gradient in bf16 stays at a sum that the small terms no longer move."""
    tokens = torch.zeros(4001, dtype=torch.int64)
    upstream = torch.full((4001, 1), 2.0**-10).bfloat16()
    upstream[0] = 1.0
    weight = torch.randn(3, 1).bfloat16().requires_grad_()
    (grad,) = torch.autograd.grad(embedding(tokens, weight, order(tokens)), weight, upstream)
    assert grad.flatten().tolist() == [torch.tensor(1 + 4000 / 1024).bfloat16().item(), 0, 0]
    (theirs,) = torch.autograd.grad(F.embedding(tokens, weight), weight, upstream)
    assert relative_error(theirs[:1], torch.tensor([[1 + 4000 / 1024]])) > 0.05


def test_no_tokens() -> None:
    tokens, weight = torch.zeros(0, dtype=torch.int64), torch.randn(5, 2, requires_grad=True)
    out = embedding(tokens, weight, order(tokens))
    assert out.shape == (0, 2)
    (grad,) = torch.autograd.grad(out.sum(), weight)
    assert (grad == 0).all()
