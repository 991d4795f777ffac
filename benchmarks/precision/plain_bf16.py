"""What the product does not offer: bfloat16 weights without master, updated by rounding to nearest.

It is torch's own AdamW on the bfloat16 parameters, whose moments are bfloat16 too. An update smaller than half a step
of its weight is lost, and the second moment, which falls by one part in a thousand, never falls. The guard rightly
stops such a run, as norm weights of 1 do not move; here it is told to let it pass, so that its loss can be seen.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

from chronicals.train import setup


class PlainBF16:
    """In the place of `chronicals.optim.adamw.AdamW`; what else that takes has no meaning here."""

    def __init__(
        self,
        named_parameters: Mapping[str, nn.Parameter],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        decay_names: Collection[str],
        **_: object,
    ) -> None:
        assert all(p.dtype == torch.bfloat16 for p in named_parameters.values())
        self.parameters = dict(named_parameters)
        decayed, others = [], []
        for name, parameter in self.parameters.items():
            (decayed if name in decay_names else others).append(parameter)
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
        self.step_count = torch.zeros((), device=next(iter(self.parameters.values())).device)

    @torch.no_grad()
    def step(
        self,
        grads: Mapping[str, Tensor],
        lr: float | Tensor,
        clip_scale: Tensor,
        finite: Tensor,
        *,
        zero_grads: bool = False,
    ) -> None:
        assert bool(finite)
        for group in self.optimizer.param_groups:
            group["lr"] = float(lr)
        for name, parameter in self.parameters.items():
            parameter.grad = (grads[name] * clip_scale).to(parameter.dtype)
        self.optimizer.step()
        self.step_count += 1
        for name, parameter in self.parameters.items():
            parameter.grad = None
            if zero_grads:
                grads[name].zero_()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Nothing that a checkpoint could hold: these runs save none."""
        return {"exp_avg": {}, "exp_avg_sq": {}, "master": {}}


@contextmanager
def in_the_trainer() -> Iterator[None]:
    """Runs of the trainer inside use it, and no step of theirs counts as one in which weights should move."""
    guard = setup.Guard

    def lenient(*args: object, **options: object) -> setup.Guard:
        return guard(*args, **options | {"min_lr": math.inf})

    with mock.patch.object(setup, "AdamW", PlainBF16), mock.patch.object(setup, "Guard", lenient):
        yield
