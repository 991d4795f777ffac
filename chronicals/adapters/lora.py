"""LoRA (Hu et al. 2021): which projections get adapters, and of what rank and scale.

    y = W x + b + s B (A x)        s = alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)

Adapters are added to a model that is built already, by putting a projection with adapters where its `Projection` was:
no layer knows of them. What they compute is in unfused.py, how they begin in initialise.py.

Left out: adapters of embeddings and of the head, several adapters at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from chronicals.adapters.initialise import initialise
from chronicals.adapters.joined import JoinedLoRA
from chronicals.adapters.joined_nf4 import JoinedNF4LoRA
from chronicals.adapters.joined_variants import JoinedDoRA, JoinedDropout, JoinedNF4DoRA, JoinedNF4Dropout
from chronicals.adapters.unfused import DoRAProjection, Dropout, LoRAProjection, Target
from chronicals.errors import UserError, nearest
from chronicals.models.config import ModelConfig
from chronicals.models.decoder import Decoder
from chronicals.models.families import FAMILIES
from chronicals.models.hf import PEFT_PREFIX, hf_views, trained_views
from chronicals.models.nf4 import NF4Store
from chronicals.models.projection import Projection

Names = tuple[str, ...] | str
PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")  # of a layer, as we fuse them


def as_names(value: list[str] | str | None) -> Names:
    """From YAML or JSON."""
    return value if isinstance(value, str) else tuple(value or ())


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
    dropout: float = 0.0  # lora_dropout
    dora: bool = False  # use_dora
    init: str = "kaiming"  # init_lora_weights, see initialise.py
    bias: str = "none"  # which biases of the base model are trained: "none", "all", "lora_only" (those of targets)
    modules_to_save: tuple[str, ...] = ()  # ends of names of modules that are trained whole
    ensure_weight_tying: bool = False  # a tied embedding in modules_to_save stays tied; else each gets a copy

    def __post_init__(self) -> None:
        """Raises UserError where what is read as a regular expression is none."""
        expressions = {
            "target_modules": [self.targets] if isinstance(self.targets, str) else [],
            "exclude_modules": [self.exclude_modules] if isinstance(self.exclude_modules, str) else [],
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "layers_pattern": self.layers_pattern,
            "modules_to_save": self.modules_to_save,
        }
        for name, expression in ((name, one) for name, several in expressions.items() for one in several):
            try:
                re.compile(expression)
            except re.error as error:
                mend = "write names as a list, or mend the expression"
                raise UserError(f"{name}: {expression!r} is no regular expression ({error})", mend) from error

    @property
    def takes_out(self) -> bool:
        """Whether what an adapter begins with is taken out of the weight."""
        return self.init.startswith("pissa")

    def as_saved(self) -> LoRA:
        """The adapter of the unchanged weights that computes the same: s (B A - B0 A0), where s B0 A0 was taken out, is
        of twice the rank, and of the same s."""
        if not self.takes_out:
            return self
        factor = math.sqrt(2) if self.rslora else 2
        return replace(
            self,
            r=2 * self.r,
            alpha=factor * self.alpha,
            rank_pattern={key: 2 * r for key, r in self.rank_pattern.items()},
            alpha_pattern={key: factor * alpha for key, alpha in self.alpha_pattern.items()},
            init="kaiming",
        )

    @property
    def joins(self) -> bool:
        """Whether adapters can be joined with frozen weights: to DoRA with dropout PEFT gives a second matmul."""
        return not (self.dora and self.dropout)

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
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save):
            return False
        return not self.layers_to_transform or self._layer(module) in self.layers_to_transform

    def saves(self, module: str) -> bool:
        """Whether the Hugging Face module of this name, or one around it, is trained whole."""
        parts = module.split(".")
        around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return any(outer.endswith(name) for outer in around for name in self.modules_to_save)

    def trains(self, tensor: str) -> bool:
        """Whether the base model's tensor of this Hugging Face name is trained."""
        module, _, leaf = tensor.rpartition(".")
        bias = self.bias == "all" or (self.bias == "lora_only" and self.adapts(module))
        return self.saves(module) or (leaf == "bias" and bias)

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
    if isinstance(targets, str) and not any(re.fullmatch(targets, module) for module in modules):
        raise UserError(
            f"{key}: {targets!r} is no list but a regular expression, which matches no linear layer's whole name",
            f"write a list such as [q_proj, v_proj], or an expression for names such as {modules[0]}",
        )
    for target in () if isinstance(targets, str) else targets:
        if any(LoRA(1, 1, (target,)).adapts(module) for module in modules):
            continue
        if target.rpartition(".")[2] in ("lm_head", "embed_tokens"):
            raise UserError(f"{key}: adapters of {target} are not supported yet", f"use {', '.join(names)}")
        near = nearest(target, [*names, *modules])
        mend = f"did you mean {near!r}?" if near else f"use {', '.join(names)}"
        raise UserError(f"{key}: the model has no linear layer {target!r}", mend)


def check_lora(lora: LoRA, config: ModelConfig) -> None:
    """Raises UserError, by the config's keys, where a name or a pattern fits nothing in the model."""
    check_targets(lora.targets, config)
    modules = linear_modules(config)
    for name in () if isinstance(lora.exclude_modules, str) else lora.exclude_modules:
        if not any(_named((name,), module) for module in modules):
            raise UserError(f"lora_exclude_modules: the model has no linear layer {name!r}", "remove it")
    if isinstance(lora.exclude_modules, str) and not any(_named(lora.exclude_modules, module) for module in modules):
        reason = f"lora_exclude_modules: {lora.exclude_modules!r} matches no linear layer's whole name"
        raise UserError(reason, f"write a list, or an expression for names such as {modules[0]}")
    for layer in lora.layers_to_transform or ():
        if not 0 <= layer < config.num_hidden_layers:
            last = config.num_hidden_layers - 1
            raise UserError(f"peft_layers_to_transform: there is no layer {layer}", f"layers are 0 to {last}")
    _check_saved(lora, config)
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
    biased = targets if lora.bias == "lora_only" else modules
    if lora.bias != "none" and not any(_has_bias(module, config) for module in biased):
        raise UserError(f"lora_bias: {lora.bias} trains nothing, as the model has no such biases", "remove it")


def _has_bias(module: str, config: ModelConfig) -> bool:
    """Whether the linear layer of this Hugging Face name has one."""
    if ".mlp." in module:
        return config.mlp_bias
    return config.o_bias if module.endswith(".o_proj") else config.qkv_bias


def _check_saved(lora: LoRA, config: ModelConfig) -> None:
    """Each of `modules_to_save` names something that is there, and nothing that has an adapter."""
    tensors = [part for parts in FAMILIES[config.family].tensors.values() for part in parts]
    modules = dict.fromkeys(tensor.rpartition(".")[0] for tensor in tensors)
    there = [m for m in modules if config.qk_norm or not m.endswith(("q_norm", "k_norm"))]
    ends = sorted({module.rpartition(".")[2] for module in there})
    for name in lora.modules_to_save:
        saved = [m.format(i=i) for m in there for i in range(config.num_hidden_layers)]
        saved = [module for module in saved if replace(lora, modules_to_save=(name,)).saves(module)]
        if not saved:
            near = nearest(name, ends)
            mend = f"did you mean {near!r}?" if near else f"use {', '.join(ends)}"
            raise UserError(f"lora_modules_to_save: the model has no module {name!r}", mend)
        if both := [module for module in saved if lora.adapts(module)]:
            raise UserError(
                f"lora_modules_to_save: {name!r} takes in {both[0]}, which is a target of the adapter too",
                "write the whole last part of the module's name",
            )


def add_lora(
    model: Decoder, lora: LoRA, *, seed: int = 42, joined: Collection[str] = PROJECTIONS, fresh: bool = True
) -> None:
    """Freezes the model but for what `lora` trains of it, and adds adapters to its targets. They leave its output as it
    is until they are trained.

    Args:
        seed: of the adapters' first values, and of dropout.
        joined: our projections that take their adapters into their matmuls (joined.py) where that is possible: not
            where DoRA has dropout, and not beside a weight that is trained. The others are as in unfused.py.
        fresh: the adapters get their first values; else they are left for a file to fill.

    Raises:
        UserError: there is no target, or an adapter already.
    """
    if has_adapter(model):
        raise UserError("the model has an adapter already", "load the base model again")
    _freeze(model, lora)
    generator = torch.Generator().manual_seed(seed)
    dropout = Dropout(lora.dropout, seed, model.head_weight.device, model.ops.dropout) if lora.dropout else None
    streams = {module: number for number, module in enumerate(linear_modules(model.config))}
    found = False
    for path, module in list(model.named_modules()):
        if not isinstance(module, Projection) or module is model.lm_head:
            continue
        targets, start = {}, 0
        for name, rows in hf_views(model, {f"{path}.weight": module.weight.detach()}):
            target, part = name.removesuffix(".weight"), slice(start, start + len(rows))
            if lora.adapts(target):
                last = target.rpartition(".")[2]
                targets[last] = Target(part, lora.rank(target), lora.scaling(target), streams[target])
            start = part.stop
        if targets:
            parent, _, leaf = path.rpartition(".")
            adapted = _kind(lora, module, leaf in joined)(module, targets, dropout)
            if fresh:
                initialise(adapted, lora.init, generator)
            setattr(model.get_submodule(parent), leaf, adapted)
            found = True
    if not found:
        raise UserError(f"no linear layer of the model is a target: {lora.targets}", "see lora_target_modules")
    model.projections_changed()


def _kind(lora: LoRA, base: Projection, joined: bool) -> type[LoRAProjection]:
    if not joined or not lora.joins or base.weight.requires_grad:
        return DoRAProjection if lora.dora else LoRAProjection
    in_4_bits = isinstance(base.store, NF4Store)
    if lora.dora:
        return JoinedNF4DoRA if in_4_bits else JoinedDoRA
    if lora.dropout:
        return JoinedNF4Dropout if in_4_bits else JoinedDropout
    return JoinedNF4LoRA if in_4_bits else JoinedLoRA


def _freeze(model: Decoder, lora: LoRA) -> None:
    """All but what `lora` trains of the base model. A tied embedding that is trained is untied first, unless it is to
    stay tied."""
    embedding = lora.saves("model.embed_tokens") or lora.saves("lm_head")
    tied = model.lm_head is None and embedding
    if tied and not lora.ensure_weight_tying:
        model.untie_head()
        tied = False
    model.requires_grad_(False)
    frozen: set[str] = set()
    for name, parameter in model.named_parameters():
        parts = {part for part, _ in hf_views(model, {name: parameter.detach()})}
        trained = {part for part in parts if lora.trains(part)}
        if tied and parameter is model.embed_tokens.weight:
            trained = parts
        if trained and not parameter.is_floating_point():
            raise UserError(
                f"lora_modules_to_save: {min(trained)} is in 4 bits, which cannot be trained", "leave its module out"
            )
        if trained:
            parameter.requires_grad_(True)
            frozen |= parts - trained
    model.frozen_parts = frozenset(frozen)


def has_adapter(model: Decoder) -> bool:
    return any(isinstance(module, LoRAProjection) for module in model.modules())


def adapter_views(model: Decoder, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`trained_views` by PEFT's names, of what is trained in a model with an adapter: its own tensors, and biases and
    modules of the base model.

    Args:
        tensors: all trained parameters, or what is shaped like them, by our names.
    """
    views = trained_views(model, tensors)
    adapted = {name.removesuffix(".lora_A.weight") for name in views if name.endswith(".lora_A.weight")}
    found = {}
    for name, view in views.items():
        if not name.startswith(PEFT_PREFIX):
            module, _, leaf = f"{PEFT_PREFIX}{name}".rpartition(".")
            name = f"{module}.base_layer.{leaf}" if module in adapted else f"{module}.{leaf}"
        found[name] = view
    return found


def adapter_tensors(model: Decoder) -> dict[str, Tensor]:
    """The live tensors of an adapter's file, by PEFT's names; none where the model has no adapter. A head that is tied
    to a trained embedding is that embedding once more."""
    if not has_adapter(model):
        return {}
    found = adapter_views(model, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    if model.lm_head is None and (embedding := found.get(f"{PEFT_PREFIX}model.embed_tokens.weight")) is not None:
        found[f"{PEFT_PREFIX}lm_head.weight"] = embedding
    return found


def dropout_counter(model: Decoder) -> Tensor:
    """() int64, `Dropout.counter`; a tensor that nobody reads where there is no dropout."""
    dropouts = [module for module in model.modules() if isinstance(module, Dropout)]
    return dropouts[0].counter if dropouts else torch.zeros((), dtype=torch.int64)


def names_of(model: Decoder, kind: str) -> list[str]:
    """PEFT's names of all tensors of a kind: "lora_A", "lora_B" or "lora_magnitude_vector"."""
    return [name for name in adapter_tensors(model) if name.removesuffix(".weight").endswith(f".{kind}")]


def learning_rates(model: Decoder, ratio: float, embedding: float) -> dict[str, float]:
    """Shares of the learning rate that are not 1, by the names of `trained_views`, for what a tensor is: LoRA+ (Hayou
    et al. 2024) as PEFT groups it gives each B, and each vector (biases, norms, magnitudes), `ratio`; the embedding has
    a share of its own."""
    fast = {b for module in model.modules() if isinstance(module, LoRAProjection) for b in module.lora_B.values()}
    rates: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = ratio if parameter in fast or parameter.ndim == 1 else 1.0
        rate = embedding if parameter is model.embed_tokens.weight else rate
        if rate != 1.0:
            rates |= dict.fromkeys(trained_views(model, {name: parameter.detach()}), rate)
    return rates
