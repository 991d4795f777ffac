"""Recorded steps leave the weights of eager ones, bit for bit: with several R, accumulation, evaluation, resume."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from chronicals.config import TrainConfig
from chronicals.errors import UserError
from chronicals.models import offload
from chronicals.models.offload import Offload
from chronicals.train.graph import GraphedStep
from chronicals.train.trainer import Training
from tests.train import helpers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def config_of(folder: Path, name: str, **values: Any) -> TrainConfig:
    defaults = {"device": "cuda", "bf16": True, "deterministic": True, "max_steps": 20}
    return helpers.make_config(folder, output_dir=str(folder / name), **defaults | values)


def assert_same(one: TrainConfig, other: TrainConfig) -> None:
    assert helpers.rows(one) == helpers.rows(other)
    ours, theirs = helpers.weights(one.output_dir), helpers.weights(other.output_dir)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("values", [{}, {"val_set_size": 40, "eval_steps": 7}, {"recompute": "full"}], ids=str)
def test_graph_is_eager(
    folder: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int, values: dict[str, Any]
) -> None:
    recorded: set[int] = set()
    record = GraphedStep._record_micro
    monkeypatch.setattr(GraphedStep, "_record_micro", lambda self, rows: (recorded.add(rows), record(self, rows))[1])
    values = {"gradient_accumulation_steps": accumulation, **values}
    eager = config_of(folder, "eager", cuda_graph=False, **values)
    graph = config_of(folder, "graph", cuda_graph=True, **values)
    helpers.run(eager)
    assert not recorded
    helpers.run(graph)
    assert len(recorded) > 1, "one R only"
    assert_same(eager, graph)


@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
def test_offloading_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, recompute: str) -> None:
    """All tensors go, over borders between chunks; evaluation between steps, and several micro-batches."""
    monkeypatch.setattr(offload, "LARGE", 0)
    monkeypatch.setattr(offload, "CHUNK", 2**14)
    put, parcels = Offload.put, []
    monkeypatch.setattr(Offload, "put", lambda self, tensors: parcels.append(put(self, tensors)) or parcels[-1])
    values = {"recompute": recompute, "val_set_size": 40, "eval_steps": 7, "gradient_accumulation_steps": 3}
    plain = config_of(folder, "plain", cuda_graph=True, **values)
    eager = config_of(folder, "eager", cuda_graph=False, activation_offloading=True, **values)
    graph = config_of(folder, "graph", cuda_graph=True, activation_offloading=True, **values)
    helpers.run(plain)
    assert not parcels
    helpers.run(eager)
    assert parcels
    helpers.run(graph)
    assert_same(plain, eager)
    assert_same(plain, graph)


def test_resume_into_a_graph(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, halved = config_of(folder, "straight"), config_of(folder, "halved", resume_from_checkpoint="auto")
    helpers.run(straight)
    step = Training.step

    def stopping(self: Training, window: object) -> None:
        step(self, window)
        if self.state.step == 10 and self.run.start.checkpoint is None:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Training, "step", stopping)
    assert helpers.run(halved)[0].status == "SIGTERM"
    assert helpers.run(halved)[0].status == "finished"
    assert_same(straight, halved)


def test_what_cannot_be_recorded(folder: Path) -> None:
    """float32 attends document by document."""
    with pytest.raises(UserError, match="cuda_graph: true, but attention runs document by document"):
        helpers.run(config_of(folder, "demanded", bf16=False, cuda_graph=True))
    _, text = helpers.run(config_of(folder, "auto", bf16=False, max_steps=3))
    assert "cuda_graph: off, as attention runs document by document" in " ".join(text.split())
