"""When a run steps, saves and evaluates: integers only, known before the first step.

Steps count from 1 where something has been done ("after step k") and step 0 is the untrained model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from chronicals.config import TrainConfig

FEW = 10  # steps


@dataclass(frozen=True)
class Plan:
    """The whole run's steps."""

    total_steps: int
    steps_per_epoch: int
    logging_steps: int
    saves: frozenset[int]  # steps after which a checkpoint is saved
    evals: frozenset[int]  # steps after which the model is evaluated, 0 included; empty without an evaluation set

    @classmethod
    def of(cls, config: TrainConfig, steps_per_epoch: int, *, has_eval: bool) -> Plan:
        """The plan that `config` asks for. The last step is always evaluated, and saved unless nothing is."""
        total = config.max_steps or math.ceil(config.num_epochs * steps_per_epoch)
        saves: set[int] = set()
        evals: set[int] = set()
        if config.save_strategy != "no":
            saves = marks(total, steps_per_epoch, config.save_steps, config.saves_per_epoch)
        if has_eval:
            evals = {0} | marks(total, steps_per_epoch, config.eval_steps, config.evals_per_epoch)
        return cls(total, steps_per_epoch, config.logging_steps, frozenset(saves), frozenset(evals))

    def notes(self, config: TrainConfig, bins: int) -> list[str]:
        """A line where the data make a run of a few steps that nobody asked for: little can be learnt in them."""
        if config.max_steps is not None or self.total_steps >= FEW:
            return []
        each = config.micro_batch_size * config.gradient_accumulation_steps
        smaller = "sequence_len" + ", micro_batch_size or gradient_accumulation_steps" * (each > 1)
        return [
            f"the whole run is {self.total_steps} optimizer step{'s' * (self.total_steps > 1)}: the data fill {bins} "
            f"bins, and a step trains {each}; for more steps raise num_epochs, or lower {smaller}"
        ]

    def epoch(self, step: int) -> float:
        """Epochs done after `step`, rounded to what a log needs."""
        return round(step / self.steps_per_epoch, 4)

    def logs(self, step: int) -> bool:
        """The first, every `logging_steps`-th and the last step are logged."""
        return step == 1 or step % self.logging_steps == 0 or step == self.total_steps


def marks(total: int, steps_per_epoch: int, every: int | None, per_epoch: int | None) -> set[int]:
    """Steps up to `total` of what is done each `every` steps, else `per_epoch` times an epoch (default 1), and at the
    end."""
    if every:
        return {*range(every, total, every), total}
    per_epoch = min(per_epoch or 1, steps_per_epoch)
    count = total * per_epoch // steps_per_epoch
    # Rounded up, so that the last mark of an epoch is its last step.
    return {*(-(-k * steps_per_epoch // per_epoch) for k in range(1, count + 1)), total}
