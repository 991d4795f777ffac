"""Digests on CUDA: the bits that the CPU finds, and no wait for the device."""

from __future__ import annotations

import pytest
import torch

from chronicals.train.digest import digests_for, plain_digests

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = [1, 7, 896, 65_536, 65_537, 4_358_144, 9_000_001]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.int64], ids=str)
def test_the_same_bits_as_on_the_cpu(dtype: torch.dtype) -> None:
    tensors = [torch.randint(0, 250, (size,)).to(dtype) for size in SIZES]
    on_gpu = [tensor.cuda() for tensor in tensors]
    measure = digests_for(on_gpu)
    assert measure is not plain_digests
    found = measure(on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = measure(on_gpu)
        on_gpu[2][800] += 1
        changed = measure(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.tolist() == again.tolist() == plain_digests(tensors).tolist()
    assert (changed != found).tolist() == [i == 2 for i in range(len(SIZES))]


def test_views_that_are_not_contiguous() -> None:
    tensors = [torch.randn(40, 33, device="cuda").t(), torch.randn(70, 48, device="cuda")[1:9]]
    assert digests_for(tensors)(tensors).tolist() == plain_digests(tensors).tolist()
