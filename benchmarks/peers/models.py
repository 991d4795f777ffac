"""Peers in the common loop: transformers as it is, compiled, with Liger's kernels, and Unsloth.

Each is set up by its own documentation for full fine-tuning where memory suffices: no gradient checkpointing, fused
AdamW, bf16 weights; with precision fp32 the weights are float32 and the step runs under bf16 autocast, as
`TrainingArguments(bf16=True)` does it. Attention is what each library takes without FlashAttention installed.

Left out: FlashAttention-4 in transformers, which its 5.17 does not offer for this model; Liger under `torch.compile`,
which dies with an illegal memory access.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.step.arm import Arm, Spec
from benchmarks.step.works import BATCHES, BETAS, EPS, MAX_GRAD_NORM, WEIGHT_DECAY, Work, batches


class Eager(Arm):
    """transformers and torch's fused AdamW, nothing else."""

    def __init__(self, spec: Spec, work: Work, folder: Path) -> None:
        self.spec, self.work, self.folder = spec, work, folder
        self.dtype = torch.float32 if spec.precision == "fp32" or work.device == "cpu" else torch.bfloat16
        self.model = self.load()
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        wrong = sum(p.numel() for p in self.parameters if p.dtype != self.dtype)
        assert wrong < 0.01 * sum(p.numel() for p in self.parameters), f"{wrong} weights are not {self.dtype}"
        checkpoints = any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())
        assert checkpoints == work.least_memory, f"gradient checkpointing is {'on' if checkpoints else 'off'}"
        self.run = self.prepared()
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=work.learning_rate, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.batches = [self._pinned(batch) for batch in batches(work)]
        self.last: tuple[Tensor, Tensor]

    def _pinned(self, batch: Tensor) -> Tensor:
        return batch.pin_memory() if self.work.device == "cuda" else batch

    def load(self) -> Any:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype, attn_implementation="sdpa")
        return model.to(self.work.device)

    def prepared(self) -> Any:
        """What is called in a step."""
        return self.model

    def autocast(self) -> Any:
        mixed = self.spec.precision == "fp32" and self.work.device == "cuda"
        return torch.autocast("cuda", torch.bfloat16) if mixed else nullcontext()

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean loss over supervised tokens."""
        with self.autocast():
            return self.run(input_ids=tokens, labels=tokens).loss

    def step(self, index: int) -> None:
        tokens = self.batches[index % BATCHES].to(self.work.device, non_blocking=True)
        loss = self.forward(tokens)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.last = (loss.detach(), norm)

    def loss(self) -> float:
        return float(self.last[0])

    def grad_norm(self) -> float:
        return float(self.last[1])

    def weights(self) -> dict[str, Tensor]:
        return {name.removeprefix("_orig_mod."): p.detach() for name, p in self.model.named_parameters()}

    def facts(self) -> dict[str, str]:
        return {"attention": str(getattr(self.model.config, "_attn_implementation", "")), "recompute": self.recompute()}

    def recompute(self) -> str:
        return "every layer" if self.work.least_memory else "none"


class Compiled(Eager):
    """transformers under `torch.compile`, static shapes."""

    def prepared(self) -> Any:
        options = self.spec.options or {}
        return torch.compile(self.model, dynamic=False, mode=options.get("mode"))

    def step(self, index: int) -> None:
        torch.compiler.cudagraph_mark_step_begin()  # no effect but where the mode captures graphs
        super().step(index)
        self.last = (self.last[0].clone(), self.last[1].clone())  # the next replay writes over them

    def facts(self) -> dict[str, str]:
        return super().facts() | {"mode": (self.spec.options or {}).get("mode", "default")}


class Liger(Eager):
    """transformers with all of Liger's kernels for this model."""

    def load(self) -> Any:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2()
        return super().load()


class Unsloth(Eager):
    """Unsloth's `FastLanguageModel(full_finetuning=True)`, which compiles each layer."""

    def load(self) -> Any:
        if (self.spec.options or {}).get("graphs"):
            os.environ["UNSLOTH_BLOCK_CUDAGRAPHS"] = "1"
        import unsloth  # noqa: F401  patches what is imported after it, so it comes first
        from safetensors.torch import load_file
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            str(self.folder),
            max_seq_length=self.work.length,
            dtype=torch.bfloat16,
            load_in_4bit=False,
            full_finetuning=True,
            use_gradient_checkpointing=False,
            float32_mixed_precision=self.spec.precision == "fp32",
        )
        # its loader may write rows of the embedding (padding, unused tokens): all arms start from the same weights
        model.load_state_dict(load_file(self.folder / "model.safetensors"), strict=False)
        return model


PEERS: dict[str, type[Eager]] = {"eager": Eager, "compile": Compiled, "liger": Liger, "unsloth": Unsloth}
