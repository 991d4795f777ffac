"""The arms of the precision study, and one whole run of the trainer for each."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from benchmarks.precision import plain_bf16
from chronicals.config import TrainConfig
from chronicals.train.trainer import Trainer

LAST = 50  # steps whose mean training loss is told


@dataclass(frozen=True)
class Arm:
    """One run: what its config says of precision, and its seed (of the weights and of the order of the data)."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 1
    plain: bool = False  # bf16 weights rounded to nearest, which no config asks for


MASTERS = [Arm(f"fp32 master, seed {seed}", {"bf16": True}, seed) for seed in (1, 2, 3)]
ARMS = [
    *MASTERS,
    Arm("adamw_bf16_sr", {"bf16": True, "optimizer": "adamw_bf16_sr"}),
    Arm("adamw_8bit", {"bf16": True, "optimizer": "adamw_8bit"}),
    Arm("fp16: true", {"fp16": True}),
    Arm("plain bf16", {"bf16": True, "cuda_graph": False}, plain=True),  # torch's optimizer asks the host
]


@dataclass(frozen=True)
class Study:
    """What all arms share."""

    folder: Path  # holds train.jsonl, eval.jsonl and a model of each seed; each arm writes into a folder of its own
    steps: int
    learning_rate: float
    sequence_len: int
    micro_batch_size: int
    device: str


def train(arm: Arm, study: Study) -> dict[str, Any]:
    """The whole run; its result is plain numbers. Raises whatever the trainer raises."""
    out = study.folder / arm.name.replace(" ", "-").replace(":", "").replace(",", "")
    out.mkdir()
    config = TrainConfig(
        base_model=study.folder / f"model-{arm.seed}",
        datasets=[{"path": study.folder / "train.jsonl", "type": "completion"}],
        test_datasets=[{"path": study.folder / "eval.jsonl", "type": "completion"}],
        dataset_prepared_path=out / "prepared",
        dataset_processes=1,
        sequence_len=study.sequence_len,
        micro_batch_size=study.micro_batch_size,
        max_steps=study.steps,
        learning_rate=study.learning_rate,
        lr_scheduler="cosine",
        warmup_ratio=0.05,
        weight_decay=0.1,
        seed=arm.seed,
        device=study.device,
        eval_steps=study.steps,
        save_strategy="no",
        logging_steps=min(LAST, study.steps),
        output_dir=out / "run",
        **arm.options,
    )
    start = time.perf_counter()
    patched = plain_bf16.in_the_trainer() if arm.plain else contextlib.nullcontext()
    with (out / "log.txt").open("w") as log, patched:
        result = Trainer(config, console=Console(file=log, width=120)).train()
    assert result.status == "finished", result.summary
    rows = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    evals = [row["eval_loss"] for row in rows if "eval_loss" in row]
    last = [row for row in rows if "loss" in row][-1]
    return {
        "train_loss": last["loss"],
        "eval_loss": evals[-1],
        "eval_loss_before": evals[0],
        "unmoved_tensors": unmoved(study.folder / f"model-{arm.seed}", out / "run"),
        "step_ms": last["step_ms"],
        "peak_memory_gib": last["peak_memory_gib"],
        "seconds": round(time.perf_counter() - start, 1),
        **{key: last[key] for key in ("loss_scale", "skipped_steps") if key in last},
    }


def unmoved(before: Path, after: Path) -> str:
    """How many of the model's tensors hold exactly the numbers that the run began with, of how many."""
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    same = [name for name, tensor in new.items() if torch.equal(tensor.float(), old[name].float())]
    return f"{len(same)} of {len(new)}"
