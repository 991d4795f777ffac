"""Where gradients live between micro-batches.

One rule: a gradient that several micro-batches add to is kept in float32. A float32 weight has such a gradient
already, its own `.grad`. A 16-bit weight has not (autograd insists on a `.grad` of the weight's dtype, and adding
small gradients to a large bf16 sum loses them), so a hook moves each fresh `.grad` into a float32 buffer and frees it
at once: at most one 16-bit gradient is alive at a time. With one micro-batch per step nothing is added up and every
weight keeps its own `.grad`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Gradients:
    """The gradients of `parameters` (name -> trainable parameter), in float32 where `accumulate` says several are
    added up."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, accumulate: bool) -> None:
        self.parameters = dict(parameters)
        self._buffers: dict[str, Tensor] = {}
        self._filled: set[str] = set()  # buffers that hold something of this step
        self._hooks = []
        for name, parameter in self.parameters.items():
            if accumulate and parameter.dtype != torch.float32:
                self._buffers[name] = torch.empty_like(parameter, dtype=torch.float32)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._drain(name)))

    def _drain(self, name: str):  # type: ignore[no-untyped-def]
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if name in self._filled:
                self._buffers[name].add_(parameter.grad)
            else:
                self._buffers[name].copy_(parameter.grad)
                self._filled.add(name)
            parameter.grad = None

        return hook

    def collect(self) -> dict[str, Tensor]:
        """This step's gradients by parameter name; a parameter that no backward pass has reached is left out."""
        held = {
            name: self._buffers[name] if name in self._filled else parameter.grad
            for name, parameter in self.parameters.items()
        }
        return {name: grad for name, grad in held.items() if grad is not None}

    def clear(self) -> None:
        """Forget them: the next backward pass starts from nothing."""
        self._filled.clear()
        for parameter in self.parameters.values():
            parameter.grad = None

    def close(self) -> None:
        """Take the hooks off and let go of everything."""
        self.clear()
        self._buffers.clear()
        for hook in self._hooks:
            hook.remove()
