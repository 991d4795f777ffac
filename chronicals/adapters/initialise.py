"""How adapters begin, as PEFT's `init_lora_weights` names it.

    kaiming     A uniform within 1 / sqrt(in), B zero: PEFT's `true`, its default
    gaussian    A normal with standard deviation 1 / r, B zero
    pissa       s B A is the part of W with the r largest singular values, and is taken out of W (Meng et al. 2024);
                `pissa_niter_4` finds it by 4 subspace iterations from random vectors, without a whole decomposition

DoRA's magnitudes are the norms of the rows as they are then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chronicals.adapters.unfused import DoRAProjection, LoRAProjection, Target
from chronicals.errors import UserError
from chronicals.models.projection import Kept


@torch.no_grad()
def initialise(projection: LoRAProjection, init: str, generator: torch.Generator) -> None:
    """Fills A, B and the magnitude of each target. `generator` is on the CPU: a seed means the same on every device."""
    for name, (target, a, b) in zip(projection.targets, projection.adapters(), strict=True):
        if init.startswith("pissa"):
            if not isinstance(projection.store, Kept):
                raise UserError(
                    "peft_init_lora_weights: pissa changes weights, and these are in 4 bits", "set it to true"
                )
            _, _, iterations = init.partition("_niter_")
            first, second = _principal(projection.use()[target.part], target, iterations, generator)
            a.copy_(first)
            b.copy_(second)
            projection.take_out(name, a.detach().clone(), b.detach().clone())
        else:
            a.copy_(_drawn(a.shape, init, target.r, generator))
            b.zero_()
    if isinstance(projection, DoRAProjection):
        for name, magnitude in projection.lora_magnitude_vector.items():
            magnitude.copy_(projection.norms(name))


def _principal(weight: Tensor, target: Target, iterations: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A and B, float32, of which s B A has the r largest singular values and vectors of `weight` (out, in)."""
    if target.r > min(weight.shape):
        raise UserError(f"lora_r: rank {target.r} of a weight of {tuple(weight.shape)}, which pissa cannot begin with")
    if iterations:
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            left, values, right = torch.svd_lowrank(weight.float(), target.r, niter=int(iterations))
    else:
        left, values, rows = torch.linalg.svd(weight.float(), full_matrices=False)
        left, values, right = left[:, : target.r], values[: target.r], rows[: target.r].t()
    root = (values / target.scaling).sqrt()
    return root.unsqueeze(1) * right.t(), left * root


def _drawn(shape: torch.Size, init: str, r: int, generator: torch.Generator) -> Tensor:
    drawn = torch.empty(shape)
    if init == "gaussian":
        return drawn.normal_(0.0, 1 / r, generator=generator)
    bound = shape[1] ** -0.5
    return drawn.uniform_(-bound, bound, generator=generator)
