"""Rows that wait for the next step's launch, as on a GPU: they say the same, in the same order, and none is lost."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from chronicals.config import TrainConfig
from chronicals.data.loader import Loader
from chronicals.errors import GuardError, UserError
from chronicals.train.step import Step, StepOutput
from chronicals.train.trainer import Training
from tests.train import helpers


@pytest.fixture
def rows_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    build = Training.__init__

    def waiting(self: Training, *args: Any) -> None:
        build(self, *args)
        self.rows_wait = True

    monkeypatch.setattr(Training, "__init__", waiting)


def logged(config: TrainConfig) -> list[int]:
    """Steps of the rows on disk."""
    return [row["step"] for row in helpers.rows(config)] if Path(config.output_dir, "metrics.jsonl").exists() else []


def config_of(folder: Path, name: str, **values: Any) -> TrainConfig:
    return helpers.make_config(folder, output_dir=str(folder / name), max_steps=6, **values)


def poison_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the loss of step `number` be infinite."""
    call = Step.__call__

    def poisoned(self: Step, step: int, *rest: Any) -> StepOutput:
        loss_fn = self.loss_fn
        if step == number:
            self.loss_fn = lambda *args: loss_fn(*args) * math.inf
        output = call(self, step, *rest)
        self.loss_fn = loss_fn
        return output

    monkeypatch.setattr(Step, "__call__", poisoned)


@pytest.mark.usefixtures("rows_wait")
def test_a_row_is_written_behind_the_next_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, seen, call = config_of(folder, "out", save_strategy="no"), [], Step.__call__

    def watched(self: Step, *args: Any) -> StepOutput:
        seen.append(logged(config))
        return call(self, *args)

    monkeypatch.setattr(Step, "__call__", watched)
    helpers.run(config)
    assert seen == [[], [], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]
    assert logged(config) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("logging_steps", [1, 2, 4])
def test_waiting_changes_no_row(folder: Path, request: pytest.FixtureRequest, logging_steps: int) -> None:
    values: dict[str, Any] = {"logging_steps": logging_steps, "val_set_size": 10, "eval_steps": 2, "save_steps": 3}
    at_once, late = (config_of(folder, name, **values) for name in ("at once", "late"))
    first, _ = helpers.run(at_once)
    request.getfixturevalue("rows_wait")
    second, _ = helpers.run(late)
    assert helpers.rows(late) == helpers.rows(at_once)
    assert (second.train_loss, second.eval_loss) == (first.train_loss, first.eval_loss)


@pytest.mark.usefixtures("rows_wait")
def test_a_stopped_run_keeps_the_row_that_waits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, halved = config_of(folder, "straight"), config_of(folder, "halved", resume_from_checkpoint="auto")
    helpers.run(straight)
    step = Training.step

    def stopping(self: Training, window: Any) -> None:
        step(self, window)
        if self.state.step == 3 and self.run.start.checkpoint is None:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Training, "step", stopping)
    result, _ = helpers.run(halved)
    assert (result.status, logged(halved)) == ("SIGTERM", [1, 2, 3])
    assert result.train_loss == helpers.rows(halved)[-1]["loss"]
    helpers.run(halved)
    assert helpers.rows(halved) == helpers.rows(straight)


@pytest.mark.usefixtures("rows_wait")
@pytest.mark.parametrize("values", [{}, {"save_steps": 3}, {"val_set_size": 10, "eval_steps": 3}], ids=str)
def test_the_guard_judges_before_the_row_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    poison_step(monkeypatch, 3)
    config = config_of(folder, "out", **values)
    with pytest.raises(GuardError, match="step 3: the loss is inf"):
        helpers.run(config)
    assert [row["step"] for row in helpers.rows(config) if "loss" in row] == [1, 2]
    assert not list(folder.glob("out/checkpoint-*"))


@pytest.mark.usefixtures("rows_wait")
@pytest.mark.parametrize("poisoned", [False, True])
def test_an_error_of_the_next_window_comes_after_the_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch, poisoned: bool
) -> None:
    """Unless the guard has something to say of that row."""
    window = Loader.window

    def empty(self: Loader, step: int) -> Any:
        if step == 3:
            raise GuardError("step 4: none of its documents has a supervised token")
        return window(self, step)

    monkeypatch.setattr(Loader, "window", empty)
    if poisoned:
        poison_step(monkeypatch, 3)
    config = config_of(folder, "out")
    with pytest.raises(GuardError, match="step 3: the loss is inf" if poisoned else "step 4: none of its documents"):
        helpers.run(config)
    assert logged(config) == ([1, 2] if poisoned else [1, 2, 3])


@pytest.mark.usefixtures("rows_wait")
def test_a_step_that_runs_out_of_memory_comes_after_the_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Step.__call__

    def full(self: Step, step: int, *rest: Any) -> StepOutput:
        if step == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(self, step, *rest)

    monkeypatch.setattr(Step, "__call__", full)
    config = config_of(folder, "out")
    with pytest.raises(UserError, match="the GPU is out of memory"):
        helpers.run(config)
    assert logged(config) == [1, 2, 3]
