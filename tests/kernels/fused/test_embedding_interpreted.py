"""The fused embedding under the interpreter: runs of every length and place, into every kind of buffer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chronicals.kernels.embedding import embedding_reference
from chronicals.kernels.fused import embedding as fused
from tests.kernels.numerics import assert_matches, relative_error

SLOTS, TILES = fused.BACKWARD[4].slots, fused.JOIN.slots


def order(tokens: Tensor) -> Tensor:
    return tokens.argsort(stable=True).int()


def of_runs(*lengths: int) -> Tensor:
    """Tokens 0, 1, ... as often as said, shuffled."""
    tokens = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    return tokens[torch.randperm(len(tokens))]


# runs that end at a tile's last slot, one before, one past; that fill tiles; that are joined in one step and in several
RUNS = {
    "one": (1,),
    "few": (3, 1, 3),
    "each its own": (1,) * 33,
    "a tile": (SLOTS,),
    "two tiles": (SLOTS, SLOTS),
    "one past": (SLOTS + 1, 2),
    "one before": (SLOTS - 1, 2, SLOTS),
    "into the next and on": (5, SLOTS, 3, SLOTS, 1),
    "whole tiles between": (20, 3 * SLOTS, 7),
    "joined in one step": (SLOTS + TILES * SLOTS, 4),
    "in two, to the end of all": (2, SLOTS + 2 * TILES * SLOTS - 2),
    "one token alone": (2 * TILES * SLOTS + 1,),
}


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_values_and_gradients(runs: tuple[int, ...]) -> None:
    tokens = of_runs(*runs)
    assert_matches(
        lambda w: fused.embedding(tokens, w, order(tokens)),
        lambda w: embedding_reference(tokens, w),
        [torch.randn(len(runs) + 3, 5)],
    )


@pytest.mark.parametrize("hidden", [1, 129, fused.BACKWARD[4].strips * fused.BACKWARD[4].columns + 7])
@pytest.mark.parametrize("slots", [1, 7, 33, 65])
def test_random_tokens(slots: int, hidden: int) -> None:
    tokens = torch.randint(11, (slots,))
    assert_matches(
        lambda w: fused.embedding(tokens, w, order(tokens)),
        lambda w: embedding_reference(tokens, w),
        [torch.randn(40, hidden)],
    )


def test_tiles_of_16_bits() -> None:
    """They hold more slots: runs that end within a tile, fill tiles, go on."""
    slots = fused.BACKWARD[2].slots
    assert slots != SLOTS
    tokens = of_runs(20, slots, 2 * slots, 1, slots - 1, slots + 1)
    upstream, grad = torch.randn(len(tokens), 70).half(), torch.empty(6, 70)
    fused.embedding_backward(upstream, tokens, order(tokens), grad, add=False)
    assert relative_error(grad, torch.zeros(6, 70).double().index_add_(0, tokens, upstream.double())) < 2e-6


@pytest.mark.parametrize("columns", [4, 5, 8])
@pytest.mark.parametrize("first", [0, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_zeroed_and_nothing_beside_it(columns: int, first: int, dtype: torch.dtype) -> None:
    """Whether eight bytes at a time or not."""
    for width in (16, 17):
        wide, none = torch.ones(3, width, dtype=dtype), torch.zeros(0, dtype=torch.int64)
        grad = wide[1:, first : first + columns]
        fused.embedding_backward(torch.empty(0, columns, dtype=dtype), none, none.int(), grad, add=False)
        assert (grad == 0).all()
        assert wide.sum() == 3 * width - 2 * columns


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_buffers_of_the_callers(add: bool, dtype: torch.dtype) -> None:
    """Strided views, the sum rounded once, rows of tokens that do not occur zeroed or left, nothing else touched."""
    tokens = of_runs(70, 1, 3, 0, 5)
    wide_upstream, wide = torch.randn(80, 140), torch.randn(9, 150).to(dtype)
    upstream, grad = wide_upstream[:79, 2:132], wide[1:7, 4:134]
    before, outside = grad.clone(), wide.clone()
    if not add:
        grad.fill_(float("nan"))
    fused.embedding_backward(upstream, tokens, order(tokens), grad, add=add)
    sums = torch.zeros(6, 130).double().index_add_(0, tokens, upstream.double())
    expected = sums + before.double() if add else sums
    assert relative_error(grad, expected) < {torch.float32: 2e-6, torch.float16: 4e-4}[dtype]
    assert torch.equal(grad[[3, 5]], before[[3, 5]] if add else torch.zeros(2, 130).to(dtype))
    grad.copy_(outside[1:7, 4:134])
    assert torch.equal(wide, outside)


def test_forward_into_a_strided_buffer() -> None:
    tokens, table, wide = torch.randint(9, (18,)), torch.randn(9, 40)[:, 3:33], torch.full((20, 44), 7.0)
    out = fused.embedding_forward(tokens, table, out=wide[1:19, 5:35])
    assert torch.equal(out, table[tokens])
    assert (wide[0] == 7).all() and (wide[19] == 7).all() and (wide[:, :5] == 7).all() and (wide[:, 35:] == 7).all()


def test_a_token_that_the_table_lacks_is_nan_and_adds_nothing() -> None:
    tokens = torch.tensor([0, 5, -1, 4])
    weight = torch.randn(5, 3, requires_grad=True)
    out = fused.embedding(tokens, weight, order(tokens))
    assert out.isnan().tolist() == [[False] * 3, [True] * 3, [True] * 3, [False] * 3]
    (grad,) = torch.autograd.grad(out, weight, torch.ones(4, 3))
    assert grad.sum(1).tolist() == [3, 0, 0, 0, 3]


def test_no_tokens_and_expanded_gradients() -> None:
    weight = torch.randn(5, 3, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    (grad,) = torch.autograd.grad(fused.embedding(none, weight, order(none)).sum(), weight)
    assert (grad == 0).all()
    tokens = torch.tensor([2, 2, 0])
    (grad,) = torch.autograd.grad(fused.embedding(tokens, weight, order(tokens)).sum(), weight)
    assert grad[:, 0].tolist() == [1, 0, 2, 0, 0]
