"""The fused RMS norm, interpreted: against the float64 reference, at ragged sizes, in place, in wider buffers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chronicals.kernels.fused import rmsnorm as fused
from chronicals.kernels.rmsnorm import rmsnorm_backward, rmsnorm_reference
from tests.kernels.numerics import assert_matches, relative_error

# one row, fewer rows than programs, tiles that end early, one past a tile
ROWS = [1, 7, 33, 65]
EPS = 1e-3


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("hidden", [5, 64, 257])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_values_and_gradients(rows: int, hidden: int, offset: float) -> None:
    assert_matches(
        lambda x, w: fused.rmsnorm(x, w, EPS, offset),
        lambda x, w: rmsnorm_reference(x, w, EPS, offset),
        [torch.randn(rows, hidden), torch.randn(hidden)],
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_residual_add(rows: int, offset: float) -> None:
    def both(op: object) -> object:  # the sum's own gradient flows too
        return lambda *inputs: torch.cat(op(*inputs), dim=-1)

    def reference(x: Tensor, delta: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return x + delta, rmsnorm_reference(x + delta, w, EPS, offset)

    inputs = [torch.randn(rows, 96), torch.randn(rows, 96), torch.randn(96)]
    assert_matches(both(lambda x, d, w: fused.add_rmsnorm(x, d, w, EPS, offset)), both(reference), inputs)


@pytest.mark.parametrize("width", [64, 128, 256])
def test_heads_of_a_packed_buffer(width: int) -> None:
    """Queries and keys of one qkv buffer, each head by itself, without a copy of the buffer's rows."""
    qkv, weight = torch.randn(9, 8 * width), torch.randn(width)

    def of(op: object, qkv: Tensor, w: Tensor) -> Tensor:
        q, k, _ = qkv.unflatten(1, (-1, width)).split((5, 2, 1), dim=1)
        return torch.cat((op(q, w, EPS), op(k, w, EPS)), dim=1)

    assert_matches(lambda x, w: of(fused.rmsnorm, x, w), lambda x, w: of(rmsnorm_reference, x, w), [qkv, weight])


@pytest.mark.parametrize("view", [(slice(None), slice(0, 65)), (slice(None, None, 2), slice(7, 72)), "columns", "T"])
def test_strided_inputs(view: object) -> None:
    wide, weight = torch.randn(66, 144), torch.randn(65)
    x = wide[:, :130:2] if view == "columns" else wide.T[:, :65] if view == "T" else wide[view]
    assert not x.is_contiguous()
    assert_matches(lambda x, w: fused.rmsnorm(x, w, EPS), lambda x, w: rmsnorm_reference(x, w, EPS), [x, weight])


def test_an_expanded_gradient() -> None:
    x, weight = torch.randn(7, 33, requires_grad=True), torch.randn(33, requires_grad=True)
    ours = torch.autograd.grad(fused.rmsnorm(x, weight, EPS).sum(), (x, weight))
    for grad, expected in zip(
        ours, torch.autograd.grad(rmsnorm_reference(x, weight, EPS).sum(), (x, weight)), strict=True
    ):
        assert relative_error(grad, expected) < 2e-6


def test_launchers_write_where_they_are_told_and_nowhere_else() -> None:
    residual, delta, weight = torch.randn(7, 33), torch.randn(7, 33), torch.randn(33)
    wide = torch.full((8, 40), 7.0)
    total, y, rstd = fused.add_rmsnorm_forward(residual.clone(), delta, weight, EPS, out=wide[:7, :33])
    assert torch.equal(total, residual + delta)
    assert relative_error(wide[:7, :33], rmsnorm_reference((residual + delta).double(), weight.double(), EPS)) < 2e-6
    assert y.data_ptr() == wide.data_ptr()
    assert (wide[7:] == 7).all() and (wide[:, 33:] == 7).all()
    wide.fill_(7.0)
    again = fused.rmsnorm_recompute(total, rstd, weight, out=wide[:7, :33])
    assert torch.equal(again, fused.rmsnorm_forward(total, weight, EPS)[0])
    assert (wide[7:] == 7).all() and (wide[:, 33:] == 7).all()


@pytest.mark.parametrize("over", ["d_normed", "d_residual", "x"])
def test_backward_over_one_of_its_inputs(over: str) -> None:
    x, weight = torch.randn(65, 33), torch.randn(33)
    rstd = fused.rmsnorm_forward(x, weight, EPS)[1]
    inputs = {
        "d_normed": torch.randn(65, 33),
        "x": x,
        "rstd": rstd,
        "weight": weight,
        "d_residual": torch.randn(65, 33),
    }
    apart, partial = fused.rmsnorm_backward(**inputs)
    assert apart.data_ptr() not in {tensor.data_ptr() for tensor in inputs.values()}
    same, partial_too = fused.rmsnorm_backward(**inputs, out=inputs[over])
    assert same.data_ptr() == inputs[over].data_ptr()
    assert torch.equal(same, apart)
    assert torch.equal(partial, partial_too)


def test_add_over_its_own_inputs() -> None:
    residual, delta, weight = torch.randn(7, 33), torch.randn(7, 33), torch.randn(33)
    total, y, _ = fused.add_rmsnorm_forward(residual, delta, weight, EPS)
    fused.add_rmsnorm_forward(residual, delta, weight, EPS, sum_out=residual, out=delta)
    assert torch.equal(residual, total)
    assert torch.equal(delta, y)


@pytest.mark.parametrize("rows", [0, 1, *ROWS])
def test_partials_of_many_norms_at_once(rows: int) -> None:
    """Each norm's parts in its place of one buffer, one reduction for all: the bits of each norm alone."""
    programs = fused.partial_programs(rows, 33, torch.device("cpu"))
    partials, weight = torch.empty(3, programs, 33), torch.randn(33)
    norms = [(torch.randn(rows, 33), torch.randn(rows, 33)) for _ in partials]
    for (d_normed, x), place in zip(norms, partials, strict=True):
        rstd = fused.rmsnorm_forward(x, weight, EPS)[1]
        _, partial = fused.rmsnorm_backward(d_normed, x, rstd, weight, partial=place)
        assert partial is place
    together = fused.reduce_partials(partials, torch.float32)
    for (d_normed, x), ours in zip(norms, together, strict=True):
        x, alone = x.requires_grad_(), weight.clone().requires_grad_()
        assert torch.equal(ours, torch.autograd.grad(fused.rmsnorm(x, alone, EPS), alone, d_normed)[0])
        exact = torch.autograd.grad(rmsnorm_reference(x, alone, EPS), alone, d_normed)[0]
        assert relative_error(ours, exact) < 2e-6


@pytest.mark.parametrize("rows", [0, 1, 9, 40])
@pytest.mark.parametrize(("queries", "keys", "width"), [(5, 2, 64), (4, 1, 128), (2, 2, 24)])
def test_queries_and_keys_in_one_launch(rows: int, queries: int, keys: int, width: int) -> None:
    """As two calls, from parts of packed buffers over the gradient itself, with and without a weight's gradient."""
    heads = queries + keys
    qkv, d_qkv = torch.randn(rows, heads + keys, width), torch.randn(rows, heads + keys, width)
    weights = (torch.randn(width), torch.randn(width))
    x, d, split = qkv[:, :heads], d_qkv[:, :heads].clone(), (queries, keys)
    rstds = tuple(fused.rmsnorm_forward(part, weights[0], EPS)[1] for part in x.split(split, 1))
    expected = [
        rmsnorm_backward(*given)
        for given in zip(d.double().split(split, 1), x.split(split, 1), rstds, weights, strict=True)
    ]
    programs = fused.qk_partial_programs(rows, queries, keys, width, x.device)
    places = [torch.full((count, width), float("nan")) for count in programs]
    behind = d_qkv[:, heads:].clone()
    over = d_qkv[:, :heads]
    for options in ({}, {"weight_grads": (True, False)}, {"partials": tuple(places), "out": over}):
        dx, partials = fused.qk_rmsnorm_backward(options.get("out", d), x, rstds, weights, queries, **options)
        for part, (exact, _) in zip(dx.split(split, 1), expected, strict=True):
            assert relative_error(part, exact) < 2e-6
        for partial, wanted, (_, exact) in zip(partials, options.get("weight_grads", (1, 1)), expected, strict=True):
            assert (partial is not None) == wanted
            if partial is not None:
                assert relative_error(partial.double().sum(0), exact[0]) < 2e-6
    assert partials[0] is not None and partials[0].data_ptr() == places[0].data_ptr()
    assert dx.data_ptr() == over.data_ptr() and torch.equal(d_qkv[:, heads:], behind)


def test_no_weight_gradient_where_none_is_wanted() -> None:
    x, weight = torch.randn(7, 33, requires_grad=True), torch.randn(33)
    expected = torch.autograd.grad(rmsnorm_reference(x, weight, EPS).square().sum(), x)[0]
    assert relative_error(torch.autograd.grad(fused.rmsnorm(x, weight, EPS).square().sum(), x)[0], expected) < 2e-6
    assert fused.rmsnorm_backward(x, x, torch.ones(7), weight, weight_grad=False)[1] is None


def test_half_precision_is_rounded_once() -> None:
    x, weight = torch.randn(33, 64, dtype=torch.float16), torch.randn(64, dtype=torch.float16)
    expected = rmsnorm_reference(x.double(), weight.double(), EPS).half()
    ours = fused.rmsnorm(x, weight, EPS)
    assert ours.dtype == torch.float16
    # float32 arithmetic may fall on the other side of a tie, rarely
    assert (ours != expected).float().mean() < 1e-2
    assert fused.rmsnorm(x, weight.float(), EPS).dtype == torch.float32
    assert fused.rmsnorm(x, weight.float(), EPS, 1.0).dtype == torch.float16


def test_the_norm_is_that_of_the_rounded_sum() -> None:
    residual, delta = (torch.randn(33, 64, dtype=torch.float16) for _ in range(2))
    weight = torch.randn(64, dtype=torch.float16)
    total, y, rstd = fused.add_rmsnorm_forward(residual, delta, weight, EPS)
    assert torch.equal(total, residual + delta)
    for ours, expected in zip((y, rstd), fused.rmsnorm_forward(total, weight, EPS), strict=True):
        assert torch.equal(ours, expected)


def test_extreme_rows() -> None:
    x = torch.randn(25, 64) * torch.logspace(-12, 12, 25)[:, None]
    assert_matches(
        lambda x, w: fused.rmsnorm(x, w, 1e-6), lambda x, w: rmsnorm_reference(x, w, 1e-6), [x, torch.randn(64)]
    )


@pytest.mark.parametrize("shape", [(0, 33), (0, 4, 64), (3, 0, 64)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(shape[-1], requires_grad=True)
    out = fused.rmsnorm(x, weight, EPS)
    assert out.shape == shape
    dx, d_weight = torch.autograd.grad(out.sum(), (x, weight))
    assert dx.shape == shape
    assert torch.equal(d_weight, torch.zeros(shape[-1]))


def test_one_vector_and_more_dimensions() -> None:
    for shape in [(33,), (2, 3, 4, 33)]:
        assert_matches(
            lambda x, w: fused.rmsnorm(x, w, EPS),
            lambda x, w: rmsnorm_reference(x, w, EPS),
            [torch.randn(shape), torch.randn(33)],
        )


def test_what_it_does_not_take_is_named() -> None:
    with pytest.raises(ValueError) as caught:
        fused.rmsnorm(torch.randn(2, 4, dtype=torch.float64), torch.randn(4), EPS)
    assert str(caught.value) == "the fused RMS norm takes float32, bfloat16 and float16, not torch.float64"
    with pytest.raises(ValueError) as caught:
        fused.rmsnorm(torch.randn(1, 8193), torch.randn(8193), EPS)
    assert str(caught.value) == "the fused RMS norm takes rows of up to 8192 elements, not 8193"
