"""On CUDA: whatever forms a layer's projections have, gradients have the same bits whether the GLU's product is kept or
made again. There are as many rows as Hopper's kernels ask for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chronicals.adapters.lora import adapter_tensors, add_lora, dropout_counter
from chronicals.kernels.glu_matmul import MatmulThenGLU
from chronicals.kernels.ops import fused
from chronicals.models.config import ModelConfig
from chronicals.models.decoder import Decoder
from chronicals.models.layer import Recompute
from tests.adapters.test_glu_choice import CASES
from tests.gpu.test_fused_decoder_gpu import MODELS, SIZES
from tests.kernels.numerics import torch_deterministic

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = (1000, 1, 807, 500)


def model_of(case: str) -> Decoder:
    """bf16, every adapter away from zero; the same numbers at every call."""
    lora, options, _ = CASES[case]
    ops = fused(head_dim=64, deterministic=True)
    model = Decoder(ModelConfig.from_hf(SIZES | MODELS["qwen2"]), ops, device="cuda", dtype=torch.bfloat16)
    model.init_weights(0)
    add_lora(model, lora, **options)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in adapter_tensors(model).items():
        if "lora_" in name and "magnitude" not in name:
            tensor.copy_(0.05 * torch.randn(tensor.shape, generator=generator))
    dropout_counter(model).fill_(3)
    return model


def gradients(model: Decoder, recompute: Recompute) -> dict[str, Tensor]:
    model.set_recompute(recompute)
    model.zero_grad()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (sum(LENGTHS),), generator=generator)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
    hidden = model(tokens.cuda(), positions.cuda(), bounds.cuda(), max(LENGTHS))
    (hidden.float() * torch.randn(hidden.shape, generator=generator).cuda()).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
def test_the_product_again_has_forwards_bits(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses a matmul under determinism
    model = model_of(case)
    kind = type(model.ops.glu_matmul) if CASES[case][2] else MatmulThenGLU
    assert {type(layer._halves[1].glu.matmul) for layer in model.layers} == {kind}
    with torch_deterministic():
        expected = gradients(model, "none")
        for recompute in ("light", "mlp"):
            found = gradients(model, recompute)
            assert found.keys() == expected.keys()
            different = [name for name, gradient in expected.items() if not torch.equal(found[name], gradient)]
            assert different == [], recompute
