"""The references' gradients against finite differences in float64; those of the loss, rope and the embedding are with
their ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from chronicals.kernels.attention import varlen_attention_reference
from chronicals.kernels.glu import glu_reference
from chronicals.kernels.rmsnorm import rmsnorm_reference


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 5)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(shape: tuple[int, ...], offset: float) -> None:
    assert gradcheck(lambda x, w: rmsnorm_reference(x, w, 1e-3, offset), (double(*shape), double(shape[-1])))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_glu(activation: str) -> None:
    assert gradcheck(lambda x: glu_reference(x, activation), (double(4, 10),))


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"softcap": 0.7}, {"scale": 0.3, "softcap": 2.0}], ids=str)
def test_attention(options: dict[str, float]) -> None:
    """Grouped heads; documents of length 1 and 0."""
    bounds = torch.tensor([0, 4, 4, 5, 9], dtype=torch.int32)
    inputs = double(9, 2, 3), double(9, 1, 3), double(9, 1, 3)
    assert gradcheck(lambda q, k, v: varlen_attention_reference(q, k, v, bounds, 5, **options), inputs)
