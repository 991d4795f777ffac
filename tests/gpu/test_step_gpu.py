"""A step on CUDA reads nothing back: neither the guard, nor clipping, nor the optimizer waits for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chronicals.train.digest import digest
from chronicals.train.step import Step, StepOutput
from tests.train import helpers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_no_synchronisation_between_logged_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda_graph: bool
) -> None:
    helpers.make_model(tmp_path / "model")
    helpers.make_chats(tmp_path / "chats.jsonl", rows=200)
    step, strict = Step.__call__, []

    def strict_step(self: Step, number: int, *args: Any) -> StepOutput:
        if number > 10:  # the first ones compile, record and allocate
            torch.cuda.set_sync_debug_mode("error")
            strict.append(number)
        try:
            return step(self, number, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Step, "__call__", strict_step)
    # 55 steps: the guard compares weights once
    options = {"device": "cuda", "bf16": True, "gradient_accumulation_steps": 2, "max_steps": 55, "logging_steps": 10}
    config = helpers.make_config(tmp_path, **options, cuda_graph=cuda_graph)
    assert helpers.run(config)[0].status == "finished"
    assert len(strict) == 45


def test_digest_is_the_same_on_every_device() -> None:
    for size in (1, 65_537, 9_000_001):
        tensor = torch.randn(size).bfloat16()
        assert digest(tensor) == digest(tensor.cuda()).cpu()
