"""What the file of an adapter holds where something was taken out of the base model's weights (PiSSA).

    trained     W_0 x + s B A x          W_0 = W - s B0 A0
    saved       W x + s [B, -B0] [A; A0] x

A base model with other weights could not be used with anybody's tools, so the adapter is saved for the one on disk, as
plain LoRA of twice the rank: what PEFT's `path_initial_model_for_weight_conversion` does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from chronicals.adapters.lora import adapter_tensors
from chronicals.adapters.unfused import LoRAProjection
from chronicals.models.decoder import Decoder
from chronicals.models.hf import PEFT_PREFIX, hf_views


def saved_tensors(model: Decoder) -> dict[str, Tensor]:
    """`adapter_tensors`, with what was taken out of the weights behind A and, negated, behind B."""
    found = adapter_tensors(model)
    for projection, target, name in _targets(model):
        if target in projection.taken_out:
            a, b = projection.taken_out[target]
            found[f"{name}.lora_A.weight"] = torch.cat((found[f"{name}.lora_A.weight"], a))
            found[f"{name}.lora_B.weight"] = torch.cat((found[f"{name}.lora_B.weight"], -b), 1)
    return found


def take_out(model: Decoder, stored: dict[str, Tensor]) -> None:
    """Takes out of the weights what stands behind A and B in `stored`, where the names of `adapter_tensors` remain."""
    for projection, target, name in _targets(model):
        a, b = projection.lora_A[target], projection.lora_B[target]
        stored[f"{name}.lora_A.weight"], first = stored[f"{name}.lora_A.weight"].split(len(a))
        stored[f"{name}.lora_B.weight"], second = stored[f"{name}.lora_B.weight"].split(len(a), 1)
        projection.take_out(target, first.to(a), -second.to(b))


def changed_weights(model: Decoder) -> set[str]:
    """Hugging Face names of the base model's weights that are not as they are on disk."""
    return {f"{name.removeprefix(PEFT_PREFIX)}.weight" for p, target, name in _targets(model) if target in p.taken_out}


def _targets(model: Decoder) -> Iterator[tuple[LoRAProjection, str, str]]:
    """Each projection with adapters, each of its targets, and PEFT's name of that."""
    for path, module in model.named_modules():
        if isinstance(module, LoRAProjection):
            for target, a in module.lora_A.items():
                (name, _), *_ = hf_views(model, {f"{path}.lora_A.{target}": a.detach()})
                yield module, target, name.removesuffix(".lora_A.weight")
