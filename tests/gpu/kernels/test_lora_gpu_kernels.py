"""LoRA's kernels on CUDA: adapters in their places, dropout's masks bit for bit and both its halves, DoRA's scales and
passes; no farther from float64 than eager PyTorch, the same bits again, under a graph."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from chronicals.kernels import dora
from chronicals.kernels.dora import DoRARows
from chronicals.kernels.lora import LoRADropout, Part, dropout_mask
from tests.kernels.numerics import nan_filled_memory, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    from chronicals.kernels.fused import dora as fused_dora
    from chronicals.kernels.fused.glu import glu_forward
    from chronicals.kernels.fused.lora_dropout import FusedLoRADropout
    from chronicals.kernels.fused.place_adapters import place_adapters

SEED, DTYPES = 1234, [torch.bfloat16, torch.float16, torch.float32]
QKV = [Part(0, 32, 0.5, 0), Part(32, 32, 0.5, 1), Part(64, 32, 0.5, 2)]
ODD = [Part(0, 7, 0.5, 9), Part(7, 130, 2.0, 10)]
HIGH = [Part(128 * n, 128, 0.5, n) for n in range(3)]  # a launch each
SHAPES = [
    (1, 896, QKV),
    (2048, 896, QKV),
    (777, 130, ODD),
    (2048, 4864, QKV[:1]),
    (4096, 896, QKV[:2]),
    (2048, 896, HIGH),
]


@pytest.fixture(autouse=True)
def _nan_filled_memory() -> Iterator[None]:
    with nan_filled_memory():
        yield


def inside(tensor: Tensor) -> Tensor:
    """The same numbers in a wider buffer of NaN, rows a multiple of 16 apart."""
    rows, columns = tensor.shape
    wide = tensor.new_full((rows, -(-columns // 16) * 16 + 32), float("nan"))
    wide[:, :columns] = tensor
    return wide[:, :columns]


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return inside(torch.randn(shape, device="cuda").to(dtype))


def counter(value: int = 3) -> Tensor:
    return torch.tensor([value], device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 6, 8, 32, 256])
def test_adapters_in_their_places(dtype: torch.dtype, rank: int) -> None:
    pairs = []
    for rows, columns in ((1152, 896), (9728, 896), (896, 4864)):
        joined = torch.full((rows + rank, columns + rank), 7.0, device="cuda").to(dtype)
        pairs.append((torch.randn(rank, columns, device="cuda").to(dtype), joined[rows:, :columns]))
        pairs.append((torch.randn(rows, rank, device="cuda").to(dtype), joined[:rows, columns:]))
        pairs.append((torch.zeros(rows, columns, device="cuda").to(dtype), joined[:rows, :columns]))
    place = place_adapters(pairs)
    place()
    assert all(torch.equal(source, there) for source, there in pairs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        place()
    for source, _ in pairs:
        source.normal_()
    graph.replay()
    assert all(torch.equal(source, there) for source, there in pairs)


@pytest.mark.parametrize("tokens", [1, 65, 2048, 16384])
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 31 / 32, 31 / 32 + 2**-15, 0.999])  # above 31/32 not in pairs
def test_masks_are_the_plain_ones(tokens: int, p: float) -> None:
    """A picks 64 columns, so that t is their part of the mask; and so is what is added to dx, of other columns none."""
    columns, first = 896, 448
    a = torch.zeros(64, columns, device="cuda").bfloat16()
    a[:, first : first + 64] = torch.eye(64)
    part, x = Part(0, 64, 1.0, 5), torch.ones(tokens, columns, device="cuda").bfloat16()
    ours = FusedLoRADropout([part], p, seed=SEED, device="cuda")
    out = ours.down(x, a, counter(), out=torch.empty(tokens, 64, device="cuda").bfloat16())
    keep = dropout_mask(tokens, columns, p, seed=SEED, stream=5, counter=counter())
    assert torch.equal(out != 0, keep[:, first : first + 64])
    dx, v = torch.zeros_like(x), torch.ones_like(out)
    ours.up_(dx, x, v, a, counter())
    assert torch.equal(dx[:, first : first + 64] != 0, keep[:, first : first + 64])
    assert int((dx != 0).sum()) == int(keep[:, first : first + 64].sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropout_both_halves(dtype: torch.dtype, normed: bool, shape: tuple[int, int, list[Part]]) -> None:
    tokens, columns, parts = shape
    rank = sum(part.rank for part in parts)
    x, dx, a, u = (
        random(*size, dtype=dtype) for size in ((tokens, columns), (tokens, columns), (rank, columns), (tokens, rank))
    )
    a.mul_(columns**-0.5)
    ours, plain = (make(parts, 0.1, seed=SEED, device="cuda") for make in (FusedLoRADropout, LoRADropout))
    out, eager = (random(tokens, rank, dtype=dtype) for _ in range(2))
    exact = plain.down(x.double(), a.double(), counter(), out=torch.zeros(tokens, rank, device="cuda").double())
    ours.down(x, a, counter(), out=out)
    plain.down(x, a, counter(), out=eager)
    assert relative_error(out, exact) <= 1.05 * relative_error(eager, exact) + 1e-6

    d_exact, d_eager, again = dx.double(), dx.clone(), dx.clone()
    factors = {}
    if normed:
        factors = {
            "rstd": torch.rand(tokens, device="cuda") + 0.5,
            "norm": torch.randn(columns, device="cuda").to(dtype),
        }
    exact = plain.up_(d_exact, x.double(), u.double(), a.double(), counter(), **factors).sum(1)
    eager = plain.up_(d_eager, x, u, a, counter(), **factors).sum(1)
    partials = ours.up_(dx, x, u, a, counter(), **factors)
    assert relative_error(dx, d_exact) <= 1.05 * relative_error(d_eager, d_exact) + 1e-6
    assert relative_error(partials.sum(1), exact) <= 1.05 * relative_error(eager, exact) + 1e-6
    assert torch.equal(ours.up_(again, x, u, a, counter(), **factors), partials) and torch.equal(again, dx)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 896, QKV[:1]), (777, 144, ODD), (2049, 4864, QKV[:1]), (512, 896, QKV)], ids=str)
def test_dropout_backward_through_a_glu(
    dtype: torch.dtype, activation: str, shape: tuple[int, int, list[Part]]
) -> None:
    tokens, columns, parts = shape
    rank = sum(part.rank for part in parts)
    sizes = ((tokens, 2 * columns), (tokens, columns), (rank, columns), (tokens, rank))
    gate_up, d, a, u = (random(*size, dtype=dtype) for size in sizes)
    a.mul_(columns**-0.5)
    ours, plain = (make(parts, 0.1, seed=SEED, device="cuda") for make in (FusedLoRADropout, LoRADropout))
    d_exact, d_eager, d_again = gate_up.double(), gate_up.clone(), torch.full_like(gate_up, float("nan"))

    def up_glu(op: LoRADropout, into: Tensor) -> Tensor:
        given = [x.to(into.dtype) for x in (d, gate_up, u, a)]
        return op.up_glu(given[0].clone(), given[1], activation, *given[2:], counter(), d_gate_up=into)

    exact, eager = up_glu(plain, d_exact).sum(1), up_glu(plain, d_eager).sum(1)
    partials = up_glu(ours, d_again)
    assert torch.equal(ours.up_glu(d.clone(), gate_up, activation, u, a, counter(), d_gate_up=gate_up), partials)
    assert torch.equal(gate_up, d_again)
    assert relative_error(gate_up, d_exact) <= 1.05 * relative_error(d_eager, d_exact) + 1e-6
    assert relative_error(partials.sum(1), exact) <= 1.05 * relative_error(eager, exact) + 1e-6


def test_dropout_under_a_graph_follows_the_counter() -> None:
    """Backward draws the masks of its forward, the next micro-batch others."""
    ours, now = FusedLoRADropout(QKV, 0.1, seed=SEED, device="cuda"), counter()
    x, a, u = (random(*size, dtype=torch.bfloat16) for size in ((2048, 896), (96, 896), (2048, 96)))
    out, dx = torch.empty(2048, 96, device="cuda").bfloat16(), torch.zeros_like(x)

    def micro() -> Tensor:
        dx.zero_()
        ours.down(x, a, now, out=out)
        partials = ours.up_(dx, x, u, a, now)
        now.add_(1)
        return partials

    micro()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        partials = micro()
    seen = []
    for step in range(2):
        now.fill_(10 + step)
        graph.replay()
        expected, d_expected = torch.empty_like(out), torch.zeros_like(x)
        ours.down(x, a, counter(10 + step), out=expected)
        assert torch.equal(ours.up_(d_expected, x, u, a, counter(10 + step)), partials)
        assert torch.equal(out, expected) and torch.equal(dx, d_expected)
        seen.append(out.clone())
    assert not torch.equal(*seen)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dora_scales(dtype: torch.dtype) -> None:
    targets = []
    for rows, columns, rank in ((896, 896, 32), (128, 896, 8), (4864, 896, 64), (896, 4864, 3)):
        weight, a = random(rows, columns, dtype=dtype), random(rank, columns, dtype=dtype)
        b, magnitude = torch.randn(rows, rank, device="cuda").to(dtype), torch.randn(rows, device="cuda")
        targets.append(DoRARows(weight, a, b, 0.1, magnitude, magnitude.clone(), magnitude.clone()))
    fused_dora.dora_scales(targets)()
    for ours in targets:
        c, inverse = (torch.zeros_like(ours.c, dtype=torch.float64) for _ in range(2))
        dora.dora_scales([DoRARows(ours.weight, ours.a, ours.b, ours.scaling, ours.magnitude, c, inverse)])()
        assert relative_error(ours.c, c) < 1e-5 and relative_error(ours.inverse_norm, inverse) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 33), (777, 1152), (2048, 9728)], ids=str)
def test_dora_passes(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    z, d, c = random(*shape, dtype=dtype), random(*shape, dtype=dtype), torch.randn(shape[1], device="cuda")
    bias = torch.randn(shape[1], device="cuda").to(dtype)
    d_exact, d_eager, again = d.double(), d.clone(), d.clone()
    exact = dora.dora_backward(d_exact, z.double(), c.double(), c.double(), out=d_exact, bias=bias.double()).sum(0)
    dora.dora_backward(d_eager, z, c, c, out=d_eager, bias=bias)
    partials = fused_dora.dora_backward(d, z, c, c, out=d, bias=bias)
    scale = (again.double().abs() * z.double().abs()).sum(0).mul(c.double().abs()).norm()  # a sum may cancel
    assert (partials.double().sum(0) - exact).norm() < 1e-5 * scale
    assert relative_error(d, d_exact) <= 1.05 * relative_error(d_eager, d_exact) + 1e-6
    over_z = z.clone()
    assert torch.equal(fused_dora.dora_backward(again, over_z, c, c, out=over_z, bias=bias), partials)
    assert torch.equal(over_z, d)
    y_exact, y_eager = (dora.scale_columns_(y, c.to(y.dtype), bias.to(y.dtype)) for y in (z.double(), z.clone()))
    unscaled = z.clone()
    fused_dora.scale_columns_(z, c, bias)
    assert relative_error(z, y_exact) <= 1.05 * relative_error(y_eager, y_exact) + 1e-6
    if shape[1] % 2 == 0:
        product = fused_dora.scaled_glu_forward_(unscaled, c, bias, "silu")
        assert torch.equal(unscaled, z) and torch.equal(product, glu_forward(z, "silu"))
