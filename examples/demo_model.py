"""The demo's model: a byte-level BPE tokenizer trained on the demo's text, and a small Qwen2 with random weights.

Both are made with transformers alone: to Chronicals they are a checkpoint like any other.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

VOCABULARY = 2048
HIDDEN, LAYERS, HEADS, KEY_VALUE_HEADS = 128, 4, 4, 2


def train_tokenizer(chats: Path) -> PreTrainedTokenizerBase:
    """Qwen2's own pre-tokenizer, its merges learnt from `chats`; the markers of ChatML are single tokens."""
    rows = map(json.loads, chats.read_text(encoding="utf-8").splitlines())
    texts = (message["content"] for row in rows for message in row["messages"])
    markers = ["<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer().train_new_from_iterator(
        texts, vocab_size=VOCABULARY, new_special_tokens=markers, show_progress=False
    )


def write_base_model(folder: Path, chats: Path, seed: int = 42) -> None:
    """A model folder as a user would download it: tokenizer, config.json, weights."""
    tokenizer = train_tokenizer(chats)
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    Qwen2ForCausalLM(config).save_pretrained(folder)
