"""The fused RMS norm on CUDA: every dtype against float64, no worse than eager PyTorch, and the same bits each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from chronicals.kernels.rmsnorm import rmsnorm, rmsnorm_reference
from tests.kernels.numerics import nan_filled_memory, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    from chronicals.kernels.fused import rmsnorm as fused

EPS = 1e-5
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
SHAPES = [(1, 896), (7, 33), (760, 1128), (1128, 760), (65, 8192), (513, 5120), (16384, 896), (8192, 4096)]
SHAPES += [(1, 14, 64), (760, 14, 64), (760, 8, 128), (65, 4, 256)]


@pytest.fixture(autouse=True)
def _nan_filled_memory() -> Iterator[None]:
    with nan_filled_memory():
        yield


def errors(op: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor, exact: list[Tensor]) -> list[float]:
    """Of the value and of each gradient, against `exact`."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = op(*inputs)
    grads = torch.autograd.grad(out, inputs, upstream.to(out.dtype))
    return [relative_error(ours, ref) for ours, ref in zip((out, *grads), exact, strict=True)]


def compare(
    ours: Callable[..., Tensor], eager: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor]
) -> None:
    """Within tolerance of the reference in float64, and no farther from it than eager PyTorch."""
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact_out = reference(*exact_inputs)
    upstream = torch.randn(exact_out.shape, device="cuda").to(inputs[0].dtype)
    exact = [exact_out.detach(), *torch.autograd.grad(exact_out, exact_inputs, upstream.double())]
    mine, its = (errors(op, inputs, upstream, exact) for op in (ours, eager))
    names = ["value", *(f"gradient of input {i}" for i in range(len(inputs)))]
    for name, error, eager_error in zip(names, mine, its, strict=True):
        assert error <= TOLERANCE[inputs[0].dtype], name
        assert error <= 1.05 * eager_error + 2e-7, f"{name}: eager is nearer"


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device="cuda")).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_values_and_gradients(dtype: torch.dtype, shape: tuple[int, ...], offset: float) -> None:
    compare(
        lambda x, w: fused.rmsnorm(x, w, EPS, offset),
        lambda x, w: rmsnorm(x, w, EPS, offset),
        lambda x, w: rmsnorm_reference(x, w, EPS, offset),
        [random(*shape, dtype=dtype), random(shape[-1], dtype=dtype)],
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 896), (760, 1128), (16384, 896), (8192, 4096)], ids=str)
def test_residual_add(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """The gradients of the sum and of its norm together; the reference rounds the sum as both ops do."""

    def through(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def both(residual: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
            total = residual + delta
            total = total + (total.detach().to(dtype).to(total.dtype) - total.detach())
            return torch.cat((total, norm(total, weight, EPS)), dim=-1)

        return both

    compare(
        lambda x, d, w: torch.cat(fused.add_rmsnorm(x, d, w, EPS), dim=-1),
        through(rmsnorm),
        through(rmsnorm_reference),
        [random(*shape, dtype=dtype), random(*shape, dtype=dtype), random(shape[1], dtype=dtype)],
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "width"), [((14, 2), 64), ((16, 8), 128), ((8, 4), 256)])
def test_heads_of_a_packed_buffer(dtype: torch.dtype, heads: tuple[int, int], width: int) -> None:
    def of(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def both(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
            q, k, _ = qkv.unflatten(1, (-1, width)).split((*heads, heads[1]), dim=1)
            return torch.cat((norm(q, q_weight, EPS), norm(k, k_weight, EPS)), dim=1)

        return both

    qkv = random(1128, (heads[0] + 2 * heads[1]) * width, dtype=dtype)
    compare(
        of(fused.rmsnorm),
        of(rmsnorm),
        of(rmsnorm_reference),
        [qkv, random(width, dtype=dtype), random(width, dtype=dtype)],
    )


def test_extreme_rows() -> None:
    scales = torch.logspace(-12, 12, 25, device="cuda")[:, None]
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = random(25, 896, dtype=torch.float32) * scales, random(896, dtype=dtype)
        x = x.to(dtype)
        out = fused.rmsnorm(x, weight, 1e-6)
        for ours, exact in zip(out, rmsnorm_reference(x.double(), weight.double(), 1e-6), strict=True):
            assert relative_error(ours, exact) <= TOLERANCE[dtype]


def test_strided_rows_and_what_lies_beside_them() -> None:
    wide, out = random(1000, 2048, dtype=torch.bfloat16), torch.full((1001, 1100), 7.0, device="cuda").bfloat16()
    x, weight = wide[::2, 8:904], random(896, dtype=torch.bfloat16)
    y, rstd = fused.rmsnorm_forward(x, weight, EPS, out=out[:500, :896])
    assert torch.equal(y, fused.rmsnorm_forward(x.contiguous(), weight, EPS)[0])
    assert (out[500:] == 7).all() and (out[:, 896:] == 7).all()
    inputs = {"d_normed": random(500, 896, dtype=torch.bfloat16), "d_residual": random(500, 896, dtype=torch.bfloat16)}
    apart, partial = fused.rmsnorm_backward(x=x, rstd=rstd, weight=weight, **inputs)
    for name in inputs:
        copies = {key: value.clone() for key, value in inputs.items()}
        same, partial_too = fused.rmsnorm_backward(x=x, rstd=rstd, weight=weight, **copies, out=copies[name])
        assert torch.equal(same, apart)
        assert torch.equal(partial, partial_too)


@pytest.mark.parametrize("shape", [(16384, 896), (8192, 4096), (300, 5120)], ids=str)
def test_the_same_bits_each_time(shape: tuple[int, int]) -> None:
    residual, delta, d_normed = (random(*shape, dtype=torch.bfloat16) for _ in range(3))
    weight = random(shape[1], dtype=torch.bfloat16)

    def run() -> list[Tensor]:
        total, y, rstd = fused.add_rmsnorm_forward(residual, delta, weight, EPS)
        again = fused.rmsnorm_recompute(total, rstd, weight)
        assert torch.equal(again, y)
        dx, partial = fused.rmsnorm_backward(d_normed, total, rstd, weight, d_residual=residual)
        return [total, y, rstd, dx, fused.reduce_partials(partial, torch.float32)]

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("shape", [(1, 896), (760, 1128), (16384, 896), (8192, 4096)], ids=str)
def test_many_norms_and_one_reduction(shape: tuple[int, int]) -> None:
    """Parts in a buffer of the caller's, poisoned: the bits of each norm with a reduction of its own."""
    weight = random(shape[1], dtype=torch.bfloat16)
    norms = [(random(*shape, dtype=torch.bfloat16), random(*shape, dtype=torch.bfloat16)) for _ in range(3)]
    programs = fused.partial_programs(*shape, weight.device)
    partials, sums = torch.empty(3, programs, shape[1], device="cuda"), torch.ones(3, shape[1], device="cuda")
    for (d_normed, x), place in zip(norms, partials, strict=True):
        fused.rmsnorm_backward(d_normed, x, fused.rmsnorm_forward(x, weight, EPS)[1], weight, partial=place)
    together = fused.reduce_partials(partials, torch.float32)
    fused.reduce_partials(partials, torch.float32, out=sums, add=True)
    for (d_normed, x), ours, added in zip(norms, together, sums, strict=True):
        _, partial = fused.rmsnorm_backward(d_normed, x, fused.rmsnorm_forward(x, weight, EPS)[1], weight)
        assert torch.equal(ours, fused.reduce_partials(partial, torch.float32))
        assert torch.equal(added, ours + 1)


@pytest.mark.parametrize(("queries", "keys", "width"), [(14, 2, 64), (32, 8, 128), (8, 4, 256)])
@pytest.mark.parametrize("rows", [0, 1, 760, 8192])
def test_queries_and_keys_in_one_launch(rows: int, queries: int, keys: int, width: int) -> None:
    """The bits of two launches in the gradient, also over itself; weights' gradients as near to float64."""
    heads, split = queries + keys, (queries, keys)
    qkv, d_qkv = (random(rows, heads + keys, width, dtype=torch.bfloat16) for _ in range(2))
    weights = (random(width, dtype=torch.bfloat16), random(width, dtype=torch.bfloat16))
    x, before = qkv[:, :heads], d_qkv.clone()
    rstds = tuple(fused.rmsnorm_forward(part, weights[0], EPS)[1] for part in x.split(split, 1))
    apart, partials = fused.qk_rmsnorm_backward(d_qkv[:, :heads], x, rstds, weights, queries)
    places = [torch.full_like(partial, float("nan")) for partial in partials]
    over = d_qkv[:, :heads]
    fused.qk_rmsnorm_backward(over, x, rstds, weights, queries, out=over, partials=tuple(places))
    assert torch.equal(over, apart) and torch.equal(d_qkv[:, heads:], before[:, heads:])
    assert all(torch.equal(place, partial) for place, partial in zip(places, partials, strict=True))
    parts = (before[:, :heads].split(split, 1), x.split(split, 1), rstds, weights, apart.split(split, 1), partials)
    for d, part, rstd, weight, ours, partial in zip(*parts, strict=True):
        dx, alone = fused.rmsnorm_backward(d, part, rstd, weight)
        assert torch.equal(ours, dx)
        exact = (d.double() * part.double() * rstd.double().view(*part.shape[:2], 1)).sum((0, 1))
        sums = [fused.reduce_partials(one, torch.float32) for one in (partial, alone)]
        assert relative_error(sums[0], exact) <= 1.5 * relative_error(sums[1], exact) + 1e-6


@pytest.mark.parametrize("shape", [(0, 896), (0, 4, 64)], ids=str)
def test_no_rows(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = random(shape[-1], dtype=torch.bfloat16).requires_grad_()
    dx, d_weight = torch.autograd.grad(fused.rmsnorm(x, weight, EPS).sum(), (x, weight))
    assert dx.shape == shape
    assert (d_weight == 0).all()
