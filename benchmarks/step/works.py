"""What a training step is measured on: a model's shape, a batch's shape, tokens, and the FLOPs of it by formula.

Every arm gets the same checkpoint (random weights, made once for a run), the same batches and the same recipe; where an
adapter is trained, the same adapter too (adapters.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 0.0
MAX_GRAD_NORM = 1.0
BATCHES = 8  # distinct ones, taken in turn
SEED = 1

CLOCK = "from the end of one step to the end of the next on the device"  # how steps of these works are timed


@dataclass(frozen=True)
class Shape:
    """A decoder: Qwen2 with biases on q, k, v, or Llama without biases."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    family: str = "qwen2"
    tied: bool = True
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6

    def config(self) -> dict[str, Any]:
        """As `config.json` says it."""
        architectures = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
        return {
            "model_type": self.family,
            "architectures": [architectures[self.family]],
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
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied,
            "use_cache": False,
        }

    def projections(self) -> dict[str, tuple[int, int]]:
        """Name of each matrix of a layer -> (in, out)."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (self.hidden, queries),
            "self_attn.k_proj": (self.hidden, keys),
            "self_attn.v_proj": (self.hidden, keys),
            "self_attn.o_proj": (queries, self.hidden),
            "mlp.gate_proj": (self.hidden, self.intermediate),
            "mlp.up_proj": (self.hidden, self.intermediate),
            "mlp.down_proj": (self.intermediate, self.hidden),
        }

    @property
    def layer_weights(self) -> int:
        """Elements of one layer's matrices."""
        return sum(wide * high for wide, high in self.projections().values())

    @property
    def parameters(self) -> int:
        """All of them, each once: embedding, a head of its own, matrices, biases, norms."""
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim if self.family == "qwen2" else 0
        embeddings = (1 if self.tied else 2) * self.vocab * self.hidden
        return embeddings + self.layers * (self.layer_weights + biases + 2 * self.hidden) + self.hidden


@dataclass(frozen=True)
class Lora:
    """Adapters of all seven projections of every layer."""

    rank: int
    alpha: float

    def layer_weights(self, shape: Shape) -> int:
        """Elements of one layer's adapters."""
        return sum(self.rank * (wide + high) for wide, high in shape.projections().values())


@dataclass(frozen=True)
class Work:
    """`documents` of `length` tokens each a step, all of them supervised.

    `lora`: adapters are trained and the model is frozen. `least_memory`: every arm checkpoints its layers,
    or computes their MLPs again, and offloads what is kept where it can.
    """

    name: str
    title: str
    shape: Shape
    documents: int
    length: int
    device: str = "cuda"
    warmup: int = 4
    timed: int = 24
    lora: Lora | None = None
    least_memory: bool = False

    @property
    def tokens(self) -> int:
        """Of a step; all are real, as no document is padded."""
        return self.documents * self.length

    @property
    def learning_rate(self) -> float:
        return 1e-4 if self.lora else 1e-5

    def flops(self) -> dict[str, float]:
        """Model FLOPs of a step, forward and backward, whatever is recomputed.

        A matrix: 6 FLOPs an element and token (2 forward, 4 backward), 4 where it is frozen. Causal attention: half of
        two matmuls of `2 * length * heads * head_dim` FLOPs a token forward and five backward, as FlashAttention counts
        them.
        """
        s, each = self.shape, 4.0 if self.lora else 6.0
        found = {
            "matmul": each * self.tokens * s.layers * s.layer_weights,
            "head": each * self.tokens * s.hidden * s.vocab,
            "attention": 7.0 * self.tokens * s.layers * self.length * s.heads * s.head_dim,
        }
        if self.lora:
            found["adapters"] = 6.0 * self.tokens * s.layers * self.lora.layer_weights(s)
        return found


QWEN_05B = Shape(hidden=896, intermediate=4864, layers=24, heads=14, kv_heads=2, head_dim=64, vocab=151936)
LLAMA_8B = Shape(4096, 14336, 32, 32, 8, 128, 128256, family="llama", tied=False, rope_theta=5e5, rms_norm_eps=1e-5)
TINY = Shape(hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=384)
TINY_LLAMA = Shape(64, 96, 2, 4, 2, 16, 384, family="llama", tied=False)
RANK_32 = Lora(rank=32, alpha=32.0)

WORKS = {
    work.name: work
    for work in (
        Work("full05", "Qwen2.5-0.5B, full, 8 x 2048", QWEN_05B, 8, 2048),
        Work("full05s", "Qwen2.5-0.5B, full, 4 x 512", QWEN_05B, 4, 512),
        Work("full05_16", "Qwen2.5-0.5B, full, 16 x 2048", QWEN_05B, 16, 2048),  # where a peer gains by larger batches
        Work("tiny", "two layers on a CPU, for the harness's own tests", TINY, 2, 48, "cpu", 1, 3),
        Work("lora05", "Qwen2.5-0.5B, LoRA of rank 32, 8 x 2048", QWEN_05B, 8, 2048, lora=RANK_32),
        Work("lora05s", "Qwen2.5-0.5B, LoRA of rank 32, 4 x 512", QWEN_05B, 4, 512, lora=RANK_32),
        Work("lora8b", "Llama-3.1-8B, LoRA of rank 32, 4 x 2048", LLAMA_8B, 4, 2048, timed=8, lora=RANK_32),
        Work(
            "lora8bck",
            "Llama-3.1-8B, LoRA of rank 32, 4 x 2048, least memory",
            LLAMA_8B,
            4,
            2048,
            timed=8,
            lora=RANK_32,
            least_memory=True,
        ),
        Work("tiny_lora", "LoRA of two layers on a CPU, the same", TINY, 2, 48, "cpu", 1, 3, lora=Lora(4, 8.0)),
        Work(
            "tiny_llama",
            "the same beside a head of its own",
            TINY_LLAMA,
            2,
            48,
            "cpu",
            1,
            3,
            lora=Lora(4, 8.0),
            least_memory=True,
        ),
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
