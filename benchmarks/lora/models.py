"""Models and settings of the LoRA kernels' figures, and weights that every process draws alike, by name.

The claims name three models and no batch; so ranks, batches and lengths are swept and the ratios averaged, as the
claims are averages. Everything is float16, as theirs was.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.step.works import LLAMA_8B, TINY_LLAMA, Lora, Shape, Work
from chronicals.models.layer import Recompute

RECOMPUTE: Recompute = "mlp"  # of both rows of ours, in every setting: time and memory are of the same passes


@dataclass(frozen=True)
class Model:
    """One model, and what was claimed for it: direction -> (times as fast, share of the peak memory saved)."""

    title: str
    shape: Shape
    claims: dict[str, tuple[float, float]]
    device: str = "cuda"
    sweep: tuple[tuple[int, int, int], ...] = tuple(itertools.product((8, 32), (1, 4), (512, 2048)))

    def works(self, rank: int) -> Iterator[Work]:
        """One for each setting (rank, documents, length) of this rank, the largest last."""
        for setting in sorted(setting for setting in self.sweep if setting[0] == rank):
            yield self.work(*setting)

    def work(self, rank: int, documents: int, length: int) -> Work:
        title = f"rank {rank}, {documents} x {length}"
        return Work(title, title, self.shape, documents, length, self.device, lora=Lora(rank, float(rank)))

    def gate(self, rank: int) -> Work:
        """Where values are compared: the smallest setting of this rank."""
        return self.work(*min(setting for setting in self.sweep if setting[0] == rank))

    @property
    def ranks(self) -> list[int]:
        return sorted({rank for rank, _, _ in self.sweep})

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.device == "cuda" else torch.float32


MODELS: dict[str, Model] = {
    "smollm2_135m": Model(
        "SmolLM2-135M",
        Shape(576, 1536, 30, 9, 3, 64, 49152, family="llama", rope_theta=1e5, rms_norm_eps=1e-5),
        {"forward": (1.48, 0.382), "backward": (1.15, 0.389)},
    ),
    "smollm2_1.7b": Model(
        "SmolLM2-1.7B",
        Shape(2048, 8192, 24, 32, 32, 64, 49152, family="llama", rope_theta=1.3e5, rms_norm_eps=1e-5),
        {"forward": (1.46, 0.346), "backward": (1.25, 0.359)},
    ),
    "llama3_8b": Model("Llama-3.1-8B", LLAMA_8B, {"forward": (1.48, 0.257), "backward": (1.25, 0.259)}),
}
TINY = Model(
    "two layers on a CPU, for the harness's own tests",
    TINY_LLAMA,
    {"forward": (1.0, 0.0), "backward": (1.0, 0.0)},
    "cpu",
    ((4, 1, 32), (8, 2, 16)),
)
DIRECTIONS = ("forward", "backward")


def fill(tensors: dict[str, Tensor]) -> None:
    """Draws each tensor by its Hugging Face or PEFT name, on its device: the same in every process of a machine."""
    for name, tensor in tensors.items():
        generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode()))
        drawn = torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)
        if "lora_A" in name:
            bound = tensor.shape[1] ** -0.5
            drawn.uniform_(-bound, bound, generator=generator)
        else:
            drawn.normal_(float("norm" in name), 0.02, generator=generator)
        tensor.copy_(drawn.half())  # what float16 holds, whoever computes with it
