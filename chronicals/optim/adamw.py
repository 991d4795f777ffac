"""AdamW that never asks the host: a step with a gradient that is not finite writes nothing, decided on the device.

Kingma & Ba 2015 with the decoupled weight decay of Loshchilov & Hutter 2019 (Algorithm 2), for step t and gradient g:

    theta <- theta - lr * weight_decay * theta
    m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2
    theta <- theta - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

Everything it keeps is float32. A weight that is not float32 has a float32 master: an update is often smaller than half
a bf16 step of its weight and would be lost by rounding. The arithmetic is torch's fused kernel, one pass over memory on
the CPU and the GPU; it divides gradients by a device tensor and returns untouched where another one is set, which is
all that clipping and the guard need.

Left out: amsgrad and maximize, which no fine-tuning recipe uses.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

# The fused kernel wants float32 gradients. Others are widened a bucket at a time, so that 256 MiB of copies are alive.
BUCKET_ELEMENTS = 1 << 26


class AdamW:
    """AdamW over named parameters, all on one device.

    Args:
        named_parameters: the trainable parameters, under the names of `model.named_parameters()`.
        betas, eps, weight_decay: as in the paper; the learning rate is an argument of every step.
        decay_names: the parameters that weight decay touches (see `groups.decay_names`).

    Attributes:
        step_count: () float32 on the device, the steps that were written; a skipped step does not count.
    """

    def __init__(
        self,
        named_parameters: Mapping[str, nn.Parameter],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decay_names: Collection[str] = (),
    ) -> None:
        assert named_parameters, "nothing to train"
        assert all(p.is_contiguous() for p in named_parameters.values()), "the fused kernel walks tensors side by side"
        assert set(decay_names) <= set(named_parameters), "decay_names holds names that are not trained"
        self.parameters = dict(named_parameters)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        weights = {name: p.detach() for name, p in self.parameters.items()}  # shares memory, takes in-place writes
        self._exp_avg = {n: torch.zeros_like(w, dtype=torch.float32) for n, w in weights.items()}
        self._exp_avg_sq = {n: torch.zeros_like(w, dtype=torch.float32) for n, w in weights.items()}
        self._master = {n: w.float() for n, w in weights.items() if w.dtype != torch.float32}
        self._narrow = {n: weights[n] for n in self._master}
        self._updated = weights | self._master  # what the kernel writes: the weight itself, or its master
        self._buckets = [
            (names, decay)
            for decay, group in (
                (weight_decay, [n for n in weights if n in decay_names]),
                (0.0, [n for n in weights if n not in decay_names]),
            )
            for names in _buckets(group, weights)
        ]
        self.step_count = torch.zeros((), dtype=torch.float32, device=next(iter(weights.values())).device)

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor], lr: float, clip_scale: Tensor, finite: Tensor) -> None:
        """One update, or none at all.

        Args:
            grads: one gradient a parameter, in any floating dtype; the kernel may leave float32 ones multiplied by
                `clip_scale`, as `torch.nn.utils.clip_grad_norm_` does.
            lr: the learning rate of this step.
            clip_scale: () or (1,) on the device, above 0: gradients are multiplied by it.
            finite: () or (1,) bool on the device; false leaves everything, gradients and `step_count` too, as it is.
        """
        written = finite.reshape(()).float()
        self.step_count += written
        skip, divisor = 1.0 - written, clip_scale.reshape(()).float().reciprocal()
        for names, decay in self._buckets:
            torch._fused_adamw_(
                [self._updated[n] for n in names],
                [grads[n].to(torch.float32).contiguous() for n in names],
                [self._exp_avg[n] for n in names],
                [self._exp_avg_sq[n] for n in names],
                [],
                [self.step_count] * len(names),
                lr=lr,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=decay,
                eps=self.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=divisor,
                found_inf=skip,
            )
        if self._narrow:  # an unchanged master rounds to the weight that is there already
            torch._foreach_copy_(list(self._narrow.values()), list(self._master.values()))

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The live state by parameter name: "exp_avg", "exp_avg_sq", and "master" for weights that are not float32.

        Together with `step_count` it is everything a checkpoint holds. To load one, copy into these tensors in place.
        """
        return {"exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq, "master": self._master}


def _buckets(names: list[str], weights: Mapping[str, Tensor]) -> list[list[str]]:
    """`names` cut, in order, into runs of at most `BUCKET_ELEMENTS` elements (a single tensor may be larger)."""
    buckets: list[list[str]] = []
    room = 0
    for name in names:
        if not buckets or weights[name].numel() > room:
            buckets.append([])
            room = BUCKET_ELEMENTS
        buckets[-1].append(name)
        room -= weights[name].numel()
    return buckets
