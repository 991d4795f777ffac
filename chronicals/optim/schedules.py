"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to replay on resume.

The default is `linear`, decay to zero: it is what the refined worst-case theory of Defazio et al. (2023), "When, Why
and How Much? Adaptive Learning Rate Scheduling by Refinement", derives and what their experiments favour.

With W warm-up steps, N steps and s counted from 0, the factor on the peak rate is

    warm-up              s < W     (s + 1) / (W + 1)
    linear               s >= W    (N - s) / (N - W)
    cosine               s >= W    m + (1 - m) (1 + cos(pi (s - W) / (N - W))) / 2
    constant             s >= W    1
    warmup_stable_decay  s >= W    min(1, (N - s) / D), D = the last `decay_ratio` of all steps

After warm-up these are transformers' own values. Its warm-up is s / W, so that step 0 trains nothing; ours is above
zero from step 0 on and reaches the peak at step W all the same. The last step's rate is above zero too: zero belongs to
step N, which is never taken.

Left out: restarts and polynomial decay, which fine-tuning does not use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from chronicals.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """What the run asks for; the same for every step."""

    name: str  # "linear" | "cosine" | "constant" | "warmup_stable_decay"
    learning_rate: float  # the peak
    warmup_steps: int = 0  # wins over warmup_ratio where above zero
    warmup_ratio: float = 0.0  # of all steps, rounded up
    min_lr_ratio: float = 0.0  # cosine: final rate / peak
    decay_ratio: float = 0.2  # warmup_stable_decay: the share of all steps, at the end, that decay

    def __post_init__(self) -> None:
        if self.name not in _DECAYS:
            raise UserError(f"lr_scheduler {self.name!r} is not known", f"use one of {', '.join(_DECAYS)}")

    def warmup(self, total_steps: int) -> int:
        """Warm-up steps of a run of `total_steps`."""
        return self.warmup_steps or math.ceil(self.warmup_ratio * total_steps)


def lr_at(schedule: Schedule, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step`, from 0, of `total_steps`."""
    assert 0 <= step < total_steps, f"step {step} of {total_steps}"
    warmup = schedule.warmup(total_steps)
    factor = (step + 1) / (warmup + 1) if step < warmup else _DECAYS[schedule.name](schedule, step, warmup, total_steps)
    return schedule.learning_rate * factor


def _linear(schedule: Schedule, step: int, warmup: int, total: int) -> float:
    return (total - step) / (total - warmup)


def _cosine(schedule: Schedule, step: int, warmup: int, total: int) -> float:
    done = (step - warmup) / (total - warmup)
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * (1 + math.cos(math.pi * done)) / 2


def _constant(schedule: Schedule, step: int, warmup: int, total: int) -> float:
    return 1.0


def _warmup_stable_decay(schedule: Schedule, step: int, warmup: int, total: int) -> float:
    decay = min(max(1, math.ceil(schedule.decay_ratio * total)), total - warmup)
    return min(1.0, (total - step) / decay)


_DECAYS: dict[str, Callable[[Schedule, int, int, int], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
    "warmup_stable_decay": _warmup_stable_decay,
}
