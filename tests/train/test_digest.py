from __future__ import annotations

import pytest
import torch

from chronicals.train import digest as module
from chronicals.train.digest import digest

SIZES = (1, 7, 65_535, 65_536, 65_537, 300_001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_one_changed_element_changes_it(dtype: torch.dtype) -> None:
    for size in SIZES:
        tensor = torch.randint(0, 100, (size,)).to(dtype)
        before = digest(tensor)
        for index in {0, size // 2, size - 1}:
            changed = tensor.clone()
            changed[index] += 1
            assert digest(changed) != before, (size, index)


def test_changes_that_keep_the_sum_are_seen() -> None:
    tensor = torch.ones(200_000)
    bits = tensor.view(torch.int32)
    before = digest(tensor)
    for plus, minus in ((0, 1), (5, 70_000), (3, 3 + 65_536)):
        bits[plus] += 1
        bits[minus] -= 1
        assert digest(tensor) != before
        bits[plus] -= 1
        bits[minus] += 1
    # +1 -1 -1 +1 at indices whose counters cancel
    for index, sign in ((0, 1), (3, 1), (1, -1), (2, -1)):
        bits[index] += sign
    assert digest(tensor) != before


def test_equal_elements_in_another_order_differ() -> None:
    a, b = torch.zeros(140_000), torch.zeros(140_000)
    a[10], b[10 + 65_536] = 1.0, 1.0
    assert digest(a) != digest(b)


def test_same_for_views_and_for_any_number_of_blocks_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(600, 700)
    assert digest(tensor.t().contiguous().t()) == digest(tensor)
    assert digest(tensor[100:400]) == digest(tensor[100:400].clone())
    before = digest(tensor)
    monkeypatch.setitem(module._BLOCKS_PER_PASS, "cpu", 3)
    assert digest(tensor) == before
