"""The tools of the kernel tests do what they say."""

from __future__ import annotations

import torch

from tests.kernels.numerics import nan_filled_memory


def test_new_memory_is_nan_inside_only() -> None:
    like = torch.zeros(3, 4)
    with nan_filled_memory():
        for fresh in (torch.empty(9), torch.empty_like(like), like.new_empty(5, dtype=torch.bfloat16)):
            assert fresh.isnan().all()
        assert (torch.empty(4, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert not torch.are_deterministic_algorithms_enabled()
