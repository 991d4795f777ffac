from __future__ import annotations

import math

import torch

from chronicals.train.step import clip_scale, tensor_norms


def test_norms_are_float32_whatever_the_dtype() -> None:
    """bf16 sums would stop growing at 256 ones."""
    tensors = [torch.ones(1000, dtype=torch.bfloat16), torch.full((3, 4), 2.0), torch.zeros(5)]
    norms = tensor_norms(tensors)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, torch.tensor([math.sqrt(1000), math.sqrt(48), 0.0]))


def test_clip_scale_is_torchs() -> None:
    for norm in (0.0, 0.5, 0.9999999, 1.0, 3.7, 1e20):
        weight = torch.zeros(1, requires_grad=True)
        weight.grad = torch.tensor([norm])
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        torch.testing.assert_close(clip_scale(torch.tensor(norm), 1.0) * norm, weight.grad[0])


def test_zero_clips_nothing() -> None:
    assert clip_scale(torch.tensor(1e9), 0.0) == 1
