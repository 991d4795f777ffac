"""The L2 norm of every gradient and of all of them, behind one name for both devices.

On a GPU it is our own pass over memory (`kernels/fused/grad_norm.py`), which a CUDA graph can hold; elsewhere torch's.
Nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from chronicals.kernels.capability import why_not_fused

GradNorm = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]


def grad_norm_for(tensors: Sequence[Tensor]) -> GradNorm:
    """A function of P tensors of these sizes and dtypes, contiguous, on one device.

    It returns `(norms (P,), total ())`, float32, summed in float32 in a fixed order whatever the tensors' dtype. On a
    GPU both are written anew by the next call, tensors that have moved since the last call cost a copy of their
    addresses, and under a graph they may not have moved.
    """
    assert tensors, "nothing to measure"
    device = tensors[0].device
    if device.type != "cuda" or why_not_fused(device):
        return plain_grad_norm
    from chronicals.kernels.fused.grad_norm import GradNorm as Fused  # triton: only where there is a GPU

    return Fused(tensors)


def plain_grad_norm(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    norms = torch.stack(torch._foreach_norm(list(tensors), 2, torch.float32))
    return norms, torch.linalg.vector_norm(norms)
