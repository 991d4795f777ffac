"""How many programs a launch has where each takes many tiles."""

from __future__ import annotations

import functools

import torch
import triton


@functools.cache
def device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program may have."""
    if device.type != "cuda":  # the interpreter: enough for rows to be shared out
        return 2, 2**16
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return properties["multiprocessor_count"], properties["max_shared_mem"]


def balanced(tiles: int, most: int) -> int:
    """Programs, at most `most` and at least one, that take `tiles` in the fewest rounds, and no more than those need:
    the last round is nearly full."""
    return max(1, triton.cdiv(tiles, max(1, triton.cdiv(tiles, most))))
