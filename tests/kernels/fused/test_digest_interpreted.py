"""Digests of many tensors under the interpreter: the bits that operations on whole tensors give."""

from __future__ import annotations

import pytest
import torch

from chronicals.kernels.fused import digest as fused
from chronicals.kernels.fused.digest import BLOCK, TILE, Digests
from chronicals.train import digest as plain

SIZES = [1, 7, TILE - 1, TILE, TILE + 16, BLOCK, BLOCK + 1, 2 * BLOCK + TILE + 5, 0, 3]


def some(size: int, dtype: torch.dtype) -> torch.Tensor:
    bits = torch.randint(-(2**63), 2**63 - 1, (size,), dtype=torch.int64)
    return bits.view(dtype)[:size].clone() if size else torch.empty(0, dtype=dtype)


def test_the_constants_are_those_of_the_definition() -> None:
    assert (fused.BLOCK, fused.MIX) == (plain._BLOCK, plain._MIX)
    assert {size: str(kind) for size, kind in fused.BITS.items()} == {
        size: str(kind).removeprefix("torch.") for size, kind in plain._BITS_OF_SIZE.items()
    }


@pytest.mark.parametrize(
    "dtypes", [[torch.bfloat16], [torch.uint8, torch.float32, torch.float16, torch.int64]], ids=str
)
def test_the_same_bits_as_by_whole_tensors(dtypes: list[torch.dtype]) -> None:
    tensors = [some(size, dtypes[i % len(dtypes)]) for i, size in enumerate(SIZES)]
    measure = Digests(tensors)
    sized = [t for t in tensors if len(t)]
    expected = iter(plain.plain_digests(sized).tolist())
    assert measure(tensors).tolist() == [next(expected) if len(t) else 0 for t in tensors]
    moved = [t.clone() for t in tensors]
    moved[3][TILE // 2] += 1
    changed = measure(moved) != measure(tensors)
    assert changed.tolist() == [i == 3 for i in range(len(tensors))]


def test_views_that_are_not_contiguous() -> None:
    tensors = [torch.randn(40, 33).t(), torch.randn(70, 48)[1:9], torch.randn(64, 32)]
    assert Digests(tensors)(tensors).tolist() == plain.plain_digests(tensors).tolist()
