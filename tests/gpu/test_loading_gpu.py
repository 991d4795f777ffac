"""Weights on their way to a GPU: all of them arrive, and nothing but one buffer lies beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from chronicals.models import shards
from chronicals.models.config import ModelConfig
from chronicals.models.decoder import Decoder
from chronicals.models.hf import load_model, save_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100_003,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loading_takes_the_parameters_and_one_buffer(dtype: torch.dtype, tmp_path: Path) -> None:
    saved = Decoder(ModelConfig.from_hf(CONFIG), device="cuda", dtype=torch.bfloat16)
    saved.init_weights(0)
    save_model(saved, tmp_path)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]  # asked for, not what the allocator rounds up to
    loaded = load_model(tmp_path, dtype=dtype, device="cuda")
    size = sum(parameter.nbytes for parameter in loaded.parameters())
    converted = 0 if dtype == torch.bfloat16 else shards.BUFFER  # pieces change their dtype on the GPU
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    assert peak - before <= size + converted + 2**20
    for (name, ours), theirs in zip(loaded.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(dtype)), name
