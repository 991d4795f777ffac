"""Dropout of one adapter's input, interpreted: the plain masks bit for bit, whatever the strides."""

from __future__ import annotations

import pytest
import torch

from chronicals.kernels import lora
from chronicals.kernels.fused.dropout import dropout
from tests.kernels.numerics import inside


@pytest.mark.parametrize("size", [(0, 8), (1, 1), (37, 72), (16, 128), (33, 300)], ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**40 + 7, 2**63 + 12345])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masks_and_values_are_the_plain_ones(size: tuple[int, int], seed: int, dtype: torch.dtype) -> None:
    x, counter = inside(torch.rand(size).add_(0.5).to(dtype)), torch.tensor(2**31 + 5)
    for stream in (0, 1, 167):
        ours, plain = (op(x, 0.3, seed=seed, stream=stream, counter=counter) for op in (dropout, lora.dropout))
        assert torch.equal(ours != 0, plain != 0)
        torch.testing.assert_close(ours, plain, rtol=1e-6 if dtype == torch.float32 else 1e-3, atol=0)
        assert ours.is_contiguous()
    if x.numel() > 1000:
        assert 0.25 < (ours == 0).float().mean() < 0.35


@pytest.mark.parametrize(
    "counter", [torch.tensor(5.0), torch.tensor(5, dtype=torch.int32), torch.tensor([5, 6])], ids=str
)
def test_the_counter_is_one_int64(counter: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        dropout(torch.ones(2, 8), 0.3, seed=0, stream=0, counter=counter)
