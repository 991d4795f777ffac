"""Where gradients live: one buffer for each trainable parameter, made once, written by the backward pass itself.

One rule: a gradient that several micro-batches add to is float32, whatever the weight is, because adding small
gradients to a large bf16 sum loses them. With one micro-batch a step nothing is added up, and the buffer has the
weight's dtype.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from chronicals.kernels.grad_sink import InPlace, Reduce, Stack
from chronicals.models.decoder import Decoder
from chronicals.models.hf import trained_views
from chronicals.optim.grad_norm import grad_norm_for

_ALIGNMENT = 256  # bytes: where each buffer begins, as torch's allocator does it


class Gradients:
    """The gradients of a model's trainable parameters.

    Args:
        model: its `sink` is set: from now on a backward pass writes here.
        parameters: our name -> trainable parameter.
        accumulate: a step has several micro-batches; the update leaves zeros (`AdamW.step(zero_grads=True)`).

    Attributes:
        buffers: our name -> gradient, shaped like the parameter.
        views: Hugging Face name -> the part of a buffer that is its gradient.
    """

    def __init__(self, model: Decoder, parameters: Mapping[str, nn.Parameter], *, accumulate: bool) -> None:
        self.accumulate = accumulate
        first = next(iter(parameters.values()))
        assert all(parameter.dtype == first.dtype for parameter in parameters.values()), "weights of one dtype"
        dtype = torch.float32 if accumulate else first.dtype
        step = _ALIGNMENT // dtype.itemsize
        places = [0, *itertools.accumulate(-(-parameter.numel() // step) * step for parameter in parameters.values())]
        flat = torch.zeros(places[-1], dtype=dtype, device=first.device)
        self.buffers: dict[str, Tensor] = {
            name: flat[start : start + parameter.numel()].view(parameter.shape)
            for (name, parameter), start in zip(parameters.items(), places, strict=False)
        }
        self.views = trained_views(model, self.buffers)
        self._norms = grad_norm_for(list(self.views.values()))
        self._parameters = dict(parameters)
        buffers: dict[Tensor, Tensor] = {parameter: self.buffers[name] for name, parameter in parameters.items()}
        self._sink = model.sink = InPlace(
            buffers, accumulate=accumulate, flat=flat if dtype.itemsize == 2 else None, stacks=self._stacks(flat)
        )

    def _stacks(self, flat: Tensor) -> list[Stack]:
        """The vectors of each role ("layers.*.input_layernorm.weight"): layers are alike, so their gradients lie
        equally far apart."""
        roles: dict[str, list[str]] = {}
        for name, parameter in self._parameters.items():
            if parameter.ndim == 1:
                roles.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
        stacks = []
        for names in roles.values():
            starts = [self.buffers[name].storage_offset() for name in names]
            distances = {b - a for a, b in itertools.pairwise(starts)} or {0}
            if len(distances) == 1:  # else layers differ (frozen in part, other ranks): each vector is added up alone
                out = flat.as_strided((len(names), self.buffers[names[0]].numel()), (distances.pop(), 1), starts[0])
                stacks.append(Stack([self._parameters[name] for name in names], out))
        return stacks

    def norms(self) -> tuple[Tensor, Tensor]:
        """(P,) float32, the L2 norm of each of `views`, and () of all; the next call may overwrite them."""
        return self._norms(list(self.views.values()))

    def finish(self, reduce: Reduce) -> None:
        """Ends a micro-batch's backward pass; `reduce` is the ops' `reduce_partials`."""
        self._sink.finish(reduce)

    def missing(self) -> list[str]:
        """Our names of the parameters that no backward pass has written yet."""
        return [name for name, parameter in self._parameters.items() if parameter not in self._sink.reached]
