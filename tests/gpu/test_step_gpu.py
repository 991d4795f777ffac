"""A step on CUDA reads nothing back: neither the guard, nor clipping, nor the optimizer waits for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chronicals.train import trainer
from chronicals.train.digest import digest
from tests.train import helpers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_no_synchronisation_between_logged_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helpers.make_model(tmp_path / "model")
    helpers.make_chats(tmp_path / "chats.jsonl", rows=200)
    step, strict = trainer.train_step, []

    def strict_step(number: int, *args: Any, **options: Any) -> Any:
        if number > 2:  # the first ones compile and allocate
            torch.cuda.set_sync_debug_mode("error")
            strict.append(number)
        try:
            return step(number, *args, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(trainer, "train_step", strict_step)
    # 55 steps: the guard compares weights once
    options = {"device": "cuda", "bf16": True, "gradient_accumulation_steps": 2, "max_steps": 55, "logging_steps": 10}
    assert helpers.run(helpers.make_config(tmp_path, **options))[0].status == "finished"
    assert len(strict) == 53


def test_digest_is_the_same_on_every_device() -> None:
    for size in (1, 65_537, 9_000_001):
        tensor = torch.randn(size).bfloat16()
        assert digest(tensor) == digest(tensor.cuda()).cpu()
