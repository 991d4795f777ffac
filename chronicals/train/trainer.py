"""The trainer: from a config to a trained model on disk, in the order in which it happens.

What a step computes is in step.py, what happens before the first one in setup.py. This file decides when things
happen: after each step, in this order, log, evaluate, save, stop.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from chronicals.config import TrainConfig
from chronicals.data.batch import PackedBatch
from chronicals.errors import GuardError
from chronicals.integrations import loggers
from chronicals.optim.schedules import lr_at
from chronicals.train import setup
from chronicals.train.checkpoint import STATE_FILE, try_save, write_final
from chronicals.train.display import Display
from chronicals.train.evaluate import evaluate
from chronicals.train.graph import own_stream
from chronicals.train.lock import held
from chronicals.train.metrics import Meter, MetricsFile, OnItsWay, Row
from chronicals.train.precision import keep_freed_memory, out_of_memory_explained, reproducible
from chronicals.train.setup import Run, Start
from chronicals.train.signals import StopSignals
from chronicals.train.state import RunState
from chronicals.train.step import StepOutput


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    `status` is "finished", "stopped early" (by early_stopping_patience), "already finished", "dry run", or the name
    of the signal that stopped it after a checkpoint was saved.
    """

    status: str
    steps: int
    train_loss: float | None  # of the last logged row
    eval_loss: float | None  # of the last evaluation
    output_dir: Path

    @property
    def summary(self) -> str:
        """One line about it."""
        if self.exit_code:
            how = f"stopped by {self.status} after {self.steps} steps, in {self.output_dir}"
            return f"{how}; resume_from_checkpoint: auto goes on from there"
        return f"{self.status} after {self.steps} steps, in {self.output_dir}"

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal's number."""
        return 128 + signal.Signals[self.status] if self.status in signal.Signals.__members__ else 0


class Trainer:
    """Fine-tunes as `config` says: `Trainer(config).train()`.

    Raises UserError for what the user can mend, GuardError where the run does not train.
    """

    def __init__(self, config: TrainConfig, *, console: Console | None = None) -> None:
        self.config = config
        self.console = console or Console()

    def train(self, *, dry_run: bool = False) -> TrainResult:
        """The whole run; `dry_run` stops before the first step and leaves nothing behind."""
        config = self.config
        start = setup.check_start(config)
        loggers.wanted(config)  # a library that is missing is told now
        if start.device.type == "cpu":
            keep_freed_memory()
        exact = reproducible(config.seed, start.device, deterministic=config.deterministic)
        with held(start.output_dir), exact, out_of_memory_explained(), own_stream(start.device):
            return self._train(start, dry_run)

    def _train(self, start: Start, dry_run: bool) -> TrainResult:
        config = self.config
        data = setup.load_data(config, progress=self.console.is_terminal)
        display = Display(self.console, data.plan.total_steps)
        finished = setup.is_finished(config, start, data.plan)
        if finished:
            ends = finished.stopped_early or start.checkpoint is None
            more = "" if ends else "; a larger num_epochs or max_steps goes on from there"
            display.say(f"the run in {start.output_dir} is already finished: {finished.step} steps{more}")
            return _result("already finished", finished, start.output_dir)
        run = setup.build(config, start, data)
        display.header(setup.header(run), config.chosen, [*config.notes, *data.prepared.report.lines(), *run.notes])
        setup.check_disk(run)
        with StopSignals() as signals:
            try_save(start.output_dir, run.parts())
            if dry_run:
                display.say("dry run: everything is ready for step 1; nothing was kept but the prepared data")
                return _result("dry run", run.state, start.output_dir)
            return Training(run, display, signals).run_to_the_end()


@dataclass(frozen=True)
class Waiting:
    """A row that is to be written when its numbers have come."""

    row: Row
    mark: tuple[int, int]  # the meter's
    numbers: OnItsWay  # loss, gradient norm, what the loss scale logs
    flags: OnItsWay  # the guard's


class Training:
    """The steps of one run."""

    def __init__(self, run: Run, display: Display, signals: StopSignals) -> None:
        self.run, self.display, self.signals = run, display, signals
        self.state, self.plan, self.output_dir = run.state, run.data.plan, run.start.output_dir
        self.saved = self.state.step  # the last step that needs no checkpoint: the one resumed from, or step 0
        self.loss_sum = torch.tensor(self.state.loss_sum, device=run.start.device)  # since the last logged row
        self.waiting: Waiting | None = None
        self.rows_wait = run.start.device.type != "cpu"  # for the next step's launch: to read at once leaves a GPU idle

    def run_to_the_end(self) -> TrainResult:
        """Open what a run writes to, train, and close it whatever happens."""
        run, folder = self.run, self.output_dir
        for name in run.start.checkpoints.remove_half_written():
            self.display.say(f"note: removed {name}, which a stopped run left half-written")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STATE_FILE).unlink(missing_ok=True)  # a final model of fewer steps is final no more
        (folder / "config.yaml").write_text(run.config.to_yaml(), encoding="utf-8")
        self.metrics = MetricsFile(folder / "metrics.jsonl", keep_bytes=self.state.metrics_bytes)
        self.loggers = loggers.open_loggers(run.config, folder, run.model, self.state.step)
        self.meter = Meter(run.start.device)
        exit_code = 1
        try:
            with self.display:
                try:
                    result = self.train()
                except (GuardError, torch.OutOfMemoryError):
                    self.write_waiting()  # of a step before: its verdict, where it has one, names what came first
                    raise
            self.display.say(result.summary)
            if run.adapter is not None and not result.exit_code:
                self.display.say(f"merge it with: chronicals merge {folder} --out DIR")
            exit_code = result.exit_code
            return result
        finally:
            self.metrics.close()
            for logger in self.loggers:
                logger.close(exit_code)

    def train(self) -> TrainResult:
        """Step by step from where the state says to where the plan, early stopping or a signal ends it."""
        state, plan = self.state, self.plan
        windows = self.run.data.train.windows(state.step, plan.total_steps)
        while True:
            if state.step in plan.evals and state.evaluated < state.step:
                self.evaluate()
            done = state.step >= plan.total_steps or state.stopped_early
            if state.step in plan.saves or (done and plan.saves):
                self.save()
            if self.signals.received:
                self.save()
                return _result(self.signals.received.name, state, self.output_dir)
            if done:
                self.finish()
                return _result("stopped early" if state.stopped_early else "finished", state, self.output_dir)
            self.step(next(windows))

    def step(self, window: Sequence[PackedBatch]) -> None:
        """Train one step and log it where it is due, or let its row wait."""
        run, state = self.run, self.state
        lr = lr_at(run.schedule, state.step, self.plan.total_steps)
        state.step += 1
        state.tokens += sum(batch.num_tokens for batch in window)
        state.supervised_tokens += sum(batch.num_targets for batch in window)
        self.meter.add(window)
        output = run.step(state.step, window, lr)
        self.loss_sum += output.loss
        state.loss_steps += 1
        self.write_waiting()  # the row of a step before, while the device is busy with this one
        if self.plan.logs(state.step):
            self.waiting = self.observe(output, lr)
        if not self.rows_wait:
            self.write_waiting()
        run.data.chat.load_soon()  # a save needs it; the start did not wait for it

    def observe(self, output: StepOutput, lr: float) -> Waiting:
        """All that this step's row needs; its loss is the mean over the steps since the last row."""
        run, state = self.run, self.state
        row = {
            "step": state.step,
            "epoch": self.plan.epoch(state.step),
            "loss": None,
            "grad_norm": None,
            "learning_rate": lr,
            "tokens": state.tokens,
            "supervised_tokens": state.supervised_tokens,
        }
        scale = run.step.loss_scale.row()
        row |= dict.fromkeys(scale)
        numbers = [
            self.loss_sum / state.loss_steps,
            output.grad_norm,
            *(value.float().view(()) for value in scale.values()),
        ]
        waiting = Waiting(row, self.meter.mark(), OnItsWay(torch.stack(numbers)), OnItsWay(run.guard.flags()))
        self.loss_sum.zero_()
        state.loss_steps = 0
        return waiting

    def write_waiting(self) -> None:
        """Judge and write the row that waits, if there is one."""
        if self.waiting is None:
            return
        waiting, self.waiting = self.waiting, None
        loss, grad_norm, *scale = waiting.numbers.read()
        row, step = waiting.row, waiting.row["step"]
        self.run.guard.judge(waiting.flags.read(), step, last=step == self.plan.total_steps)
        self.state.train_loss = row["loss"] = loss
        row["grad_norm"] = grad_norm
        row |= {name: int(value) for name, value in zip(self.run.step.loss_scale.row(), scale, strict=True)}
        if not math.isfinite(grad_norm):
            del row["grad_norm"]  # a skipped step has none
        row |= self.meter.read(waiting.mark)
        self.write(row)
        self.display.step(row)

    def evaluate(self) -> None:
        """`eval_loss` over the whole evaluation set; a signal on the way leaves it for the resumed run."""
        run, state = self.run, self.state
        self.write_waiting()
        assert run.data.eval is not None
        with self.meter.paused():
            evaluation = evaluate(
                run.model, run.data.eval, run.eval_loss, stop=lambda: self.signals.received is not None
            )
        if evaluation is None:
            return
        if not math.isfinite(evaluation.loss):
            raise GuardError(f"step {state.step}: eval_loss is {evaluation.loss}; {run.guard.weights_verdict()}")
        state.take(evaluation, run.config.early_stopping_patience)
        row = {"step": state.step, "epoch": self.plan.epoch(state.step)}
        row |= {"eval_loss": evaluation.loss, "eval_tokens": evaluation.tokens}
        self.write(row)
        self.display.evaluation(row)

    def save(self) -> None:
        """A checkpoint of this step, unless it has one; never of a run that the guard would stop."""
        run, state = self.run, self.state
        self.write_waiting()
        if self.saved == state.step:
            return
        with self.meter.paused():
            run.guard.check(state.step)
            state.loss_sum, state.metrics_bytes = float(self.loss_sum), self.metrics.sync()
            folder = run.start.checkpoints.save(state.step, run.parts(), run.trainer_state())
        self.saved = state.step
        self.display.say(f"step {state.step}/{self.plan.total_steps}  saved {folder}")
        for logger in self.loggers:
            logger.saved(folder, final=False)

    def finish(self) -> None:
        """The final model."""
        self.write_waiting()
        self.run.guard.check(self.state.step, last=True)
        self.state.metrics_bytes = self.metrics.sync()
        write_final(self.output_dir, self.run.parts(), self.run.trainer_state())
        for logger in self.loggers:
            logger.saved(self.output_dir, final=True)

    def write(self, row: Row) -> None:
        self.metrics.write(row)
        for logger in self.loggers:
            logger.log(row)


def _result(status: str, state: RunState, output_dir: Path) -> TrainResult:
    return TrainResult(status, state.step, state.train_loss, state.eval_loss, output_dir)
