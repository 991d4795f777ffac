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
    folder: Path  # the checkpoint's

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
        """All that is trained, live, by Hugging Face name (an adapter's by PEFT's); a tied head is not repeated."""

    def started_from(self) -> Path:
        """The safetensors with the values that `weights` had before the first step."""
        return self.folder / "model.safetensors"

    def check_gradients(self) -> dict[str, float]:
        """Raise AssertionError where gradients are wrong; what was seen. Peers are held by the other gates alone."""
        return {}

    def facts(self) -> dict[str, str]:
        """What was chosen, for the record: recompute, attention, compile mode."""
        return {}


def build(spec: Spec, work: Work, folder: Path) -> Arm:
    """The arm in this process. A peer's library is imported here and by nobody else."""
    if spec.family == "ours":
        from benchmarks.step.ours import Ours, OursWithAdapter

        return (OursWithAdapter if work.lora else Ours)(spec, work, folder)
    from benchmarks.peers.adapters import PEERS_WITH_ADAPTER
    from benchmarks.peers.models import PEERS

    return (PEERS_WITH_ADAPTER if work.lora else PEERS)[spec.family](spec, work, folder)


def arms_of(work: Work) -> Mapping[str, Spec]:
    """What can be measured on it, by name."""
    return LORA_ARMS if work.lora else ARMS


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


def _also_wide(arms: dict[str, Spec], names: tuple[str, ...]) -> dict[str, Spec]:
    """With `name_fp32` for each of `names`: masters and moments in float32."""
    return arms | {f"{n}_fp32": Spec(arms[n].family, "fp32", arms[n].options, arms[n].about) for n in names}


ARMS = _also_wide(ARMS, ("ours", "unsloth", "liger", "compile", "eager"))

# of works that train an adapter; `variant` is one of adapters.py
LORA_ARMS: dict[str, Spec] = {
    "ours": Spec("ours"),
    "ours_varlen": ARMS["ours_varlen"],
    **{
        f"ours_mlp{n}": Spec(
            "ours",
            options={"recompute": "mlp", "layers": str(n)},
            about=f"the MLP of {n} layer{'s' * (n > 1)} recomputed",
        )
        for n in (1, 2, 4, 8, 10, 12)
    },
    "ours_none": ARMS["ours_none"],
    "ours_least": ARMS["ours_least"],
    "ours_dropout": Spec("ours", options={"variant": "dropout"}, about="dropout 0.05"),
    "ours_bias": Spec("ours", options={"variant": "bias"}, about="biases trained"),
    "ours_dora": Spec("ours", options={"variant": "dora"}, about="DoRA"),
    "ours_dora_dropout": Spec("ours", options={"variant": "dora_dropout"}, about="DoRA, dropout 0.05"),
    "ours_qlora": Spec("ours", options={"variant": "nf4"}, about="QLoRA: frozen weights in NF4"),
    **{name: ARMS[name] for name in ("unsloth", "unsloth_graphs", "liger", "compile", "compile_graphs", "eager")},
}
LORA_ARMS = _also_wide(LORA_ARMS, ("ours", "unsloth", "liger", "compile", "eager"))
