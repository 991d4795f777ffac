"""Projections with adapters as PEFT computes them, target by target: what the fused ones are held against.

    LoRA    y = W x + b + s B (A x')
    DoRA    y = W x + b + (c - 1) W x' + c s B (A x')        c = m / |W + s B A|, by rows (Liu et al. 2024)

x' is x without dropout, or while training x through a mask of the target's own. Without dropout DoRA is
c (W + s B A) x + b. The norm is a constant to the gradient (section 4.3 of the paper).

Our projections are fused: q, k, v are one weight, gate and up another. Each Hugging Face projection in them has an A
and a B of its own, as PEFT has them; a part that is no target has none. Everything but W x is computed again in
backward, masks included: they are a function of where they are used.

Shapes: T tokens, r the rank; of a target, `in` and `out` elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chronicals.kernels.grad_sink import WeightGradients, matmul_into
from chronicals.kernels.lora import dropout
from chronicals.models.projection import GLU, Projection


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


class Dropout(nn.Module):
    """The dropout of all adapters of a model: x' = mask x / (1 - p).

    Args:
        p: the probability of being dropped.
        seed: with the counter, an adapter's stream and an element's place it decides what is dropped.
        op: the ops' `dropout`.

    Attributes:
        counter: () int64, names the micro-batch; whoever trains sets it before each, and never the same one twice.
    """

    counter: Tensor

    def __init__(self, p: float, seed: int, device: torch.device, op: Callable[..., Tensor] = dropout) -> None:
        super().__init__()
        self.p, self.seed, self.op = p, seed, op
        self.register_buffer("counter", torch.zeros((), dtype=torch.int64, device=device), persistent=False)

    def forward(self, x: Tensor, stream: int) -> Tensor:
        """(T, in) -> its x'; of a gradient with respect to x', that with respect to x."""
        return self.op(x, self.p, seed=self.seed, stream=stream, counter=self.counter)


class LoRAProjection(Projection):
    """A projection whose weight is frozen, as a rule, and adapters of some of its parts.

    A and B are uninitialised until `initialise` or a file fills them.

    Args:
        base: the projection whose place it takes; its parameters are shared.
        targets: by the last part of their names: "q_proj".
        dropout: the model's, which acts in training mode; None for none.

    Attributes:
        lora_A: target -> (r, in).
        lora_B: target -> (out, r).
        taken_out: target -> the A and B whose s B A is no longer in the weight, with which PiSSA's began.
    """

    joins_glu = False
    joins_glu_grad = False

    def __init__(self, base: Projection, targets: Mapping[str, Target], dropout: Dropout | None = None) -> None:
        nn.Module.__init__(self)  # not Projection's, which would make a weight
        self.ops, self.weight, self.bias, self.store = base.ops, base.weight, base.bias, base.store
        self.targets, self.dropout = dict(targets), dropout
        self.taken_out: dict[str, tuple[Tensor, Tensor]] = {}
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name, target in targets.items():
            self.lora_A[name] = nn.Parameter(base.weight.new_empty(target.r, base.weight.shape[1]))
            self.lora_B[name] = nn.Parameter(base.weight.new_empty(target.out_features, target.r))

    def adapters(self) -> Iterator[tuple[Target, Tensor, Tensor]]:
        """Each target with its A and B."""
        for name, target in self.targets.items():
            yield target, self.lora_A[name], self.lora_B[name]

    @torch.no_grad()
    def take_out(self, name: str, a: Tensor, b: Tensor) -> None:
        """Takes s B A, worked out in float32, out of the weight of a target."""
        target = self.targets[name]
        weight = self.weight[target.part]
        weight.copy_(weight.float().addmm_(b.float(), a.float(), alpha=-target.scaling))
        self.taken_out[name] = a, b

    @property
    def drops(self) -> bool:
        return self.dropout is not None and self.training

    def seen(self, x: Tensor, target: Target) -> Tensor:
        """x' of x (T, in), or of a gradient with respect to x' that with respect to x."""
        return self.dropout(x, target.stream) if self.dropout is not None and self.training else x

    def forward(self, x: Tensor, out: Tensor | None = None, apart: Tensor | None = None) -> Tensor:
        out = super().forward(x, out)
        for target, a, b in self.adapters():
            out[:, target.part].addmm_(self.seen(x, target) @ a.t(), b.t(), alpha=target.scaling)
        return out

    def input_grad(self, d_out: Tensor) -> Tensor:
        d_x = super().input_grad(d_out)
        for target, a, b in self.adapters():
            d_x.add_(self.seen(d_out[:, target.part] @ b @ a, target), alpha=target.scaling)
        return d_x

    def glu(
        self,
        x: Tensor,
        glu: GLU,
        *,
        product: bool = True,
        gate_up: Tensor | None = None,
        out: Tensor | None = None,
        apart: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        gate_up = self(x, gate_up, apart)
        return gate_up, glu.matmul.glu_forward(gate_up, glu.activation, out=out) if product else None

    def glu_grad(self, d_out: Tensor, gate_up: Tensor, glu: GLU, *, d_gate_up: Tensor, again: bool) -> Tensor | None:
        d_product = self.input_grad(d_out)
        out = d_product if again else None
        glu.matmul.glu_backward(d_product, gate_up, glu.activation, d_gate_up=d_gate_up, out=out)
        return out

    def weight_grads(self, d_out: Tensor, x: Tensor, kept: Tensor | None, gradients: WeightGradients) -> None:
        super().weight_grads(d_out, x, kept, gradients)
        for target, a, b in self.adapters():
            d_part, seen = d_out[:, target.part], self.seen(x, target)
            gradients.matmul(a, (d_part @ b).mul_(target.scaling).t(), seen)
            gradients.matmul(b, d_part.t(), (seen @ a.t()).mul_(target.scaling))


class DoRAProjection(LoRAProjection):
    """The same with a trained magnitude for each row of a target's weight.

    Attributes:
        lora_magnitude_vector: target -> m (out,); uninitialised like A and B.
    """

    def __init__(self, base: Projection, targets: Mapping[str, Target], dropout: Dropout | None = None) -> None:
        super().__init__(base, targets, dropout)
        self.lora_magnitude_vector = nn.ParameterDict()
        for name, target in targets.items():
            self.lora_magnitude_vector[name] = nn.Parameter(base.weight.new_empty(target.out_features))
        self._norms: dict[str, Tensor] = {}  # of this micro-batch, from its forward pass

    def norms(self, name: str) -> Tensor:
        """(out,): the norm of each row of W + s B A of a target, as they are now, in the weight's dtype like PEFT's."""
        target = self.targets[name]
        return row_norms(self.use()[target.part], self.lora_A[name], self.lora_B[name], target.scaling)

    def forward(self, x: Tensor, out: Tensor | None = None, apart: Tensor | None = None) -> Tensor:
        out = Projection.forward(self, x, out)
        for name, (target, a, b) in zip(self.targets, self.adapters(), strict=True):
            self._norms[name] = self.norms(name)
            y, seen = out[:, target.part], self.seen(x, target)
            if self.drops:
                base = seen @ self.use()[target.part].t()
            else:
                base = y if self.bias is None else y - self.bias[target.part]
            whole = torch.addmm(base, seen @ a.t(), b.t(), alpha=target.scaling)
            y.add_(whole.mul_(self._scale(name)).sub_(base))
        return out

    def input_grad(self, d_out: Tensor) -> Tensor:
        scaled = self._scaled(d_out)
        d_x = Projection.input_grad(self, d_out if self.drops else scaled)
        for target, a, b in self.adapters():
            d_whole = scaled[:, target.part]
            d_seen = (d_whole @ b @ a).mul_(target.scaling)
            if self.drops:
                d_seen.addmm_(d_whole - d_out[:, target.part], self.use()[target.part])
            d_x.add_(self.seen(d_seen, target))
        return d_x

    def weight_grads(self, d_out: Tensor, x: Tensor, kept: Tensor | None, gradients: WeightGradients) -> None:
        Projection.weight_grads(self, d_out, x, kept, gradients)
        scaled = self._scaled(d_out)
        for name, (target, a, b) in zip(self.targets, self.adapters(), strict=True):
            d_whole, seen = scaled[:, target.part], self.seen(x, target)
            thin = (seen @ a.t()).mul_(target.scaling)
            gradients.matmul(a, (d_whole @ b).mul_(target.scaling).t(), seen)
            gradients.matmul(b, d_whole.t(), thin)
            whole = torch.addmm(seen @ self.use()[target.part].t(), thin, b.t())
            self.vector_grad(
                self.lora_magnitude_vector[name], whole.mul_(d_out[:, target.part]).div_(self._norms[name]), gradients
            )

    def _scale(self, name: str) -> Tensor:
        """c."""
        return self.lora_magnitude_vector[name].detach() / self._norms[name]

    def _scaled(self, d_out: Tensor) -> Tensor:
        """(T, out) of the whole projection, a target's columns times its c."""
        scaled = d_out.clone()
        for name, target in self.targets.items():
            scaled[:, target.part].mul_(self._scale(name))
        return scaled


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """(out,): the norm of each row of W + s B A, without that sum: |W|^2 + 2 s <W A', B> + s^2 <B (A A'), B>. In
    float32 (float64 for float64), then rounded to the dtype of `weight`."""
    with torch.no_grad():
        wide = torch.promote_types(weight.dtype, torch.float32)
        cross = weight.new_empty(b.shape, dtype=wide)
        matmul_into(cross, False, weight, a.t())
        a, b = a.to(wide), b.to(wide)
        change = (2 * scaling * cross + scaling**2 * (b @ (a @ a.t()))).mul_(b).sum(1)
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square_()
        return squares.add_(change).clamp_(min=0).sqrt_().to(weight.dtype)
