"""Whole runs on CUDA: bf16 weights with float32 masters learn, resume, and do not care how a step is divided."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from chronicals.commands.verify import verify
from chronicals.train.trainer import Training
from tests.kernels.numerics import relative_error
from tests.train import helpers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_bf16_run_learns_and_transformers_agrees(folder: Path) -> None:
    config = helpers.make_config(
        folder, device="cuda", bf16="auto", val_set_size=40, max_steps=60, micro_batch_size=4, learning_rate=2e-3
    )
    result, _ = helpers.run(config)
    losses = [row["eval_loss"] for row in helpers.rows(config) if "eval_loss" in row]
    assert result.status == "finished" and result.eval_loss == losses[-1] < 0.7 * losses[0]
    saved = helpers.weights(config.output_dir)
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    masters = helpers.load_file(Path(config.output_dir) / "checkpoint-60" / "optimizer.safetensors")
    assert all(torch.equal(masters[f"master.{name}"].bfloat16(), tensor) for name, tensor in saved.items())
    assert verify(config.output_dir, device="cuda").passed


@pytest.mark.parametrize("bf16", [False, True])
def test_eight_micro_batches_train_what_one_does(folder: Path, bf16: bool) -> None:
    weights = []
    for micro, accumulation in ((8, 1), (1, 8)):
        config = helpers.make_config(
            folder,
            device="cuda",
            bf16=bf16,
            micro_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            max_steps=5,
            output_dir=str(folder / f"{micro}x{accumulation}"),
        )
        helpers.run(config)
        weights.append(helpers.load_file(Path(config.output_dir) / "checkpoint-5" / "optimizer.safetensors"))
    for name in weights[0]:
        if name.startswith("exp_avg."):
            assert relative_error(weights[1][name], weights[0][name]) < (3e-2 if bf16 else 1e-4), name


@pytest.mark.parametrize("bf16", [False, True])
def test_deterministic_run_resumes_bit_for_bit(folder: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    options = {"device": "cuda", "bf16": bf16, "deterministic": True, "max_steps": 20, "gradient_accumulation_steps": 2}
    straight = helpers.make_config(folder, output_dir=str(folder / "straight"), **options)
    helpers.run(straight)
    halved = helpers.make_config(folder, resume_from_checkpoint="auto", **options)
    step = Training.step

    def stopping(self: Training, window: object) -> None:
        step(self, window)
        if self.state.step == 10 and self.run.start.checkpoint is None:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Training, "step", stopping)
    assert helpers.run(halved)[0].status == "SIGTERM"
    assert helpers.run(halved)[0].status == "finished"
    assert helpers.rows(halved) == helpers.rows(straight)
    one, other = helpers.weights(straight.output_dir), helpers.weights(halved.output_dir)
    assert all(torch.equal(one[name], other[name]) for name in one)
