"""The gradient norm on the CPU; the GPU's is held to the same reference in tests/gpu/kernels/test_adamw_gpu.py."""

from __future__ import annotations

import torch

from chronicals.kernels.adamw import grad_norm_reference
from chronicals.optim.grad_norm import grad_norm_for


def test_norms_of_each_and_all() -> None:
    fused = torch.randn(48, 16).bfloat16()
    tensors = [*fused.split([32, 8, 8]), torch.randn(7), torch.randn(3, 5, dtype=torch.float16), torch.zeros(4)]
    measure = grad_norm_for(tensors)
    for scale in (1.0, 3.0):
        scaled = [t * scale for t in tensors]
        norms, total = measure(scaled)
        exact, exact_total = grad_norm_reference(scaled)
        assert norms.dtype == total.dtype == torch.float32 and norms.shape == (6,) and total.shape == ()
        torch.testing.assert_close(norms.double(), exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(total.double(), exact_total, rtol=1e-6, atol=0)


def test_what_is_not_finite_is_told_apart() -> None:
    tensors = [torch.ones(16), torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")])]
    norms, total = grad_norm_for(tensors)(tensors)
    assert norms[0] == 4 and norms[1].isnan() and norms[2].isinf() and total.isnan()
