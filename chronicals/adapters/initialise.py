"""How adapters begin, as PEFT's `init_lora_weights` names it.

kaiming     A uniform within 1 / sqrt(in), B zero: PEFT's `true`, its default
gaussian    A normal with standard deviation 1 / r, B zero
"""

from __future__ import annotations

import torch
from torch import Tensor

from chronicals.adapters.unfused import DoRAProjection, LoRAProjection

INITS = ("kaiming", "gaussian")


@torch.no_grad()
def initialise(projection: LoRAProjection, init: str, generator: torch.Generator) -> None:
    """Fills A, B and the magnitude of each target. `generator` is on the CPU: a seed means the same on every device."""
    for target, a, b in projection.adapters():
        a.copy_(_drawn(a.shape, init, target.r, generator))
        b.zero_()
    if isinstance(projection, DoRAProjection):
        for name, magnitude in projection.lora_magnitude_vector.items():
            magnitude.copy_(projection.norms(name))


def _drawn(shape: torch.Size, init: str, r: int, generator: torch.Generator) -> Tensor:
    drawn = torch.empty(shape)
    if init == "gaussian":
        return drawn.normal_(0.0, 1 / r, generator=generator)
    bound = shape[1] ** -0.5
    return drawn.uniform_(-bound, bound, generator=generator)
