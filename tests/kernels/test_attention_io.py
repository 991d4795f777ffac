"""docs/math/attention.md, executed: tiled attention with every word counted that enters or leaves fast memory."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from chronicals.kernels.attention import varlen_attention_reference


@dataclass
class FastMemory:
    """What the algorithm holds at a time, and what it moved to hold it, in words."""

    loaded: int = 0
    stored: int = 0
    peak: int = 0
    held: dict[str, int] = field(default_factory=dict)

    def load(self, name: str, tensor: Tensor) -> Tensor:
        self.loaded += tensor.numel()
        return self.make(name, tensor.clone())

    def make(self, name: str, tensor: Tensor) -> Tensor:
        """A result made inside; it takes the place of what had its name."""
        self.held[name] = tensor.numel()
        self.peak = max(self.peak, sum(self.held.values()))
        return tensor

    def store(self, tensor: Tensor) -> Tensor:
        self.stored += tensor.numel()
        return tensor

    def clear(self) -> None:
        self.held.clear()

    @property
    def traffic(self) -> int:
        return self.loaded + self.stored


def block_sizes(n: int, d: int, m: int) -> tuple[int, int]:
    """B_r, B_c of the theorem."""
    columns = min(d, m // (8 * d))
    return min(n, (m - 2 * columns * d) // (2 * d + columns + 2)), columns


def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, fast: FastMemory, m: int, *, causal: bool = False, window: int | None = None
) -> Tensor:
    """One head of one document, (N, d) each, through a fast memory of `m` words."""
    n, d = q.shape
    rows, columns = block_sizes(n, d, m)
    out = torch.full_like(q, float("nan"))
    for top in range(0, n, rows):
        end = min(top + rows, n)
        fast.clear()
        queries, accumulated = fast.load("q", q[top:end] * d**-0.5), fast.make("out", q.new_zeros(end - top, d))
        peak, total = (fast.make(name, q.new_full((end - top, 1), x)) for name, x in (("m", -math.inf), ("l", 0.0)))
        first = 0 if window is None else max(0, top - window + 1) // columns * columns
        for left in range(first, end if causal else n, columns):
            keys, values = (fast.load(name, x[left : left + columns]) for name, x in (("k", k), ("v", v)))
            scores = fast.make("s", queries @ keys.T)
            distance = torch.arange(top, end)[:, None] - torch.arange(left, left + len(keys))
            if causal:
                scores[distance < 0] = -math.inf
            if window is not None:
                scores[distance >= window] = -math.inf
            new = torch.maximum(peak, scores.amax(1, keepdim=True))
            shift = torch.where(new == -math.inf, 0.0, new)  # rows that have seen masked scores only
            factor, scores = torch.exp(peak - shift), torch.exp(scores - shift)
            total, peak = factor * total + scores.sum(1, keepdim=True), new
            accumulated = factor * accumulated + scores @ values
        out[top:end] = fast.store(accumulated / total)
    return out


def qkv(n: int, d: int) -> list[Tensor]:
    return [torch.randn(n, d, dtype=torch.float64) for _ in range(3)]


def traffic(n: int, d: int, m: int, **options: object) -> FastMemory:
    fast = FastMemory()
    tiled_attention(*qkv(n, d), fast, m, **options)  # type: ignore[arg-type]
    return fast


GRID = [
    (n, d, m)
    for n in (33, 100, 257)
    for d in (1, 4, 16, 32)
    for m in (8 * d, 13 * d, 40 * d, d * d, 4 * d * d, n * d // 3, n * d)
    if 8 * d <= m <= n * d and (n / block_sizes(n, d, m)[0]) * (n / block_sizes(n, d, m)[1]) < 2000  # steps to walk
]


@pytest.mark.parametrize(("n", "d", "m"), sorted(set(GRID)))
def test_traffic_is_the_formula_within_the_bounds(n: int, d: int, m: int) -> None:
    q, k, v = qkv(n, d)
    fast = FastMemory()
    out = tiled_attention(q, k, v, fast, m)
    torch.testing.assert_close(out, ((q @ k.T) * d**-0.5).softmax(1) @ v)
    assert fast.peak <= m, "it fits"
    rows, _ = block_sizes(n, d, m)
    assert fast.traffic == 2 * n * d + 2 * n * d * math.ceil(n / rows)
    order = n**2 * d**2 / m
    assert fast.traffic <= 31 * order
    assert fast.traffic >= (4 * order if rows < n else 4 * n * d)


def reads_of_keys(n: int, d: int, m: int) -> int:
    """What grows with the square: K and V in, without Q in and O out."""
    return traffic(n, d, m).traffic - 2 * n * d


def test_the_square_of_n_and_d_over_m() -> None:
    n, d, m = 512, 16, 2560
    base = reads_of_keys(n, d, m)
    assert reads_of_keys(2 * n, d, m) / base == pytest.approx(4, rel=0.05)
    assert reads_of_keys(n, d, 2 * m) / base == pytest.approx(1 / 2, rel=0.2)
    assert reads_of_keys(n, 2 * d, m) / base == pytest.approx(4, rel=0.25)


def test_less_than_the_scores_alone_where_memory_holds_a_block() -> None:
    n, d = 1024, 16
    assert traffic(n, d, 16 * d * d).traffic < 2 * n * n / 2, "half of one pass over them, there and back"


def reference(q: Tensor, k: Tensor, v: Tensor, bounds: list[int], window: int | None = None) -> Tensor:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    return varlen_attention_reference(*(x.unsqueeze(1) for x in (q, k, v)), cu_seqlens, 0, window=window).squeeze(1)


@pytest.mark.parametrize("n", [33, 500])
def test_causal_loads_half(n: int) -> None:
    d, m = 8, 512
    q, k, v = qkv(n, d)
    fast = FastMemory()
    torch.testing.assert_close(tiled_attention(q, k, v, fast, m, causal=True), reference(q, k, v, [0, n]))
    rows, columns = block_sizes(n, d, m)
    ends = [min(n, top + rows) for top in range(0, n, rows)]
    assert fast.traffic == 2 * n * d + 2 * d * sum(min(n, math.ceil(end / columns) * columns) for end in ends)
    if n == 500:
        assert (fast.traffic - 2 * n * d) / reads_of_keys(n, d, m) == pytest.approx(0.5, abs=0.05)


def test_a_window_makes_it_linear() -> None:
    d, m, window = 8, 512, 20
    q, k, v = qkv(300, d)
    fast = FastMemory()
    out = tiled_attention(q, k, v, fast, m, causal=True, window=window)
    torch.testing.assert_close(out, reference(q, k, v, [0, 300], window))
    rows, columns = block_sizes(300, d, m)
    assert fast.traffic <= 2 * 300 * d + 2 * d * math.ceil(300 / rows) * (window + rows + columns)
    twice = traffic(600, d, m, causal=True, window=window)
    assert twice.traffic == pytest.approx(2 * fast.traffic, rel=0.05)


def test_packed_documents_are_separate_problems() -> None:
    d, m, bounds = 8, 512, [0, 100, 101, 300]
    q, k, v = qkv(300, d)
    fast = FastMemory()
    out = [tiled_attention(q[a:b], k[a:b], v[a:b], fast, m, causal=True) for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(torch.cat(out), reference(q, k, v, bounds))
    assert fast.traffic < 0.7 * traffic(300, d, m, causal=True).traffic
