"""LoRA (Hu et al. 2021): a frozen projection plus, for each target, a trained product of two thin matrices.

    y = W x + b + s B (A x)        s = alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)

Our projections are fused: q, k, v are one weight, gate and up another. Each Hugging Face projection in them has an A
and a B of its own, as PEFT has them; a part that is no target has none. Adapters are added to a model that is built
already, by putting a `LoRAProjection` where its `Projection` was: no layer knows of them. A x is computed again in
backward: it is thin.

Left out: dropout, trained biases, embeddings and the head, DoRA, several adapters at once.

Shapes: T tokens, r the rank; of a target, `in` and `out` elements.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chronicals.errors import UserError
from chronicals.kernels.grad_sink import WeightGradients
from chronicals.models.config import ModelConfig
from chronicals.models.decoder import Decoder
from chronicals.models.families import FAMILIES
from chronicals.models.hf import hf_views
from chronicals.models.projection import Projection


@dataclass(frozen=True)
class LoRA:
    """What is added to which projections.

    `targets` are names of Hugging Face modules or ends of them at a dot ("q_proj", "self_attn.q_proj"), or one regular
    expression that matches whole names, as in PEFT's `target_modules`.
    """

    r: int
    alpha: float
    targets: tuple[str, ...] | str
    rslora: bool = False

    @property
    def scaling(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def adapts(self, module: str) -> bool:
        """Whether the Hugging Face module of this name is a target."""
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, module) is not None
        return any(module == target or module.endswith(f".{target}") for target in self.targets)


class LoRAProjection(Projection):
    """A projection whose weight and bias are frozen, and adapters of some of its parts.

    Args:
        base: the projection whose place it takes; its parameters are shared.
        rows: target ("q_proj") -> its first row of the weight and the one behind its last.
        lora: rank and scaling.
        generator: on the CPU; A is drawn as PEFT draws it, uniform within 1 / sqrt(in), and B is zero.

    Attributes:
        lora_A: target -> (r, in).
        lora_B: target -> (out, r).
    """

    def __init__(
        self, base: Projection, rows: dict[str, tuple[int, int]], lora: LoRA, generator: torch.Generator
    ) -> None:
        nn.Module.__init__(self)  # not Projection's, which would make a weight
        self.ops, self.weight, self.bias = base.ops, base.weight, base.bias
        self.rows, self.scaling = rows, lora.scaling
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        bound = base.weight.shape[1] ** -0.5
        for target, (start, stop) in rows.items():
            drawn = torch.empty(lora.r, base.weight.shape[1]).uniform_(-bound, bound, generator=generator)
            self.lora_A[target] = nn.Parameter(drawn.to(base.weight))
            self.lora_B[target] = nn.Parameter(base.weight.new_zeros(stop - start, lora.r))

    def _adapters(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Of each target: its part of the output, A, B."""
        for target, (start, stop) in self.rows.items():
            yield slice(start, stop), self.lora_A[target], self.lora_B[target]

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        out = super().forward(x, out)
        for part, a, b in self._adapters():
            out[:, part].addmm_(x @ a.t(), b.t(), alpha=self.scaling)
        return out

    def input_grad(self, d_out: Tensor) -> Tensor:
        d_x = super().input_grad(d_out)
        for part, a, b in self._adapters():
            d_x.addmm_(d_out[:, part] @ b, a, alpha=self.scaling)
        return d_x

    def weight_grads(self, d_out: Tensor, x: Tensor, kept: Tensor | None, gradients: WeightGradients) -> None:
        for part, a, b in self._adapters():
            d_part = d_out[:, part]
            gradients.matmul(a, (d_part @ b).mul_(self.scaling).t(), x)
            gradients.matmul(b, d_part.t(), (x @ a.t()).mul_(self.scaling))


def linear_modules(config: ModelConfig) -> list[str]:
    """Hugging Face names of all that can be a target: the projections of every layer."""
    tensors = FAMILIES[config.family].tensors
    parts = [part for ours, parts in tensors.items() if ours.endswith("_proj.weight") for part in parts]
    return [part.format(i=i).removesuffix(".weight") for i in range(config.num_hidden_layers) for part in parts]


def all_linear(config: ModelConfig) -> tuple[str, ...]:
    """The targets that are all of them: "q_proj", "k_proj" and so on."""
    return tuple(dict.fromkeys(module.rpartition(".")[2] for module in linear_modules(config)))


def check_targets(targets: Sequence[str], config: ModelConfig, *, key: str = "lora_target_modules") -> None:
    """Raises UserError where one of `targets` names no module of the model, with the nearest name that does."""
    modules, names = linear_modules(config), all_linear(config)
    for target in targets:
        if any(LoRA(1, 1, (target,)).adapts(module) for module in modules):
            continue
        if target.rpartition(".")[2] in ("lm_head", "embed_tokens"):
            raise UserError(f"{key}: adapters of {target} are not supported yet", f"use {', '.join(names)}")
        near = difflib.get_close_matches(target, [*names, *modules], n=1)
        mend = f"did you mean {near[0]!r}?" if near else f"use {', '.join(names)}"
        raise UserError(f"{key}: the model has no linear layer {target!r}", mend)


def add_lora(model: Decoder, lora: LoRA, *, seed: int = 42) -> None:
    """Freezes the model and adds adapters to its targets, which leave its output as it is until they are trained.

    Raises UserError where there is no target.
    """
    generator = torch.Generator().manual_seed(seed)
    found = False
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if not isinstance(module, Projection) or module is model.lm_head:
            continue
        assert not isinstance(module, LoRAProjection), f"{path} has an adapter already"
        rows, start = {}, 0
        for name, part in hf_views(model, {f"{path}.weight": module.weight.detach()}):
            target = name.removesuffix(".weight")
            if lora.adapts(target):
                rows[target.rpartition(".")[2]] = (start, start + len(part))
            start += len(part)
        if rows:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LoRAProjection(module, rows, lora, generator))
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
