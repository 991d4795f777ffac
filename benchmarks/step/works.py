"""What a training step is measured on: a model's shape, a batch's shape, tokens, and the FLOPs of it by formula.

Every arm gets the same checkpoint (random weights, made once for a run), the same batches and the same recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEARNING_RATE = 1e-5
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 0.0
MAX_GRAD_NORM = 1.0
BATCHES = 8  # distinct ones, taken in turn
SEED = 1

CLOCK = "from the end of one step to the end of the next on the device"  # how steps of these works are timed


@dataclass(frozen=True)
class Shape:
    """A Qwen2 decoder with tied embeddings and biases on q, k, v."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def config(self) -> dict[str, Any]:
        """As `config.json` says it."""
        return {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "use_cache": False,
        }

    @property
    def layer_weights(self) -> int:
        """Elements of one layer's matrices."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.hidden * (2 * queries + 2 * keys + 3 * self.intermediate)

    @property
    def parameters(self) -> int:
        """All of them, each once: tied embedding, matrices, biases, norms."""
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim
        return self.vocab * self.hidden + self.layers * (self.layer_weights + biases + 2 * self.hidden) + self.hidden


@dataclass(frozen=True)
class Work:
    """`documents` of `length` tokens each a step, all of them supervised."""

    name: str
    title: str
    shape: Shape
    documents: int
    length: int
    device: str = "cuda"
    warmup: int = 4
    timed: int = 24

    @property
    def tokens(self) -> int:
        """Of a step; all are real, as no document is padded."""
        return self.documents * self.length

    def flops(self) -> dict[str, float]:
        """Model FLOPs of a step, forward and backward, whatever is recomputed.

        A matrix: 6 FLOPs an element and token (2 forward, 4 backward). Causal attention: half of two matmuls of
        `2 * length * heads * head_dim` FLOPs a token forward and five backward, as FlashAttention counts them.
        """
        s = self.shape
        return {
            "matmul": 6.0 * self.tokens * s.layers * s.layer_weights,
            "head": 6.0 * self.tokens * s.hidden * s.vocab,
            "attention": 7.0 * self.tokens * s.layers * self.length * s.heads * s.head_dim,
        }


QWEN_05B = Shape(hidden=896, intermediate=4864, layers=24, heads=14, kv_heads=2, head_dim=64, vocab=151936)
TINY = Shape(hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=384)

WORKS = {
    work.name: work
    for work in (
        Work("full05", "Qwen2.5-0.5B, full, 8 x 2048", QWEN_05B, 8, 2048),
        Work("full05s", "Qwen2.5-0.5B, full, 4 x 512", QWEN_05B, 4, 512),
        Work("full05_16", "Qwen2.5-0.5B, full, 16 x 2048", QWEN_05B, 16, 2048),  # where a peer gains by larger batches
        Work("tiny", "two layers on a CPU, for the harness's own tests", TINY, 2, 48, "cpu", 1, 3),
    )
}


def batches(work: Work) -> list[Tensor]:
    """`BATCHES` of (documents, length) int64 token ids on the CPU.

    Log-uniform (Zipf-like), as real text repeats a few tokens often, which the embedding's gradient feels.
    """
    generator = torch.Generator().manual_seed(SEED)
    vocab, size = work.shape.vocab, (work.documents, work.length)
    draw = (torch.rand(size, generator=generator, dtype=torch.float64) for _ in range(BATCHES))
    return [(vocab**u - 1).long().clamp_(0, vocab - 1) for u in draw]
