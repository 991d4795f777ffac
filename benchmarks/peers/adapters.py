"""Peers that train an adapter: PEFT on transformers as it is, compiled, with Liger's kernels, and Unsloth.

Frozen weights are bf16. In bf16 the adapter is bf16 too, in every arm: PEFT is told not to make it float32, Unsloth's
is cast. With precision fp32 it is what both do by themselves: a float32 adapter and a step under bf16 autocast. Dropout
is 0 and no bias is trained, which is when Unsloth's fused path runs. Where a work asks for least memory, layers are
checkpointed: by PyTorch, and by Unsloth's own mode, which moves what it keeps to the host.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.peers.models import Compiled, Eager
from benchmarks.step.adapters import PLAIN, WEIGHTS_FILE, adapter_folder, fill, peft_config, trained


class Peft(Eager):
    """PEFT on transformers and torch's fused AdamW, nothing else."""

    def load(self) -> Any:
        model = self.adapted(self.base())
        fill(model, load_file(self.started_from()))
        return model

    def base(self) -> Any:
        from transformers import AutoModelForCausalLM

        dtype = torch.float32 if self.work.device == "cpu" else torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype, attn_implementation="sdpa")
        if self.work.least_memory:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.to(self.work.device)

    def adapted(self, model: Any) -> Any:
        from peft import get_peft_model

        wide = self.spec.precision == "fp32"
        return get_peft_model(model, peft_config(self.work, PLAIN), autocast_adapter_dtype=wide)

    def started_from(self) -> Any:
        return adapter_folder(self.work, self.folder, PLAIN) / WEIGHTS_FILE

    def weights(self) -> dict[str, torch.Tensor]:
        return trained(self.model)


class CompiledPeft(Compiled, Peft):
    """PEFT on transformers under `torch.compile`, static shapes."""


class LigerPeft(Peft):
    """PEFT on transformers with all of Liger's kernels for this model."""

    def base(self) -> Any:
        from liger_kernel.transformers import apply_liger_kernel_to_llama, apply_liger_kernel_to_qwen2

        patch = {"llama": apply_liger_kernel_to_llama, "qwen2": apply_liger_kernel_to_qwen2}
        patch[self.work.shape.family]()
        return super().base()


class UnslothPeft(Peft):
    """Unsloth's `FastLanguageModel` and its `get_peft_model`."""

    def base(self) -> Any:
        if (self.spec.options or {}).get("graphs"):
            os.environ["UNSLOTH_BLOCK_CUDAGRAPHS"] = "1"
        import unsloth  # noqa: F401  patches what is imported after it, so it comes first
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            str(self.folder),
            max_seq_length=self.work.length,
            dtype=torch.bfloat16,
            load_in_4bit=False,
            use_gradient_checkpointing=self.recompute_mode(),
        )
        # its loader may write rows of the embedding (padding, unused tokens): all arms start from the same weights
        with safe_open(self.folder / "model.safetensors", "pt", device=self.work.device) as stored:
            for name, p in model.named_parameters():
                p.data.copy_(stored.get_tensor(name))
        return model

    def adapted(self, model: Any) -> Any:
        from unsloth import FastLanguageModel

        config = peft_config(self.work, PLAIN)
        model = FastLanguageModel.get_peft_model(
            model,
            r=config.r,
            lora_alpha=config.lora_alpha,
            target_modules=[module.rpartition(".")[2] for module in self.work.shape.projections()],
            lora_dropout=0,
            bias="none",
            use_gradient_checkpointing=self.recompute_mode(),
        )
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.to(self.dtype)
        FastLanguageModel.for_training(model)
        return model

    def recompute_mode(self) -> Any:
        return "unsloth" if self.work.least_memory else False

    def recompute(self) -> str:
        return 'use_gradient_checkpointing="unsloth"' if self.work.least_memory else "none"


PEERS_WITH_ADAPTER: dict[str, type[Peft]] = {
    "eager": Peft,
    "compile": CompiledPeft,
    "liger": LigerPeft,
    "unsloth": UnslothPeft,
}
