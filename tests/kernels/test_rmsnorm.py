"""RMS norm: its reference, transformers' casts, ragged and strided inputs."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from chronicals.kernels.rmsnorm import add_rmsnorm_forward, rmsnorm, rmsnorm_reference
from tests.kernels.numerics import assert_matches


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 64), (3, 760), (5, 4, 33)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_matches_reference(dtype: torch.dtype, shape: tuple[int, ...], offset: float) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    assert_matches(
        lambda x, w: rmsnorm(x, w, 1e-3, offset), lambda x, w: rmsnorm_reference(x, w, 1e-3, offset), [x, weight]
    )


def test_strided_and_extreme_inputs() -> None:
    x = (torch.randn(9, 64) * torch.logspace(-12, 12, 9)[:, None])[::2, ::2]
    assert_matches(lambda x, w: rmsnorm(x, w, 1e-6), lambda x, w: rmsnorm_reference(x, w, 1e-6), [x, torch.randn(32)])


@pytest.mark.parametrize(("theirs", "offset"), [(LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0)])
def test_rounds_like_transformers_in_bfloat16(theirs: type, offset: float) -> None:
    norm = theirs(128, eps=1e-5).to(torch.bfloat16)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(40, 128, dtype=torch.bfloat16)
    assert torch.equal(rmsnorm(x, norm.weight, 1e-5, offset), norm(x))


def test_the_norm_of_a_sum_is_written_where_asked() -> None:
    residual, delta, wide = torch.randn(5, 8), torch.randn(5, 8), torch.full((5, 11), torch.nan)
    weight = torch.randn(8)
    expected = add_rmsnorm_forward(residual, delta, weight, 1e-6)
    found = add_rmsnorm_forward(residual, delta, weight, 1e-6, out=wide[:, :8])
    assert found[1].data_ptr() == wide.data_ptr() and bool(wide[:, 8:].isnan().all())
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
