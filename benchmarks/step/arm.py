"""What a training step is asked of, ours or a peer's, and the recipe that all share.

An arm is built from a checkpoint's folder and then only steps: it copies batch `index` to the device, forward,
backward, clip to `MAX_GRAD_NORM`, AdamW. Nothing is read back in a step; what the gate asks for is read afterwards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.step.works import Work


@dataclass(frozen=True)
class Spec:
    """One arm by name: whose step, in which precision, with what options."""

    family: str  # "ours", "eager", "compile", "liger", "unsloth"
    precision: str = "bf16"  # bf16: weights, gradients and moments; fp32: master weights and moments in float32
    options: Mapping[str, str] | None = None
    about: str = ""  # for the table, where the name does not say it


class Arm(ABC):
    """A model that is ready for its first step."""

    work: Work

    @abstractmethod
    def step(self, index: int) -> None:
        """Train on batch `index % BATCHES`."""

    @abstractmethod
    def loss(self) -> float:
        """Of the last step: mean over supervised tokens."""

    @abstractmethod
    def grad_norm(self) -> float:
        """Of the last step, before clipping."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Live weights by Hugging Face name; a tied head is not repeated."""

    def check_gradients(self) -> dict[str, float]:
        """Raise AssertionError where gradients are wrong; what was seen. Peers are held by the other gates alone."""
        return {}

    def facts(self) -> dict[str, str]:
        """What was chosen, for the record: recompute, attention, compile mode."""
        return {}


def build(spec: Spec, work: Work, folder: Path) -> Arm:
    """The arm in this process. A peer's library is imported here and by nobody else."""
    if spec.family == "ours":
        from benchmarks.step.ours import Ours

        return Ours(spec, work, folder)
    from benchmarks.peers.models import PEERS

    return PEERS[spec.family](spec, work, folder)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


ARMS: dict[str, Spec] = {
    "ours": Spec("ours"),
    "ours_varlen": Spec("ours", options={"attention": "torch"}, about="attention by torch's FlashAttention-2"),
    "ours_less": Spec("ours", options={"recompute": "mlp", "layers": "6"}, about="the MLP of 6 layers recomputed"),
    "ours_least": Spec("ours", options={"recompute": "full"}, about="every layer recomputed"),
    "ours_none": Spec("ours", options={"recompute": "none"}, about="recompute: none"),
    "unsloth": Spec("unsloth"),
    "unsloth_graphs": Spec("unsloth", options={"graphs": "1"}, about="UNSLOTH_BLOCK_CUDAGRAPHS=1"),
    "liger": Spec("liger"),
    "compile": Spec("compile"),
    "compile_graphs": Spec("compile", options={"mode": "reduce-overhead"}, about='mode="reduce-overhead"'),
    "eager": Spec("eager"),
}
ARMS |= {
    f"{name}_fp32": Spec(ARMS[name].family, "fp32", ARMS[name].options, ARMS[name].about)
    for name in ("ours", "unsloth", "liger", "compile", "eager")
}
