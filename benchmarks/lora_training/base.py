"""A small base model that was really pre-trained, and GSM8K to train an adapter on: what the LoRA studies share.

The model begins with random weights and is trained, by the product's own trainer, on the sources of Python's standard
library: text that every Python has, and another one than GSM8K. Its tokenizer is a BPE of that text alone.

Of GSM8K only the answers are trained; every twentieth row is held out.
"""

from __future__ import annotations

import json
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.precision.text import HELD_OUT, Shape, make_tokenizer, write_model
from chronicals.config import TrainConfig
from chronicals.train.trainer import Trainer

# Not prose or code that says anything: tables of characters, and what is there to be wrong.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "__pycache__"}
SEED = 1  # of the base model


@dataclass(frozen=True)
class Scale:
    """How large a study is."""

    shape: Shape = field(default_factory=lambda: Shape(layers=6))
    files: int | None = None  # of the standard library, the first so many
    rows: int | None = None  # of GSM8K, the first so many
    sequence_len: int = 512
    pretraining_steps: int = 1500
    pretraining_micro_batch_size: int = 16
    pretraining_learning_rate: float = 1e-3
    steps: int = 400
    micro_batch_size: int = 8
    device: str = "cpu"


@dataclass(frozen=True)
class Base:
    """A pre-trained model's folder, and how it was made."""

    folder: Path
    facts: dict[str, Any]


def sources(files: int | None) -> Iterator[str]:
    """The text of each file of the standard library, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    chosen = [file for file in sorted(root.rglob("*.py")) if not SKIPPED & set(file.relative_to(root).parts)]
    for file in chosen[:files]:
        with tokenize.open(file) as lines:
            if text := lines.read().strip():
                yield text


def write_rows(folder: Path, name: str, rows: list[dict[str, str]]) -> None:
    """`NAME-train.jsonl` and `NAME-eval.jsonl`."""
    for part, held_out in (("train", False), ("eval", True)):
        chosen = [row for i, row in enumerate(rows) if (i % HELD_OUT == 0) == held_out]
        file = folder / f"{name}-{part}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")


def write_questions(folder: Path, data: Path, rows: int | None) -> None:
    """GSM8K's rows, whose prompt is not trained, as `gsm8k-train.jsonl` and `gsm8k-eval.jsonl`."""
    asked = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()[:rows]]
    write_rows(folder, "gsm8k", [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in asked])


def config(folder: Path, scale: Scale, name: str, **values: Any) -> TrainConfig:
    """A run on the text `name` in `folder`, whose prepared data runs share."""
    return TrainConfig(
        datasets=[{"path": folder / f"{name}-train.jsonl", "type": "completion"}],
        test_datasets=[{"path": folder / f"{name}-eval.jsonl", "type": "completion"}],
        dataset_prepared_path=folder / "prepared",
        dataset_processes=1,  # workers are forked, and a process that has used a GPU is not to be
        excess_length_strategy="split",
        sequence_len=scale.sequence_len,
        device=scale.device,
        save_strategy="no",
        **values,
    )


def train(run: TrainConfig) -> list[dict[str, Any]]:
    """The whole run, its output in `log.txt` beside its folder; the rows of its metrics. Raises what the trainer
    raises."""
    out = Path(run.output_dir)
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / f"{out.name}.log.txt").open("w", encoding="utf-8") as log:
        result = Trainer(run, console=Console(file=log, width=120)).train()
    assert result.status == "finished", result.summary
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def eval_losses(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, held-out loss) of a run's rows, from step 0 on."""
    return [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]


def pretrain(folder: Path, scale: Scale) -> Base:
    """The base model, in `folder / "base"`."""
    write_rows(folder, "base", [{"text": text} for text in sources(scale.files)])
    tokenizer = make_tokenizer(folder / "base-train.jsonl", scale.shape.vocab)
    write_model(folder / "random", scale.shape, SEED, tokenizer)
    run = config(
        folder,
        scale,
        "base",
        base_model=folder / "random",
        micro_batch_size=scale.pretraining_micro_batch_size,
        max_steps=scale.pretraining_steps,
        learning_rate=scale.pretraining_learning_rate,
        lr_scheduler="cosine",
        warmup_ratio=0.05,
        weight_decay=0.1,
        eval_steps=scale.pretraining_steps,
        logging_steps=scale.pretraining_steps,
        seed=SEED,
        output_dir=folder / "base",
    )
    rows = train(run)
    losses = eval_losses(rows)
    facts = {
        "text": "the sources of Python's standard library",
        "shape": vars(scale.shape),
        "steps": scale.pretraining_steps,
        "tokens": max(row["tokens"] for row in rows if "tokens" in row),
        "eval_loss_before": losses[0][1],
        "eval_loss": losses[-1][1],
    }
    return Base(folder / "base", facts)
