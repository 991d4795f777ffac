from __future__ import annotations

import torch

from chronicals.train.step import clip_scale


def test_clip_scale_is_torchs() -> None:
    for norm in (0.0, 0.5, 0.9999999, 1.0, 3.7, 1e20):
        weight = torch.zeros(1, requires_grad=True)
        weight.grad = torch.tensor([norm])
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        torch.testing.assert_close(clip_scale(torch.tensor(norm), 1.0) * norm, weight.grad[0])


def test_zero_clips_nothing() -> None:
    assert clip_scale(torch.tensor(1e9), 0.0) == 1
