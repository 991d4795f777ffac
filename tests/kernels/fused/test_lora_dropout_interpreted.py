"""Dropout of adapters' inputs, interpreted: the plain masks bit for bit, both halves near the plain ones in float64."""

from __future__ import annotations

import pytest
import torch

from chronicals.kernels.fused import lora_dropout as fused
from chronicals.kernels.fused.glu import glu_forward
from chronicals.kernels.lora import LoRADropout, Part, dropout_mask, threshold
from tests.kernels.numerics import inside, relative_error

SEED, COUNTER = 2**63 + 12345, torch.tensor([7])
PARTS = [Part(0, 8, 2.0, 5), Part(8, 3, 0.5, 6), Part(11, 17, 1.0, 2**20)]
SIZES = [(1, 64), (37, 72), (64, 130)]


def pair(parts: list[Part], p: float, seed: int = SEED) -> tuple[LoRADropout, LoRADropout]:
    return fused.FusedLoRADropout(parts, p, seed=seed, device="cpu"), LoRADropout(parts, p, seed=seed, device="cpu")


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.75])
def test_masks_are_the_plain_ones(size: tuple[int, int], p: float) -> None:
    """With A the identity, t is the mask."""
    tokens, columns = size
    x, a = torch.ones(tokens, columns), torch.eye(columns)
    part = Part(0, columns, 1.0, 9)
    ours, plain = pair([part], p)
    out = ours.down(x, a, COUNTER, out=torch.empty(tokens, columns))
    keep = dropout_mask(tokens, columns, p, seed=SEED, stream=9, counter=7)
    assert torch.equal(out, keep * torch.tensor(plain.factor))
    assert 0 < keep.sum() < keep.numel()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_both_halves(size: tuple[int, int], count: int, dtype: torch.dtype) -> None:
    (tokens, columns), parts = size, PARTS[:count]
    rank = sum(part.rank for part in parts)
    x, dx = (inside(torch.randn(tokens, columns).to(dtype)) for _ in range(2))
    a, u = inside(torch.randn(rank, columns).to(dtype)), inside(torch.randn(tokens, rank).to(dtype))
    ours, plain = pair(parts, 0.3)
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3}[dtype]

    out = inside(torch.full((tokens, rank), float("nan"), dtype=dtype))
    exact = plain.down(x.double(), a.double(), COUNTER, out=torch.zeros(tokens, rank, dtype=torch.float64))
    copy = inside(torch.full((tokens, rank), float("nan"), dtype=dtype))
    assert ours.down(x, a, COUNTER, out=out, copy=copy) is out
    assert relative_error(out, exact) < tolerance
    assert torch.equal(copy, out)

    d_exact = dx.double()
    partials = plain.up_(d_exact, x.double(), u.double(), a.double(), COUNTER)
    again = dx.clone()
    parts_of_a = ours.up_(dx, x, u, a, COUNTER)
    assert relative_error(dx, d_exact) < tolerance
    assert parts_of_a.dtype == torch.float32 and parts_of_a.shape[::2] == (rank, columns)
    assert relative_error(parts_of_a.sum(1), partials.sum(1)) < tolerance
    assert torch.equal(ours.up_(again, x, u, a, COUNTER), parts_of_a) and torch.equal(again, dx)
    alone = ours.up_(None, x, u, a, COUNTER)  # cut otherwise where one pass would have made both
    assert relative_error(alone.sum(1), partials.sum(1)) < tolerance


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_where_x_is_what_a_norm_read(count: int, read: bool, dtype: torch.dtype) -> None:
    (tokens, columns), parts = (37, 72), PARTS[:count]
    rank = sum(part.rank for part in parts)
    ours, plain = pair(parts, 0.3)
    sizes = ((tokens, columns), (tokens, columns), (rank, columns), (tokens, rank))
    x, dx, a, v = (inside(torch.randn(size).to(dtype)) for size in sizes)
    rstd, norm = torch.rand(tokens) + 0.5, (torch.rand(columns) + 0.5).to(dtype)
    exact = plain.up_(dx.double(), (x * rstd[:, None]).double() * norm, v.double(), a.double(), COUNTER)
    without = dx.clone()
    ours.up_(without, x, v, a, COUNTER)
    partials = ours.up_(dx if read else None, x, v, a, COUNTER, rstd=rstd, norm=norm)
    assert relative_error(partials.sum(1), exact.sum(1)) < {torch.float32: 1e-6, torch.float16: 1e-3}[dtype]
    assert torch.equal(dx, without) == read


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("count", "most", "size"),
    [
        (1, fused.MOST_RANKS, (64, 256)),
        (2, fused.MOST_RANKS, (64, 256)),
        (3, fused.MOST_RANKS, (64, 256)),
        (3, 16, (64, 256)),  # a launch each, which begin at other rows of A
        (2, fused.MOST_RANKS, (37, 256)),  # whole ranks, but tokens or columns are not
        (2, fused.MOST_RANKS, (64, 250)),
    ],
)
def test_whole_tiles(
    monkeypatch: pytest.MonkeyPatch, count: int, most: int, size: tuple[int, int], normed: bool
) -> None:
    """Without an edge, nothing is masked: the same as with one, but for how sums are cut."""
    monkeypatch.setattr(fused, "MOST_RANKS", most)
    (tokens, columns), parts = size, [Part(16 * n, 16, 2.0 / (n + 1), n) for n in range(count)]
    ours, plain = pair(parts, 0.3)
    sizes = ((tokens, columns), (tokens, columns), (16 * count, columns), (tokens, 16 * count))
    x, dx, a, v = (inside(torch.randn(size).half()) for size in sizes)
    exact = plain.down(x.double(), a.double(), COUNTER, out=torch.zeros(tokens, 16 * count, dtype=torch.float64))
    out = torch.full((tokens, 16 * count), float("nan"), dtype=torch.float16)
    assert relative_error(ours.down(x, a, COUNTER, out=out), exact) < 1e-3
    factors = {"rstd": torch.rand(tokens) + 0.5, "norm": (torch.rand(columns) + 0.5).half()} if normed else {}
    d_exact = dx.double()
    partials = plain.up_(d_exact, x.double(), v.double(), a.double(), COUNTER, **factors)
    tolerance = 1e-3 if normed else 1e-6  # v / rms is rounded
    assert relative_error(ours.up_(None, x, v, a, COUNTER, **factors).sum(1), partials.sum(1)) < tolerance
    assert relative_error(ours.up_(dx, x, v, a, COUNTER, **factors).sum(1), partials.sum(1)) < tolerance
    assert relative_error(dx, d_exact) < 1e-3


@pytest.mark.parametrize(
    ("p", "pairs"), [(0.0, True), (0.05, True), (31 / 32, True), (31 / 32 + 2**-15, False), (0.999, False)]
)
def test_bits_are_compared_in_pairs_up_to_infinity(p: float, pairs: bool) -> None:
    """Every limit so far, as a number of 16 bits, divides all patterns as the integer does; the next is NaN."""
    assert fused.takes_pairs(torch.device("cuda"), p) == pairs
    assert not fused.takes_pairs(torch.device("cpu"), p)
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    limit = torch.tensor([threshold(p)], dtype=torch.int32).to(torch.uint16).view(torch.float16)
    kept = ~(patterns.view(torch.float16).abs() < limit)  # greater, equal or not a number
    assert torch.equal(kept, patterns.int() % 2**15 >= threshold(p)) == pairs


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("most", [fused.MOST_RANKS, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_up_through_a_glu(
    monkeypatch: pytest.MonkeyPatch, activation: str, in_place: bool, most: int, dtype: torch.dtype
) -> None:
    """In one launch, and where it takes several; the product's bits are those of the GLU's own pass."""
    monkeypatch.setattr(fused, "MOST_RANKS", most)
    (tokens, columns), parts = (37, 80), PARTS[:2]
    gate_up, d, a, u = (
        inside(torch.randn(size).to(dtype))
        for size in ((tokens, 2 * columns), (tokens, columns), (11, columns), (tokens, 11))
    )
    ours, plain = pair(parts, 0.3)
    assert len(fused.in_launches(parts)) == (2 if most == 16 else 1)
    d_exact, d_eager = gate_up.double(), gate_up.clone()
    exact = plain.up_glu(d.double(), gate_up.double(), activation, u.double(), a.double(), COUNTER, d_gate_up=d_exact)
    eager = plain.up_glu(d.clone(), gate_up, activation, u, a, COUNTER, d_gate_up=d_eager)
    passes, d_passes = glu_forward(gate_up, activation), d.clone()
    partials_of_passes = ours.up_(d_passes, passes, u, a, COUNTER)

    d_gate_up = gate_up if in_place else inside(torch.full_like(gate_up, float("nan")))
    partials = ours.up_glu(d, gate_up, activation, u, a, COUNTER, d_gate_up=d_gate_up)
    assert relative_error(partials.sum(1), partials_of_passes.sum(1)) < 1e-6  # of the same product, rounded
    assert relative_error(partials.sum(1), exact.sum(1)) <= 1.05 * relative_error(eager.sum(1), exact.sum(1)) + 1e-6
    assert relative_error(d_gate_up, d_exact) <= 1.05 * relative_error(d_eager, d_exact) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_high_ranks_go_in_pieces(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """In several launches, of which dx is rounded once."""
    monkeypatch.setattr(fused, "MOST_RANK", 16)
    monkeypatch.setattr(fused, "MOST_RANKS", 32)
    parts = [Part(0, 40, 2.0, 5), Part(40, 16, 0.5, 6)]
    assert [[(piece.start, piece.rank) for piece in launch] for launch in fused.in_launches(parts)] == [
        [(0, 16), (16, 16)],
        [(32, 8), (40, 16)],
    ]
    ours, plain = pair(parts, 0.3)
    x, dx, a, u = (inside(torch.randn(size).to(dtype)) for size in ((20, 72), (20, 72), (56, 72), (20, 56)))
    out = torch.empty(20, 56, dtype=dtype)
    exact = plain.down(x.double(), a.double(), COUNTER, out=torch.zeros(20, 56, dtype=torch.float64))
    assert relative_error(ours.down(x, a, COUNTER, out=out), exact) < {torch.float32: 1e-6, torch.float16: 1e-3}[dtype]
    d_exact = dx.double()
    partials = plain.up_(d_exact, x.double(), u.double(), a.double(), COUNTER)
    assert relative_error(ours.up_(dx, x, u, a, COUNTER).sum(1), partials.sum(1)) < 1e-6
    assert relative_error(dx, d_exact) <= 1.05 * relative_error(d_exact.to(dtype), d_exact) + 1e-6


def test_no_tokens() -> None:
    ours, _ = pair(PARTS[:1], 0.3)
    x, a, u = torch.empty(0, 64), torch.randn(8, 64), torch.empty(0, 8)
    ours.down(x, a, COUNTER, out=torch.empty(0, 8))
    assert (ours.up_(x.clone(), x, u, a, COUNTER).sum(1) == 0).all()
    gate_up = torch.empty(0, 128)
    assert (ours.up_glu(x.clone(), gate_up, "silu", u, a, COUNTER, d_gate_up=gate_up).sum(1) == 0).all()
