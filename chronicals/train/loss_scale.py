"""Dynamic loss scaling: what lets gradients be computed in float16, whose smallest normal number is 6.1e-5.

With a scale S a step computes the gradient of S * loss, so that small gradients do not fall out of float16 below, and
divides it out again where numbers are float32 (Micikevicius et al., "Mixed precision training", 2018, section 3.2). S
is always a power of two: neither multiplying nor dividing by it rounds. It halves after a step whose gradient
overflowed, which writes nothing, and doubles after `GROWTH_STEPS` steps in a row that did not.

Everything is a tensor on the device that changes in place, so that steps may be replayed as a CUDA graph and nothing is
read by the host. It costs no pass over gradients: S is a factor of the loss's `grad_scale` (dlogits are final in the
forward pass, so S must be known before), and 1 / S one of what clipping multiplies gradients by.

S cannot mend a loss that is not finite, as the forward pass does not depend on it, nor a gradient that overflows at
`LOWEST`: these stop the run as they do in any dtype. Left out: a scale for each layer; scaling of float8, which has its
own.
"""

from __future__ import annotations

import torch
from torch import Tensor

INITIAL = 2.0**16
LOWEST = 1.0  # gradients that overflow float16 by themselves are a run that diverges
HIGHEST = 2.0**24  # lifts float16's smallest number, 2^-24, to 1: no gradient is in need of more
GROWTH_STEPS = 2000  # as torch.amp.GradScaler


class LossScale:
    """Nothing is scaled: float32 and bfloat16 have the range."""

    def scaled(self, grad_scale: Tensor) -> Tensor:
        """`grad_scale` (1,) float32 times the scale: what the loss is computed with."""
        return grad_scale

    def unscaled(self, value: Tensor) -> Tensor:
        """`value`, float32 and computed with the scale, without it."""
        return value

    def may_fall(self) -> Tensor | None:
        """() bool: the scale is above its floor, so an overflow now is no verdict on the run. None: it never is."""
        return None

    def update(self, grad_norm: Tensor) -> None:
        """Take in the norm of this step's gradient, (), and set the next step's scale in place."""

    def state(self) -> dict[str, Tensor]:
        """The live tensors that a checkpoint holds; to load one, copy into them."""
        return {}

    def row(self) -> dict[str, Tensor]:
        """What is logged of it: (1,) each, whole numbers, live."""
        return {}


UNSCALED = LossScale()


class DynamicLossScale(LossScale):
    """The loss scale of a float16 run, on `device`.

    Attributes:
        scale: (1,) float32, a power of two from `LOWEST` to `HIGHEST`; constant between two calls of `update`.
        good_steps: (1,) int32, steps since it last changed.
        skipped: (1,) int32, steps of the run whose gradient overflowed.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.scale = torch.full((1,), INITIAL, device=device)
        self.good_steps = torch.zeros(1, dtype=torch.int32, device=device)
        self.skipped = torch.zeros(1, dtype=torch.int32, device=device)

    def scaled(self, grad_scale: Tensor) -> Tensor:
        return grad_scale * self.scale

    def unscaled(self, value: Tensor) -> Tensor:
        assert value.dtype == torch.float32, "the quotient may be too small for 16 bits"
        return value / self.scale.view(())

    def may_fall(self) -> Tensor:
        return self.scale.view(()) > LOWEST

    @torch.no_grad()
    def update(self, grad_norm: Tensor) -> None:
        overflow = (~torch.isfinite(grad_norm)).view(1).float()
        self.skipped += overflow.int()
        torch._amp_update_scale_(self.scale, self.good_steps, overflow, 2.0, 0.5, GROWTH_STEPS)
        self.scale.clamp_(LOWEST, HIGHEST)

    def state(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "good_steps": self.good_steps, "skipped": self.skipped}

    def row(self) -> dict[str, Tensor]:
        return {"loss_scale": self.scale, "skipped_steps": self.skipped}


def loss_scale_for(dtype: torch.dtype, device: torch.device) -> LossScale:
    """Of a run that computes in `dtype`."""
    return DynamicLossScale(device) if dtype == torch.float16 else UNSCALED
