"""LoRA's own ops, in plain PyTorch: what stands between an adapter's parameters and the matmuls that read them.

A joined projection multiplies by one buffer that holds the frozen weight and the thin matrices beside it
(adapters/joined.py). The matrices are trained as parameters of their own, so they are copied into the buffers at the
start of each micro-batch: a few megabytes, all of them by one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def place_adapters(pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """A plan, made once: each call of it copies every source into its destination, as they are then.

    Args:
        pairs: source (rows, columns) contiguous, and a view (rows, columns) of the same dtype whose last stride is 1
            and whose rows may lie apart. Both keep their memory as long as the plan is used.
    """
    for source, destination in pairs:
        assert source.shape == destination.shape and source.dtype == destination.dtype
    sources, destinations = [source for source, _ in pairs], [destination for _, destination in pairs]

    @torch.no_grad()
    def place() -> None:
        for source, destination in zip(sources, destinations, strict=True):
            destination.copy_(source)

    return place
