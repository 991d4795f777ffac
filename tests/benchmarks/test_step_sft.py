"""The work `gsm8k`: our own trainer's arm runs and is gated, and real tokens are what is counted."""

from __future__ import annotations

import json
import lzma
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peers.trainers import _Counted
from benchmarks.step import run, sft, summary
from benchmarks.step.measure import Memory
from benchmarks.step.reference import make_checkpoint
from benchmarks.step.works import Shape, Work

WORK = Work("tiny", "tiny", Shape(64, 96, 2, 4, 2, 16, 512), 1, 96, "cpu")
OURS = sft.SftSpec("ours", packing=True, precision="fp32")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(checkpoint, data): a small model and sums to learn."""
    monkeypatch.setattr(sft, "LENGTH", 96)
    monkeypatch.setattr(sft, "MARKS", (2, 4, 6, 8))
    rows = [{"question": f"What is {a} and {b}?", "answer": f"It is {a + b}."} for a in range(20) for b in range(20)]
    data = tmp_path / "train.jsonl.xz"
    data.write_bytes(lzma.compress("\n".join(map(json.dumps, rows)).encode()))
    folder = tmp_path / "work" / "checkpoint"
    make_checkpoint(WORK, folder, [row["question"] + row["answer"] for row in rows])
    return folder, data


def test_our_trainer_is_measured_by_real_tokens(place: tuple[Path, Path]) -> None:
    row = sft.measure_sft(OURS, *place, time.time())
    assert "error" not in row, row
    assert 0 < row["tokens_per_step"] <= sft.SLOTS * 96
    rate = row["tokens_per_second"]
    assert rate["least"] <= rate["median"] <= rate["most"]
    assert row["loss"]["last"] < row["loss"]["first"]
    assert 0 < row["first_step_seconds"] < 600
    masked = sft.SftSpec("ours", packing=True, masked=True, precision="fp32")
    assert sft.measure_sft(masked, *place, time.time())["loss"]["first"] != row["loss"]["first"]


def test_a_trainer_that_moves_nothing_gets_no_number(place: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft, "LEARNING_RATE", 1e-30)
    row = sft.measure_sft(OURS, *place, time.time())
    assert set(row) == {"error"} and "move" in row["error"]


LOGS = {"loss": {"first": 9.0, "last": 8.0}, "grad_norm": {"first": 1.0, "last": 1.0}}
TOKENS = {15: 1000, 30: 2500, 45: 4000, 60: 5500}
ENDS = {15: 0.0, 30: 1.0, 45: 3.0, 60: 4.0}


def test_the_clock_runs_from_the_first_mark_to_the_last() -> None:
    row = sft.row_of(ENDS, TOKENS, LOGS, 5.0, Memory("cpu"))
    assert row["tokens_per_second"] == {"median": 4500 / 4, "least": 750.0, "most": 1500.0}
    assert row["tokens_per_step"] == 100


@pytest.mark.parametrize(
    ("logs", "reason"),
    [
        ({"loss": {"first": 9.0, "last": 9.0}}, "the loss did not fall"),
        ({"grad_norm": {"first": 0.0, "last": 1.0}}, "first grad_norm is 0.0"),
        ({"loss": {"first": 9.0, "last": float("nan")}}, "last loss is nan"),
    ],
)
def test_logs_that_are_not_of_training_are_red(logs: dict[str, Any], reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        sft.row_of(ENDS, TOKENS, LOGS | logs, 5.0, Memory("cpu"))


def test_padding_is_not_counted() -> None:
    ids = torch.zeros(2, 8, dtype=torch.long)
    mask = torch.tensor([[1] * 8, [1] * 3 + [0] * 5])
    batches = iter([
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids.view(1, 16), "packed_seq_lengths": torch.tensor([8, 6])},
        {"input_ids": ids.view(1, 16)},
    ])  # fmt: skip
    counted = _Counted()
    collate = counted.around(lambda rows: next(batches))
    for _ in range(3):
        collate([])
    assert counted.tokens == [11, 14, 16]
    assert counted.slots == [16, 16, 16]


def test_steps_of_several_batches_are_not_counted_as_one() -> None:
    counted = _Counted()
    counted.tokens = [4096] * 61  # the loader is one ahead
    counted.one_a_step(60)
    for made in (59, 120):
        counted.tokens = [4096] * made
        with pytest.raises(AssertionError, match=f"{made} batches were made for 60 steps"):
            counted.one_a_step(60)


def test_gsm8k_needs_its_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--work", "gsm8k"]) == 2
    assert capsys.readouterr().err == "error: gsm8k needs --data FILE, its train.jsonl with question and answer\n"


def test_gsm8k_says_that_it_has_no_profile(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--work", "gsm8k", "--data", "train.jsonl", "--profile"]) == 2
    assert capsys.readouterr().err.startswith("note: --profile is of steps that stand alone; gsm8k runs whole trainers")


def test_ratios_and_memory_of_gsm8k_are_to_each_peer() -> None:
    rates = {"ours": 190e3, "unsloth_packed": 55e3, "unsloth_default": 30e3, "trl_liger": 12e3}
    gib = {"ours": 9.0, "unsloth_packed": 10.0, "unsloth_default": 10.0, "trl_liger": 20.0}
    arms = {
        name: {"tokens_per_second": {"median": rate}, "memory_gib": {"allocated": gib[name]}}
        for name, rate in rates.items()
    }
    section = {"gpu": "NVIDIA H200", "ceilings": {"matmul_flops_per_second": 700e12}, "arms": arms}
    lines = summary.verdicts("gsm8k", section)
    assert "met  ours 3.45x unsloth_packed, target 3x" in lines
    assert "met  ours 15.83x trl_liger, target 13x" in lines
    assert "met  ours 9.0 GiB, unsloth_packed 10.0" in lines
