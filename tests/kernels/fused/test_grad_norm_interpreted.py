"""Gradient norms under the interpreter: ragged sizes, mixed dtypes, other addresses, what is not finite."""

from __future__ import annotations

import pytest
import torch

from chronicals.kernels.adamw import grad_norm_reference
from chronicals.kernels.fused import grad_norm
from chronicals.kernels.fused.grad_norm import TILE, GradNorm

SIZES = [1, 7, 33, 760, TILE, TILE + 1, 2 * TILE + 16, 0]


def test_norms_of_each_and_all() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensors = [torch.randn(size).to(dtype) for size in SIZES]
        norms, total = GradNorm(tensors)(tensors)
        exact, exact_total = grad_norm_reference(tensors)
        torch.testing.assert_close(norms.double(), exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(total.double(), exact_total, rtol=1e-6, atol=0)


def test_more_tensors_than_a_block_and_mixed_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grad_norm, "REDUCE", 16)
    tensors = [torch.full((1 + i % 3,), 1.0 + i, dtype=(torch.float32, torch.bfloat16)[i % 2]) for i in range(35)]
    measure = GradNorm(tensors)
    norms, total = measure(tensors)
    exact, exact_total = grad_norm_reference(tensors)
    torch.testing.assert_close(norms.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(total.double(), exact_total, rtol=1e-6, atol=0)


def test_views_and_new_addresses() -> None:
    fused = torch.randn(40, 24)
    views = list(fused.split([24, 8, 8]))  # as Hugging Face names the parts of a fused weight
    measure = GradNorm(views)
    measure(views)
    other = [2 * view.clone() for view in views]
    torch.testing.assert_close(measure(other)[0], torch.stack([2 * view.norm() for view in views]))
    odd = torch.randn(961)[1:].view(40, 24)
    odd_views = list(odd.split([24, 8, 8]))
    torch.testing.assert_close(measure(odd_views)[0], torch.stack([view.norm() for view in odd_views]))


def test_what_is_not_finite_is_told_apart() -> None:
    tensors = [torch.ones(16), torch.ones(33), torch.ones(7)]
    tensors[1][32], tensors[2][0] = float("nan"), 1e25
    norms, total = GradNorm(tensors)(tensors)
    assert norms[0] == 4 and norms[1].isnan() and norms[2].isinf() and total.isnan()
