"""Projections with adapters as PEFT computes them, target by target: what the fused ones are held against.

    y = W x + b + s B (A x)

Our projections are fused: q, k, v are one weight, gate and up another. Each Hugging Face projection in them has an A
and a B of its own, as PEFT has them; a part that is no target has none. A x is computed again in backward: it is thin.

Shapes: T tokens, r the rank; of a target, `in` and `out` elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from chronicals.kernels.grad_sink import WeightGradients
from chronicals.models.projection import Projection


@dataclass(frozen=True)
class Target:
    """One Hugging Face projection with an adapter."""

    part: slice  # its rows of the weight, which are columns of the output
    r: int
    scaling: float  # s
    stream: int  # its number among all projections of the model, whatever the others are: of its random numbers

    @property
    def out_features(self) -> int:
        return self.part.stop - self.part.start


class LoRAProjection(Projection):
    """A projection whose weight is frozen, and adapters of some of its parts.

    A and B are uninitialised until `initialise` or a file fills them.

    Args:
        base: the projection whose place it takes; its parameters are shared.
        targets: by the last part of their names: "q_proj".

    Attributes:
        lora_A: target -> (r, in).
        lora_B: target -> (out, r).
    """

    def __init__(self, base: Projection, targets: Mapping[str, Target]) -> None:
        nn.Module.__init__(self)  # not Projection's, which would make a weight
        self.ops, self.weight, self.bias, self.store = base.ops, base.weight, base.bias, base.store
        self.targets = dict(targets)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name, target in targets.items():
            self.lora_A[name] = nn.Parameter(base.weight.new_empty(target.r, base.weight.shape[1]))
            self.lora_B[name] = nn.Parameter(base.weight.new_empty(target.out_features, target.r))

    def adapters(self) -> Iterator[tuple[Target, Tensor, Tensor]]:
        """Each target with its A and B."""
        for name, target in self.targets.items():
            yield target, self.lora_A[name], self.lora_B[name]

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        out = super().forward(x, out)
        for target, a, b in self.adapters():
            out[:, target.part].addmm_(x @ a.t(), b.t(), alpha=target.scaling)
        return out

    def input_grad(self, d_out: Tensor) -> Tensor:
        d_x = super().input_grad(d_out)
        for target, a, b in self.adapters():
            d_x.addmm_(d_out[:, target.part] @ b, a, alpha=target.scaling)
        return d_x

    def glu(
        self,
        x: Tensor,
        activation: str,
        *,
        product: bool = True,
        gate_up: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        gate_up = self(x, gate_up)
        return gate_up, self.ops.glu_forward(gate_up, activation, out=out) if product else None

    def glu_grad_(self, d_out: Tensor, gate_up: Tensor, activation: str, *, again: bool) -> Tensor | None:
        d_product = self.input_grad(d_out)
        self.ops.glu_backward(d_product, gate_up, activation, d_gate_up=gate_up, out=d_product if again else None)
        return d_product if again else None

    def weight_grads(self, d_out: Tensor, x: Tensor, kept: Tensor | None, gradients: WeightGradients) -> None:
        for target, a, b in self.adapters():
            d_part = d_out[:, target.part]
            gradients.matmul(a, (d_part @ b).mul_(target.scaling).t(), x)
            gradients.matmul(b, d_part.t(), (x @ a.t()).mul_(target.scaling))
