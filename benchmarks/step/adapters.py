"""The adapter that every arm of a LoRA work starts from, in PEFT's files, and what PEFT computes with it in float32.

A is drawn as PEFT draws it; B is drawn too, as an adapter with B = 0 has no gradient of A to look at. The values are
bf16, whatever an arm trains in.

Two states are written, and what PEFT computes in both: `adapter_model.safetensors`, from which arms start and to whose
loss and gradient norm the first step is held; and another one in `gate_*.safetensors`, with all its gradients, and how
far from them PEFT is in bf16, as some are too small a difference for any kernels to have it exact. Our arm is put into
the second state once its steps are recorded, so that a copy of the adapter which nobody renews is seen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.step.arm import Spec
from benchmarks.step.reference import Reference, arms_dtype, relative_errors
from benchmarks.step.works import SEED, Work, batches

PLAIN = "lora"
VARIANTS: dict[str, dict[str, Any]] = {  # name -> what it adds to PEFT's configuration
    PLAIN: {},
    "dropout": {"lora_dropout": 0.05},  # values are held to those without: a mask changes little
    "bias": {"bias": "all"},
    "dora": {"use_dora": True},
    "dora_dropout": {"use_dora": True, "lora_dropout": 0.05},
    "nf4": {},
}
B_STD = 0.02
WEIGHTS_FILE = "adapter_model.safetensors"


def variant(spec: Spec) -> str:
    return (spec.options or {}).get("variant", PLAIN)


def adapter_folder(work: Work, checkpoint: Path, name: str) -> Path:
    """Where the adapter of variant `name` lies: beside the checkpoint it belongs to."""
    assert work.lora is not None
    return checkpoint / f"{name}_r{work.lora.rank}"


def gate_file(work: Work, folder: Path) -> Path:
    return folder / f"gate_{work.documents}x{work.length}.safetensors"


def peft_config(work: Work, name: str) -> Any:
    from peft import LoraConfig

    assert work.lora is not None
    targets = [module.rpartition(".")[2] for module in work.shape.projections()]
    return LoraConfig(
        r=work.lora.rank,
        lora_alpha=work.lora.alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
        **VARIANTS[name],
    )


def trained(model: Any) -> dict[str, Tensor]:
    """What a PEFT model trains, live, by the names that its files have."""
    live = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {stored_name(name): tensor for name, tensor in live.items()}


def stored_name(name: str) -> str:
    return name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector").replace(".default.", ".")


def fill(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Copies into all that a PEFT model trains; AssertionError where the names are not the same."""
    live = trained(model)
    assert live.keys() == tensors.keys(), f"trained there or here alone: {sorted(live.keys() ^ tensors.keys())[:3]}"
    for name, target in live.items():
        target.copy_(tensors[name])


class AdapterReference(Reference):
    """PEFT on transformers in float32; without dropout, whatever the variant."""

    def __init__(self, work: Work, checkpoint: Path, name: str) -> None:
        from peft import get_peft_model

        super().__init__(work, checkpoint)
        if name == "nf4":
            self._quantise()
        self.model = get_peft_model(self.model, peft_config(work, name))
        self.model.eval()

    def _quantise(self) -> None:
        """Layers' matrices become what bitsandbytes reads back of them, in our arm's dtype, doubly quantised to NF4."""
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        dtype = torch.bfloat16 if self.work.device == "cuda" else torch.float32
        for name, p in self.model.named_parameters():
            if "_proj.weight" in name:
                codes, state = quantize_4bit(p.data.to(dtype), quant_type="nf4", compress_statistics=True)
                p.data.copy_(dequantize_4bit(codes, state))

    def draw(self, seed: int) -> dict[str, Tensor]:
        """Fills the adapter with values drawn on the CPU; they are returned in bf16."""
        generator = torch.Generator().manual_seed(seed)
        values = {}
        for name, live in sorted(trained(self.model).items()):
            if "lora_A" in name:
                bound = live.shape[1] ** -0.5
                value = torch.empty(live.shape).uniform_(-bound, bound, generator=generator)
            elif "lora_B" in name:
                value = torch.empty(live.shape).normal_(std=B_STD, generator=generator)
            else:  # a bias, a magnitude: near what the model has
                value = live.cpu() + torch.empty(live.shape).normal_(std=B_STD / 10, generator=generator)
            values[name] = value.to(torch.bfloat16)
        fill(self.model, values)
        return values

    def run(self, tokens: Tensor) -> tuple[float, dict[str, Tensor]]:
        loss, grads = super().run(tokens)
        return loss, {stored_name(name): grad for name, grad in grads.items()}

    def errors_in(self, dtype: torch.dtype, tokens: Tensor, exact: Mapping[str, Tensor]) -> dict[str, float]:
        """How far transformers itself is from `exact` where it computes in `dtype`, a share of each gradient's norm.

        The model is left in `dtype`. Buffers are not: rope's frequencies are float32 in every arm.
        """
        if dtype == torch.float32:
            return {}
        for p in self.model.parameters():
            p.grad, p.data = None, p.data.to(dtype)
        return relative_errors(self.run(tokens)[1], exact)


def expected(work: Work, checkpoint: Path, name: str) -> dict[str, Any]:
    """Loss and gradient norm of the first batch, which the first step of every arm of this variant is held to.

    Makes the adapter's folder and the gate's file; what is there already is not made again.
    """
    folder = adapter_folder(work, checkpoint, name)
    told, gate = folder / f"expected_{work.documents}x{work.length}.json", gate_file(work, folder)
    if told.is_file():
        return json.loads(told.read_text(encoding="utf-8"))
    folder.mkdir(exist_ok=True)
    reference, tokens = AdapterReference(work, checkpoint, name), batches(work)[0]
    values = reference.draw(SEED)
    save_file(values, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    reference.model.peft_config["default"].save_pretrained(folder)
    loss, grads = reference.run(tokens)
    found = {"loss": loss, "grad_norm": float(torch.stack([g.norm() for g in grads.values()]).norm())}
    values = reference.draw(SEED + 1)
    loss, grads = reference.run(tokens)
    kept = {f"adapter.{n}": v for n, v in values.items()} | {f"gradient.{n}": g.cpu() for n, g in grads.items()}
    rounded = reference.errors_in(arms_dtype(work), tokens, grads)
    save_file(kept, gate, metadata={"loss": repr(loss), "errors": json.dumps(rounded)})
    told.write_text(json.dumps(found), encoding="utf-8")
    return found


def expected_where_possible(work: Work, checkpoint: Path, name: str) -> dict[str, Any]:
    """The same, or `error` where the library that knows the variant is not installed."""
    try:
        return expected(work, checkpoint, name)
    except ImportError as error:
        return {"error": f"no reference for {name}: {error}"}


def load_gate(file: Path) -> tuple[float, dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """Loss of the second state, its tensors, its gradients, and how far from these transformers' own are in the arms'
    dtype."""
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        loss, errors = float(stored.metadata()["loss"]), json.loads(stored.metadata()["errors"])
    kept = load_file(file)

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): kept[name] for name in kept if name.startswith(prefix)}

    return loss, part("adapter."), part("gradient."), errors
