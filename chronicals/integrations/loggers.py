"""Where else the rows of `metrics.jsonl` go: TensorBoard and Weights & Biases, each by config, each an optional
library.

A library that was asked for and is missing is an error before any work is done, never a silent run without it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from chronicals.config import TrainConfig
from chronicals.errors import UserError


class Logger(Protocol):
    """A place that takes rows. It never changes the run."""

    def log(self, row: dict[str, Any]) -> None:
        """One row of metrics.jsonl."""

    def saved(self, folder: Path, *, final: bool) -> None:
        """A checkpoint, or the final model, is complete in `folder`."""

    def close(self, exit_code: int) -> None:
        """The run ended; 0 is well."""


class TensorBoard:
    """TensorBoard event files in `output_dir/tensorboard`. Rows after `step` (of a run that was cut short) are
    hidden."""

    def __init__(self, output_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(_place(name), value, row["step"])
        self._writer.flush()

    def saved(self, folder: Path, *, final: bool) -> None:
        pass

    def close(self, exit_code: int) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases. `wandb_run_id` continues one; the key and the host come from W&B's own settings."""

    def __init__(self, config: TrainConfig, output_dir: Path, model: nn.Module) -> None:
        import wandb

        self._upload = config.wandb_log_model
        self._run = wandb.init(
            project=config.wandb_project,
            entity=config.wandb_entity,
            name=config.wandb_name,
            id=config.wandb_run_id,
            resume="allow" if config.wandb_run_id else None,
            mode=config.wandb_mode,
            dir=str(output_dir),
            config=config.model_dump(exclude_none=True),
        )
        if config.wandb_watch:
            self._run.watch(model, log=config.wandb_watch, log_freq=config.logging_steps)

    def log(self, row: dict[str, Any]) -> None:
        self._run.log({_place(name): value for name, value in row.items() if name != "step"}, step=row["step"])

    def saved(self, folder: Path, *, final: bool) -> None:
        if self._upload == "checkpoint" or (self._upload == "end" and final):
            self._run.log_model(str(folder), name=f"{self._run.id}-{'final' if final else folder.name}")

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


def wanted(config: TrainConfig) -> list[str]:
    """The libraries that the config asks for. Raises UserError where one is not installed."""
    use_wandb = config.use_wandb if config.use_wandb is not None else config.wandb_project is not None
    libraries = {"tensorboard": (config.use_tensorboard, "use_tensorboard"), "wandb": (use_wandb, "W&B logging")}
    for library, (wish, key) in libraries.items():
        if wish and importlib.util.find_spec(library) is None:
            raise UserError(f"{key} needs the library {library}", f"pip install {library}")
    return [library for library, (wish, _) in libraries.items() if wish]


def open_loggers(config: TrainConfig, output_dir: Path, model: nn.Module, step: int) -> Sequence[Logger]:
    """The loggers that the config asks for, of a run that goes on after `step`."""
    makers: dict[str, Callable[[], Logger]] = {
        "tensorboard": lambda: TensorBoard(output_dir, step),
        "wandb": lambda: WandB(config, output_dir, model),
    }
    return [makers[library]() for library in wanted(config)]


def _place(name: str) -> str:
    """`eval_loss` -> `eval/loss`, others -> `train/...`: the panels that these tools make."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
