"""A model and chats to train on a GPU; and memory: a test marked `large(gib)` has that much of it. It is skipped on a
smaller GPU, and fails, instead of being skipped, on a busy one."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import transformers

from tests.train import helpers

GIB = 2**30


@pytest.fixture(autouse=True)
def _room(request: pytest.FixtureRequest) -> None:
    mark = request.node.get_closest_marker("large")
    if mark is None or not torch.cuda.is_available():
        return
    (gib,) = mark.args
    gc.collect()
    torch.cuda.empty_cache()
    free, total = (size / GIB for size in torch.cuda.mem_get_info())
    if total < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, this GPU has {total:.0f}")
    # not a skip: it would hide what nobody ran
    assert free >= gib, f"needs {gib} GiB of GPU memory, {free:.0f} are free; run it alone, as make gpu-test does"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose heads are wide enough for FlashAttention, and chats of which some are long."""
    size = helpers.make_tokenizer(tmp_path / "model")
    config = transformers.Qwen2Config(
        vocab_size=size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    helpers.make_chats(tmp_path / "chats.jsonl", rows=400)
    return tmp_path
