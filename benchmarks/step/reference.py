"""What every arm starts from and is held to: one checkpoint, and transformers in float32 on it.

The checkpoint is made here, once for a run: random weights as transformers draws them, but for norms and biases, which
are drawn too (a norm of ones hides a forgotten norm). Values and gradients are those of each document alone, so
that a leak between documents is seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.step.works import SEED, Work, batches

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def make_checkpoint(work: Work, folder: Path, texts: Iterable[str]) -> None:
    """config.json, bf16 weights, and a byte-level BPE of 8192 trained on `texts`, which peers' loaders ask for."""
    from transformers import Qwen2Tokenizer

    settings = work.shape.config()
    torch.manual_seed(SEED)
    model, state = empty_model(work), {}
    for name, p in model.named_parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, mean=float("norm" in name), std=settings["initializer_range"])
        state[name] = p.detach().to(torch.bfloat16).cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings | {"dtype": "bfloat16"}, indent=1), encoding="utf-8")
    size = min(8192, work.shape.vocab)
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts, vocab_size=size, new_special_tokens=list(SPECIAL), show_progress=False
    )
    tokenizer.pad_token = tokenizer.eos_token = SPECIAL[0]
    tokenizer.save_pretrained(folder)


def empty_model(work: Work, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of the work's shape on its device; its weights are random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(work.device):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**work.shape.config()), dtype=dtype, attn_implementation="sdpa"
        )


def arms_dtype(work: Work) -> torch.dtype:
    """What arms compute in."""
    return torch.bfloat16 if work.device == "cuda" else torch.float32


def relative_errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Of each of `exact`, the norm of the difference over its norm."""
    errors = {}
    for name, wanted in exact.items():
        wanted = wanted.to(found[name].device)
        errors[name] = float((found[name].float() - wanted).norm() / wanted.norm())
    return errors


class Reference:
    """transformers in float32 on a checkpoint, or on weights given by Hugging Face name."""

    def __init__(self, work: Work, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        self.work, self.model = work, empty_model(work)
        with safe_open(folder / "model.safetensors", "pt", device=work.device) as stored:
            for name, p in self.model.named_parameters():
                p.data.copy_(stored.get_tensor(name) if weights is None else weights[name])

    def run(self, tokens: Tensor) -> tuple[float, dict[str, Tensor]]:
        """Mean loss over the supervised tokens of (documents, length) ids, and its gradients by Hugging Face name."""
        supervised = tokens.shape[0] * (tokens.shape[1] - 1)
        loss = 0.0
        self.model.zero_grad(set_to_none=True)
        for document in tokens.to(self.work.device).split(1):
            logits = self.model(input_ids=document).logits[0, :-1]
            part = torch.nn.functional.cross_entropy(logits, document[0, 1:], reduction="sum") / supervised
            part.backward()
            loss += part.item()
            del logits, part
        return loss, {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


def expected(work: Work, folder: Path) -> dict[str, Any]:
    """Loss and gradient norm of the first batch, which every arm's first step is held to."""
    loss, grads = Reference(work, folder).run(batches(work)[0])
    return {"loss": loss, "grad_norm": float(torch.stack([g.norm() for g in grads.values()]).norm())}
