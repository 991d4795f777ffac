"""A small model and real text to train it on: JSONL rows become documents, a BPE is trained on them, weights are drawn.

Every string of a row, joined by line breaks, is one document; every twentieth row is held out. Weights are written in
bfloat16, so that a run in any dtype starts from the same numbers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer

from benchmarks.step.run import machine

HELD_OUT = 20  # one row in so many
PAD, END = "<|endoftext|>", "<|im_end|>"  # transformers adds the first to a Qwen2 tokenizer that lacks it


@dataclass(frozen=True)
class Shape:
    """Of the model, and of the vocabulary."""

    layers: int = 8
    hidden: int = 512
    intermediate: int = 1408
    heads: int = 8
    kv_heads: int = 4
    vocab: int = 8192


def measured_where(command: str, device: str, commit: str | None) -> dict[str, Any]:
    """The machine, its versions, the commit and the command, as every result has them."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return machine([], commit) | {"gpu": gpu, "command": command}


def write_text(folder: Path, data: Path, rows: int | None = None) -> None:
    """`train.jsonl` and `eval.jsonl` from the first `rows` rows of `data`."""
    lines = data.read_text(encoding="utf-8").splitlines()[:rows]
    texts = ["\n".join(value for value in json.loads(line).values() if isinstance(value, str)) for line in lines]
    for name, held_out in (("train", False), ("eval", True)):
        chosen = [text for i, text in enumerate(texts) if (i % HELD_OUT == 0) == held_out]
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen), encoding="utf-8")


def make_tokenizer(text: Path, vocab: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab` entries, trained on `train.jsonl` or its like."""
    texts = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab, special_tokens=[PAD, END], show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token=PAD, eos_token=END)


def write_model(
    folder: Path, shape: Shape, seed: int, tokenizer: transformers.PreTrainedTokenizerFast
) -> transformers.Qwen2ForCausalLM:
    """A random Qwen2 with bfloat16's numbers and its tokenizer, written into `folder`; returns it."""
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
