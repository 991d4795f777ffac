"""Adapters put in their places by one launch, interpreted: every word's width, ragged tiles, nothing else touched."""

from __future__ import annotations

import weakref

import pytest
import torch

from chronicals.kernels.fused.place_adapters import TILE, place_adapters

# columns of a buffer and of its adapters' A, so that words are of 8, 4 and 2 bytes, and of a float32's halves
SIZES = [(64, 32, 8), (64, 32, 4), (62, 30, 2), (61, 29, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pairs_of_all_shapes(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    wide, columns, rank = size
    joined = [torch.full((TILE // 4 + 70, wide), 7.0, dtype=dtype) for _ in range(2)]
    pairs = []
    for u in joined:
        n = len(u) - rank
        pairs.append((torch.randn(rank, columns).to(dtype), u[n:, :columns]))
        pairs.append((torch.randn(n - 5, rank).to(dtype), u[: n - 5, columns : columns + rank]))
    place = place_adapters(pairs)
    for _ in range(2):
        place()
        for source, there in pairs:
            assert torch.equal(source, there)
            there.fill_(7.0)
        assert all((u == 7).all() for u in joined)
        for source, _ in pairs:
            source.normal_()


def test_tiles_wider_than_high() -> None:
    u = torch.zeros(3, 3 * TILE + 8)
    a = torch.randn(2, 2 * TILE + 4)
    place_adapters([(a, u[1:, 4 : 2 * TILE + 8])])()
    assert torch.equal(u[1:, 4 : 2 * TILE + 8], a)
    assert u.count_nonzero() == a.count_nonzero()


def test_nothing_to_place() -> None:
    place_adapters([])()
    place_adapters([(torch.empty(0, 4), torch.empty(0, 4))])()


def test_a_plan_keeps_what_it_has_the_addresses_of() -> None:
    source, place = torch.ones(2, 4), torch.zeros(2, 4)
    alive = weakref.ref(source), weakref.ref(place)
    plan = place_adapters([(source, place)])
    del source, place
    assert all(one() is not None for one in alive)
    del plan
    assert all(one() is None for one in alive)
