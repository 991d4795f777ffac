"""docs/math/online-softmax.md, executed: the invariant, the merge, and the rounding bounds in float32."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

U = 2.0**-24  # unit roundoff of float32
C = 4.0  # torch's float32 exponential is within 2 ulp, 4 u
State = tuple[Tensor, Tensor, Tensor]  # m (), l (), o (D,)


def online(scores: Tensor, values: Tensor, block: int, *, rescale: bool = True) -> tuple[State, int]:
    """The recurrence over blocks, in the inputs' dtype; and R, how often the maximum rose after the first block."""
    m, total, out = scores.new_tensor(-math.inf), scores.new_zeros(()), values.new_zeros(values.shape[1])
    raised = 0
    for x, v in zip(scores.split(block), values.split(block), strict=True):
        new = torch.maximum(m, x.max())
        if new == -math.inf:
            continue
        raised += int(new > m and m > -math.inf)
        factor = torch.exp(m - new) if rescale else torch.ones_like(m)
        weights = torch.exp(x - new)
        total, out, m = factor * total + weights.sum(), factor * out + weights @ v, new
    return (m, total, out), raised


def exact(scores: Tensor, values: Tensor) -> State:
    """Invariant (I) in float64."""
    wide, m = scores.double(), scores.double().max()
    weights = torch.exp(wide - m)
    return m, weights.sum(), weights @ values.double()


def normal(n: int) -> Tensor:
    return torch.randn(n)


ROWS: dict[str, Callable[[int], Tensor]] = {
    "normal": normal,
    "rising": lambda n: torch.linspace(-30, 30, n) + 0.1 * torch.randn(n),  # every block raises the maximum
    "falling": lambda n: torch.linspace(30, -30, n),  # none does
    "large": lambda n: 1e4 * torch.randn(n),
    "equal": lambda n: torch.full((n,), 88.0),  # e^88 is the last that float32 holds: a sum without m would overflow
    "one beside dust": lambda n: torch.cat([torch.tensor([0.0]), torch.full((n - 1,), -16.0)]),
    "masked first": lambda n: torch.cat([torch.full((n // 2,), -math.inf), normal(n - n // 2)]),
    "masked last": lambda n: torch.cat([normal(n - n // 2), torch.full((n // 2,), -math.inf)]),
    "masked between": lambda n: normal(n).masked_fill(torch.arange(n) // 16 % 2 == 1, -math.inf),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("n", "block"), [(1, 16), (7, 16), (16, 16), (33, 16), (1000, 16), (1000, 128), (4096, 1)])
def test_within_the_rounding_bound(row: str, n: int, block: int) -> None:
    scores, values = ROWS[row](n), torch.randn(n, 3)
    if torch.isinf(scores).all():
        scores[-1] = 0.0
    (m, total, out), raised = online(scores, values, block)
    true_m, true_total, true_out = exact(scores, values)
    blocks = math.ceil(n / block)
    bound = (block + blocks + raised + C * (raised + 1) + math.log(n)) * U
    assert m == true_m
    assert abs(total.double() - true_total) <= bound * true_total + n * 2.0**-126
    lse, true_lse = (m + total.log()).double(), true_m + true_total.log()
    assert abs(lse - true_lse) <= bound + U * abs(true_lse) + C * U * abs(true_total.log()) + U
    size = (torch.exp(scores.double() - true_m) @ values.double().abs()) / true_total  # sum_j p_j |v_j|
    assert ((out / total).double() - true_out / true_total).abs().le((2 * bound + 2 * U) * size + 2.0**-120).all()


def test_the_bound_is_no_excuse() -> None:
    """It is small: no more than a few hundred roundings on a row of 4096, where nothing is known to be wrong."""
    block, blocks, raised = 64, 64, 63
    assert (block + blocks + raised + C * (raised + 1) + math.log(4096)) * U < 3e-5


@pytest.mark.parametrize("row", ["rising", "large"])
def test_without_rescaling_it_is_wrong(row: str) -> None:
    scores, values = ROWS[row](1000), torch.randn(1000, 3)
    (_, total, _), raised = online(scores, values, 16, rescale=False)
    assert raised > 1
    assert abs(total.double() - exact(scores, values)[1]) > 0.1


def merge(one: State, other: State) -> State:
    """The corollary's merge; the identity is (-inf, 0, 0)."""
    m = torch.maximum(one[0], other[0])
    if m == -math.inf:
        return one
    first, second = torch.exp(one[0] - m), torch.exp(other[0] - m)
    return m, first * one[1] + second * other[1], first * one[2] + second * other[2]


score = st.one_of(st.floats(-700, 700), st.just(-math.inf))


@settings(max_examples=60, deadline=None)
@given(st.lists(score, min_size=1, max_size=24), st.randoms(use_true_random=False))
def test_merging_in_any_order_and_grouping_is_the_whole(row: list[float], random: object) -> None:
    scores = torch.tensor(row, dtype=torch.float64)
    values = torch.arange(2.0 * len(row), dtype=torch.float64).view(-1, 2)
    parts: list[State] = [
        (x, torch.exp(x - x) if x > -math.inf else torch.zeros_like(x), v if x > -math.inf else torch.zeros_like(v))
        for x, v in zip(scores, values, strict=True)
    ]
    random.shuffle(parts)  # type: ignore[attr-defined]
    while len(parts) > 1:
        at = random.randrange(len(parts) - 1)  # type: ignore[attr-defined]
        parts[at : at + 2] = [merge(parts[at], parts[at + 1])]
    m, total, out = parts[0]
    if scores.max() == -math.inf:
        assert (m, total) == (-math.inf, 0)
        return
    for mine, true in zip((m, total, out), exact(scores, values), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)
