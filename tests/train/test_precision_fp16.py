"""Runs with `fp16: true`: float16 weights, float32 masters, a loss scale that follows overflows."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chronicals.errors import GuardError, UserError
from chronicals.train.loss_scale import INITIAL, LOWEST, DynamicLossScale
from chronicals.train.step import Step
from tests.kernels.numerics import relative_error
from tests.train import helpers
from tests.train.test_resume import LONG, assert_same_run, at_step


def before_update(monkeypatch: pytest.MonkeyPatch, action: Callable[[Step, int], None]) -> None:
    """Do `action(step, its number)` between the backward passes and the update of every step."""
    update = Step.run_update
    number = [0]

    def acting(self: Step) -> None:
        number[0] += 1
        action(self, number[0])
        update(self)

    monkeypatch.setattr(Step, "run_update", acting)


def overflow(step: Step) -> None:
    """What a gradient beyond float16's range leaves behind."""
    next(iter(step.gradients.buffers.values())).fill_(torch.inf)


def live_weights(step: Step) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in step.model.parameters()]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_float16_trains_what_float32_does(folder: Path, accumulation: int) -> None:
    """The moments of a few steps agree, so scale, clipping and accumulation cancel where they should."""
    moments = {}
    for name, precision in (("float32", {"bf16": False}), ("float16", {"fp16": True})):
        options = {"max_steps": 4, "gradient_accumulation_steps": accumulation, "max_grad_norm": 0.5}
        config = helpers.make_config(folder, output_dir=str(folder / name), **options, **precision)
        helpers.run(config)
        moments[name] = helpers.load_file(folder / name / "checkpoint-4" / "optimizer.safetensors")
    assert moments["float16"]["loss_scale.scale"].item() == INITIAL
    assert moments["float16"]["loss_scale.good_steps"].item() == 4
    for name, tensor in moments["float32"].items():
        if name.startswith("exp_avg."):
            assert relative_error(moments["float16"][name], tensor) < 1e-2, name
    losses = [
        [row["loss"] for row in helpers.rows(helpers.make_config(folder, output_dir=str(folder / name)))]
        for name in moments
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    saved, masters = helpers.weights(folder / "float16"), moments["float16"]
    assert all(torch.equal(masters[f"master.{name}"].half(), tensor) for name, tensor in saved.items())


def test_the_header_and_the_rows_tell_of_the_scale(folder: Path) -> None:
    config = helpers.make_config(folder, max_steps=2, fp16=True)
    _, text = helpers.run(config)
    assert "CPU, float16, float32 masters and loss scaling" in text
    assert [(row["loss_scale"], row["skipped_steps"]) for row in helpers.rows(config)] == [(INITIAL, 0)] * 2
    config = helpers.make_config(folder, max_steps=2, output_dir=str(folder / "float32"))
    helpers.run(config)
    assert all("loss_scale" not in row for row in helpers.rows(config))


def test_an_overflow_skips_its_step_and_halves_the_scale(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, list[Tensor]] = {}

    def act(step: Step, number: int) -> None:
        seen[number] = live_weights(step)
        if number in (3, 4):
            overflow(step)

    before_update(monkeypatch, act)
    config = helpers.make_config(folder, max_steps=6, fp16=True)
    result, text = helpers.run(config)
    assert result.status == "finished"
    same = [all(map(torch.equal, seen[number], seen[number + 1])) for number in range(1, 6)]
    assert same == [False, False, True, True, False]
    rows = helpers.rows(config)
    assert [row["loss_scale"] / INITIAL for row in rows] == [1, 1, 0.5, 0.25, 0.25, 0.25]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 2, 2, 2]
    assert ["grad_norm" in row for row in rows] == [True, True, False, False, True, True]
    assert "step 4/6" in text and text.count("skipped, as float16 overflowed") == 2
    moments = helpers.load_file(Path(config.output_dir) / "checkpoint-6" / "optimizer.safetensors")
    assert moments["step_count"].item() == 4, "bias correction counts written steps"


def test_a_run_that_overflows_at_the_lowest_scale_is_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before_update(monkeypatch, lambda step, _: overflow(step))
    falls = int(INITIAL / LOWEST).bit_length() - 1
    config = helpers.make_config(folder, max_steps=falls + 9, num_epochs=9, fp16=True)
    message = f"^step {falls + 1}: .* and the gradient is not finite in model.* left float16's range; train in float32"
    with pytest.raises(GuardError, match=message):
        helpers.run(config)
    assert len(helpers.rows(config)) == falls, "each smaller scale was tried"


def test_a_loss_that_is_not_finite_is_no_matter_of_scale(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before_update(monkeypatch, lambda step, number: step.loss.fill_(torch.nan) if number == 2 else None)
    with pytest.raises(GuardError, match=r"^step 2: the loss is nan; .* left float16's range; train in float32"):
        helpers.run(helpers.make_config(folder, max_steps=4, fp16=True))


def test_a_resumed_run_has_the_scale_it_had(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overflows before and after the stop; the state of the scale is a part of every comparison."""
    monkeypatch.setattr("chronicals.train.loss_scale.GROWTH_STEPS", 4)
    before_update(monkeypatch, lambda step, _: overflow(step) if float(step.lr) in rates else None)
    rates = {torch.tensor(1e-3 * (20 - step) / 20).item() for step in (2, 7, 14)}
    straight = helpers.make_config(folder, output_dir=str(folder / "straight"), fp16=True, **LONG)
    helpers.run(straight)
    halved = helpers.make_config(folder, resume_from_checkpoint="auto", fp16=True, **LONG)
    at_step(monkeypatch, 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert helpers.run(halved)[0].steps == 10
    held = helpers.load_file(folder / "out" / "checkpoint-10" / "optimizer.safetensors")
    assert (held["loss_scale.skipped"].item(), held["loss_scale.good_steps"].item()) == (2, 2)
    assert helpers.run(halved)[0].steps == 20
    assert_same_run(straight, halved, 20)
    assert [row["skipped_steps"] for row in helpers.rows(halved) if "loss" in row][-1] == 3


def test_a_float16_checkpoint_is_of_a_float16_run(folder: Path) -> None:
    helpers.run(helpers.make_config(folder, max_steps=1, fp16=True))
    with pytest.raises(UserError, match="bf16 was 'float16' and is 'float32' now"):
        helpers.run(helpers.make_config(folder, max_steps=2, resume_from_checkpoint="auto"))


def test_small_gradients_survive_by_the_scale_alone() -> None:
    """2^-26 rounds to nothing in float16; scaled, it comes back exactly."""
    gradient, scale = torch.tensor([2.0**-26]), DynamicLossScale("cpu")
    assert gradient.half().item() == 0
    assert scale.unscaled(scale.scaled(gradient).half().float()).item() == gradient.item()
