"""A tiny model, a small chat set, and a config for both: what the tests of training share."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from chronicals.config import TrainConfig
from chronicals.train.trainer import Trainer, TrainResult

WORDS = "the sun set over quiet hills while rivers sang of rain and old friends walked home".split()


def make_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer without merges, with ChatML's markers; returns its size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    fast.add_tokens(["<|im_start|>"], special_tokens=True)
    fast.save_pretrained(folder)
    return len(fast)


def make_model(
    folder: Path,
    *,
    vocab_size: int | None = None,
    tie: bool = True,
    dtype: torch.dtype = torch.float32,
    hidden_size: int = 32,
    intermediate_size: int = 48,
) -> Path:
    """A folder with a random Qwen2 of two layers and its tokenizer."""
    size = make_tokenizer(folder)
    config = transformers.Qwen2Config(
        vocab_size=vocab_size or size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def make_chats(file: Path, rows: int = 60, seed: int = 0) -> Path:
    """Chats of many lengths, as JSON lines."""
    rng = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    turns = [
        [{"role": "user", "content": words(4)}, {"role": "assistant", "content": words(8)}] * rng.randint(1, 2)
        for _ in range(rows)
    ]
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return file


def make_config(folder: Path, **values: Any) -> TrainConfig:
    """A short run of the model in `folder / "model"` on `folder / "chats.jsonl"`, float32 on the CPU."""
    defaults = {
        "base_model": str(folder / "model"),
        "chat_template": "chatml",
        "datasets": [{"path": str(folder / "chats.jsonl")}],
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_processes": 1,
        "sequence_len": 128,
        "micro_batch_size": 2,
        "learning_rate": 1e-3,
        "device": "cpu",
        "output_dir": str(folder / "out"),
    }
    return TrainConfig(**defaults | values)


def run(config: TrainConfig, **options: Any) -> tuple[TrainResult, str]:
    """Train; the result and what was printed."""
    text = io.StringIO()
    result = Trainer(config, console=Console(file=text, width=80)).train(**options)
    return result, text.getvalue()


def rows(config: TrainConfig) -> list[dict[str, Any]]:
    """`metrics.jsonl` without the columns that depend on the clock."""
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    clock = ("tokens_per_second", "step_ms", "peak_memory_gib")
    return [{key: value for key, value in json.loads(line).items() if key not in clock} for line in lines]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")
