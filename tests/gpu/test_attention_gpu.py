"""Packed attention, the loss and the whole decoder on CUDA, against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

from chronicals.kernels.attention import varlen_attention, varlen_attention_reference
from chronicals.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from chronicals.models.config import ModelConfig
from chronicals.models.decoder import Decoder
from tests.kernels.numerics import assert_matches, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# FlashAttention rounds probabilities to the inputs' dtype
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
BOUNDS = [0, 0, 1, 130, 130, 137, 512, 760, 760, 760]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [(4, 4), (14, 2)])
@pytest.mark.parametrize("options", [{}, {"window": 1}, {"window": 64}, {"window": 9999}, {"scale": 0.3}], ids=str)
def test_attention_matches_reference(dtype: torch.dtype, heads: tuple[int, int], options: dict[str, float]) -> None:
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32, device="cuda")
    q, k, v = (torch.randn(760, n, 64, device="cuda").to(dtype) for n in (heads[0], heads[1], heads[1]))
    assert_matches(
        lambda q, k, v: varlen_attention(q, k, v, cu_seqlens, 512, **options),
        lambda q, k, v: varlen_attention_reference(q, k, v, cu_seqlens, 512, **options),
        [q, k, v],
        tolerance=TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_takes_slices_of_a_fused_projection(dtype: torch.dtype) -> None:
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32, device="cuda")
    qkv = torch.randn(760, 8, 64, device="cuda").to(dtype)

    def of_slices(fused: torch.Tensor, attention: object) -> torch.Tensor:
        return attention(*fused.split((4, 2, 2), dim=1), cu_seqlens, 512)

    assert_matches(
        lambda x: of_slices(x, varlen_attention),
        lambda x: of_slices(x, varlen_attention_reference),
        [qkv],
        tolerance=TOLERANCE[dtype],
    )


def test_soft_cap_in_float32_and_refused_in_half_precision() -> None:
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32, device="cuda")
    q, k, v = (torch.randn(760, n, 64, device="cuda") for n in (4, 2, 2))
    assert_matches(
        lambda q, k, v: varlen_attention(q, k, v, cu_seqlens, 512, softcap=2.0),
        lambda q, k, v: varlen_attention_reference(q, k, v, cu_seqlens, 512, softcap=2.0),
        [q, k, v],
        tolerance=1e-5,
    )
    with pytest.raises(ValueError, match="or run in float32"):
        varlen_attention(*(x.bfloat16() for x in (q, k, v)), cu_seqlens, 512, softcap=2.0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_loss_matches_reference(dtype: torch.dtype) -> None:
    hidden = torch.randn(512, 128, device="cuda").to(dtype)
    weight = (0.2 * torch.randn(5000, 128, device="cuda")).to(dtype)
    rows = torch.arange(0, 512, 3, dtype=torch.int32, device="cuda")
    targets = torch.randint(5000, (len(rows),), device="cuda").where(rows < 400, -100)
    rows = rows.where(rows < 400, 512)
    scale = torch.full((1,), 1 / 134, device="cuda")
    options = {"label_smoothing": 0.1, "z_loss": 1e-3}
    assert_matches(
        lambda h, w: linear_cross_entropy(h, w, rows, targets, scale, chunk_rows=64, **options),
        lambda h, w: linear_cross_entropy_reference(h, w, rows, targets, scale.double(), **options),
        [hidden, weight],
        tolerance=TOLERANCE[dtype],
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_decoder_on_cuda_is_the_decoder_on_the_cpu(dtype: torch.dtype, tolerance: float) -> None:
    config = ModelConfig.from_hf(
        {
            "model_type": "qwen3",
            "vocab_size": 512,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "initializer_range": 0.1,
        }
    )
    lengths = torch.tensor(BOUNDS).diff()
    tokens = torch.randint(512, (760,))
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    hidden = {}
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        model = Decoder(config, device=device, dtype=kind)
        model.init_weights(0)
        with torch.no_grad():
            hidden[device] = model(tokens.to(device), positions.to(device), cu_seqlens.to(device), 512)
    assert hidden["cuda"].dtype == dtype
    assert relative_error(hidden["cuda"].cpu(), hidden["cpu"]) < tolerance
