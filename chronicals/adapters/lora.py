"""LoRA (Hu et al. 2021): which projections get adapters, and of what rank and scale.

    y = W x + b + s B (A x)        s = alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)

Adapters are added to a model that is built already, by putting a projection with adapters where its `Projection` was:
no layer knows of them. What they compute is in unfused.py, how they begin in initialise.py.

Left out: adapters of embeddings and of the head, several adapters at once.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chronicals.adapters.initialise import initialise
from chronicals.adapters.joined import JoinedLoRA
from chronicals.adapters.joined_nf4 import JoinedNF4LoRA
from chronicals.adapters.unfused import LoRAProjection, Target
from chronicals.errors import UserError
from chronicals.models.config import ModelConfig
from chronicals.models.decoder import Decoder
from chronicals.models.families import FAMILIES
from chronicals.models.hf import hf_views
from chronicals.models.nf4 import NF4Store
from chronicals.models.projection import Projection

Names = tuple[str, ...] | str
PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")  # of a layer, as we fuse them


@dataclass(frozen=True)
class LoRA:
    """What is added to which projections, under the names of PEFT's `LoraConfig` where they differ.

    `targets` (`target_modules`) and `exclude_modules` are names of Hugging Face modules or ends of them at a dot
    ("q_proj", "self_attn.q_proj"), or one regular expression that matches whole names.
    """

    r: int
    alpha: float  # lora_alpha
    targets: Names  # target_modules
    rslora: bool = False  # use_rslora
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # regular expression of a name's end -> r
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None  # all where there are none
    layers_pattern: tuple[str, ...] = ()  # what the list of layers is called; any where empty
    exclude_modules: Names = ()
    init: str = "kaiming"  # init_lora_weights, see initialise.py

    def rank(self, module: str) -> int:
        """r of the Hugging Face module of this name."""
        return next((r for key, r in self.rank_pattern.items() if _ends_in(key, module)), self.r)

    def scaling(self, module: str = "") -> float:
        """s of the Hugging Face module of this name; without one, where no pattern says otherwise."""
        alpha = next((alpha for key, alpha in self.alpha_pattern.items() if _ends_in(key, module)), self.alpha)
        r = self.rank(module)
        return alpha / (math.sqrt(r) if self.rslora else r)

    def adapts(self, module: str) -> bool:
        """Whether the Hugging Face module of this name is a target."""
        if _named(self.exclude_modules, module) or not _named(self.targets, module):
            return False
        return not self.layers_to_transform or self._layer(module) in self.layers_to_transform

    def _layer(self, module: str) -> int | None:
        """The number behind the first name of a list of layers."""
        for pattern in self.layers_pattern or (r"[^.]*",):
            if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
                return int(match.group(1))
        return None


def _named(names: Names, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _ends_in(key: str, module: str) -> bool:
    """PEFT's `get_pattern_key`: `key` matches the name, or its end behind a dot."""
    return re.match(rf"(.*\.)?({key})$", module) is not None


def linear_modules(config: ModelConfig) -> list[str]:
    """Hugging Face names of all that can be a target: the projections of every layer."""
    tensors = FAMILIES[config.family].tensors
    parts = [part for ours, parts in tensors.items() if ours.endswith("_proj.weight") for part in parts]
    return [part.format(i=i).removesuffix(".weight") for i in range(config.num_hidden_layers) for part in parts]


def all_linear(config: ModelConfig) -> tuple[str, ...]:
    """The targets that are all of them: "q_proj", "k_proj" and so on."""
    return tuple(dict.fromkeys(module.rpartition(".")[2] for module in linear_modules(config)))


def check_targets(targets: Names, config: ModelConfig, *, key: str = "lora_target_modules") -> None:
    """Raises UserError where one of `targets` names no module of the model, with the nearest name that does."""
    modules, names = linear_modules(config), all_linear(config)
    for target in () if isinstance(targets, str) else targets:
        if any(LoRA(1, 1, (target,)).adapts(module) for module in modules):
            continue
        if target.rpartition(".")[2] in ("lm_head", "embed_tokens"):
            raise UserError(f"{key}: adapters of {target} are not supported yet", f"use {', '.join(names)}")
        near = difflib.get_close_matches(target, [*names, *modules], n=1)
        mend = f"did you mean {near[0]!r}?" if near else f"use {', '.join(names)}"
        raise UserError(f"{key}: the model has no linear layer {target!r}", mend)


def check_lora(lora: LoRA, config: ModelConfig) -> None:
    """Raises UserError, by the config's keys, where a name or a pattern fits nothing in the model."""
    check_targets(lora.targets, config)
    modules = linear_modules(config)
    for name in () if isinstance(lora.exclude_modules, str) else lora.exclude_modules:
        if not any(_named((name,), module) for module in modules):
            raise UserError(f"lora_exclude_modules: the model has no linear layer {name!r}", "remove it")
    for layer in lora.layers_to_transform or ():
        if not 0 <= layer < config.num_hidden_layers:
            last = config.num_hidden_layers - 1
            raise UserError(f"peft_layers_to_transform: there is no layer {layer}", f"layers are 0 to {last}")
    targets = [module for module in modules if lora.adapts(module)]
    if not targets:
        raise UserError(
            "no linear layer of the model is a target",
            "see lora_target_modules, lora_exclude_modules, peft_layers_to_transform and peft_layers_pattern",
        )
    for key, pattern in (("lora_rank_pattern", lora.rank_pattern), ("lora_alpha_pattern", lora.alpha_pattern)):
        for expression in pattern:
            if not any(_ends_in(expression, target) for target in targets):
                raise UserError(f"{key}: {expression!r} fits no target", f"targets are such as {targets[0]}")


def add_lora(model: Decoder, lora: LoRA, *, seed: int = 42, joined: Collection[str] = PROJECTIONS) -> None:
    """Freezes the model and adds adapters to its targets, which leave its output as it is until they are trained.

    Args:
        joined: our projections that take their adapters into their matmuls (joined.py); the others are as in
            unfused.py.

    Raises UserError where there is no target.
    """
    generator = torch.Generator().manual_seed(seed)
    streams = {module: number for number, module in enumerate(linear_modules(model.config))}
    found = False
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if not isinstance(module, Projection) or module is model.lm_head:
            continue
        assert not isinstance(module, LoRAProjection), f"{path} has an adapter already"
        targets, start = {}, 0
        for name, rows in hf_views(model, {f"{path}.weight": module.weight.detach()}):
            target, part = name.removesuffix(".weight"), slice(start, start + len(rows))
            if lora.adapts(target):
                last = target.rpartition(".")[2]
                targets[last] = Target(part, lora.rank(target), lora.scaling(target), streams[target])
            start = part.stop
        if targets:
            parent, _, leaf = path.rpartition(".")
            together = JoinedNF4LoRA if isinstance(module.store, NF4Store) else JoinedLoRA
            adapted = (together if leaf in joined else LoRAProjection)(module, targets)
            initialise(adapted, lora.init, generator)
            setattr(model.get_submodule(parent), leaf, adapted)
            model.projections_changed()
            found = True
    if not found:
        raise UserError(f"no linear layer of the model is a target: {lora.targets}", "see lora_target_modules")


def adapter_tensors(model: Decoder, kinds: Sequence[str] = ("lora_A", "lora_B")) -> dict[str, Tensor]:
    """The live tensors of these kinds of all adapters, by PEFT's names; none where the model has no adapter."""
    found = {
        f"{path}.{kind}.{target}": parameter.detach()
        for path, module in model.named_modules()
        if isinstance(module, LoRAProjection)
        for kind in kinds
        for target, parameter in getattr(module, kind).items()
    }
    return dict(hf_views(model, found))


def learning_rates(model: Decoder, ratio: float) -> dict[str, float]:
    """LoRA+ (Hayou et al. 2024): PEFT's name of every B -> its share of the learning rate, `ratio`."""
    return dict.fromkeys(adapter_tensors(model, ("lora_B",)), ratio)
