"""The work `gsm8k`: supervised fine-tuning on real text, each library by its own trainer, data loading counted.

Question and answer are one text; documents are at most `LENGTH` tokens of a BPE of 8192 trained on them. A device
trains 16 documents at a time, each library's default way, or two slots of `LENGTH` where it packs. `*_masked` arms
train on answers alone. The clock runs by the wall from the end of step `FROM` to the end of step `TO`; the spread is
that of its thirds. Only real tokens count: no padding, but prompts do, masked or not.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.step.measure import ALONE, Memory, check_moved, red
from benchmarks.step.turns import Turns
from benchmarks.step.works import QWEN_05B, Work

LENGTH, DOCUMENTS, SLOTS = 2048, 16, 2
MARKS = (15, 30, 45, 60)  # the clock starts at the first and stops at the last; multiples of it, as trainers log so
LEARNING_RATE = 1e-4
GSM8K = Work("gsm8k", "Qwen2.5-0.5B, full SFT on GSM8K, each by its own trainer", QWEN_05B, SLOTS, LENGTH)


@dataclass(frozen=True)
class SftSpec:
    """One arm: whose trainer, and whether it packs and masks prompts."""

    family: str  # "ours", "unsloth", "trl"
    packing: bool
    masked: bool = False
    precision: str = "bf16"
    about: str = ""


_PLAIN = {
    "ours": SftSpec("ours", True),
    "ours_fp32": SftSpec("ours", True, precision="fp32"),
    "unsloth_packed": SftSpec("unsloth", True, about="packing=True"),
    "unsloth_default": SftSpec("unsloth", False, about="its default: padding-free"),
    "trl_liger": SftSpec("trl", False, about="TRL with use_liger_kernel, padded"),
}
SFT_ARMS = _PLAIN | {
    f"{name}_masked": SftSpec(spec.family, spec.packing, True, spec.precision, spec.about)
    for name, spec in _PLAIN.items()
    if spec.precision == "bf16"
}
SFT_MEASURED = (
    *("ours", "unsloth_packed", "unsloth_default", "trl_liger", "ours_fp32"),
    *("ours_masked", "unsloth_packed_masked"),
)


def read(file: Path) -> list[tuple[str, str]]:
    """(question with its line end, answer) of each row of a JSONL file, `.xz` or not."""
    import lzma

    raw = file.read_bytes()
    text = (lzma.decompress(raw) if file.suffix == ".xz" else raw).decode("utf-8")
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    return [(row["question"] + "\n", row["answer"]) for row in rows]


def write_rows(pairs: list[tuple[str, str]], file: Path, *, masked: bool) -> None:
    """JSONL that every trainer here reads: `text`, or `prompt` and `completion`."""
    rows = ({"prompt": q, "completion": a} if masked else {"text": q + a} for q, a in pairs)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def row_of(
    marks: dict[int, float], tokens: dict[int, int], logs: dict[str, dict[str, float]], first: float, memory: Memory
) -> dict[str, Any]:
    """An arm's row. `marks`: seconds at which these steps had ended; `tokens`: real ones trained until then."""
    pairs = list(pairwise(MARKS))
    rates = [(tokens[end] - tokens[start]) / (marks[end] - marks[start]) for start, end in pairs]
    for name in ("loss", "grad_norm"):
        for when, value in logs[name].items():
            assert value == value and 0 < value < float("inf"), f"{when} {name} is {value}"
    assert logs["loss"]["last"] < logs["loss"]["first"], f"the loss did not fall: {logs['loss']}"
    total, seconds = tokens[MARKS[-1]] - tokens[MARKS[0]], marks[MARKS[-1]] - marks[MARKS[0]]
    return {
        "tokens_per_second": {"median": total / seconds, "least": min(rates), "most": max(rates)},
        "tokens_per_step": total / (MARKS[-1] - MARKS[0]),
        "memory_gib": memory.gib(),
        "first_step_seconds": first,
        **logs,
    }


def measure_sft(spec: SftSpec, folder: Path, data: Path, started: float, turns: Turns = ALONE) -> dict[str, Any]:
    """In a process of its own: the arm's row, or `error` and no number."""
    try:
        pairs = read(data)
        file = folder.parent / f"{spec.family}_{'masked' if spec.masked else 'plain'}.jsonl"
        write_rows(pairs, file, masked=spec.masked)
        if spec.family == "ours":
            return ours(spec, folder, file, started, turns)
        from benchmarks.peers.trainers import train

        return train(spec, folder, file, started, turns)
    except Exception as error:  # noqa: BLE001  an arm that cannot run is red, and the others still run
        return red(error)


class FirstRow(threading.Thread):
    """When the first row came into metrics.jsonl: the first step is over by then."""

    def __init__(self, file: Path) -> None:
        super().__init__(daemon=True)
        self.file, self.at = file, float("nan")

    def run(self) -> None:
        while not (self.file.is_file() and self.file.stat().st_size):
            time.sleep(0.02)
        self.at = time.time()


def ours(spec: SftSpec, folder: Path, file: Path, started: float, turns: Turns) -> dict[str, Any]:
    """`chronicals train`, as a user runs it, and alone from end to end."""
    import torch
    from rich.console import Console

    from chronicals import TrainConfig, Trainer
    from chronicals.models.hf import hf_views, load_model

    out = folder.parent / f"ours_{spec.masked}_{spec.precision}"
    config = TrainConfig(
        base_model=str(folder),
        datasets=[{"path": str(file), "type": "completion"}],
        dataset_prepared_path=str(folder.parent / "prepared"),
        sequence_len=LENGTH,
        micro_batch_size=SLOTS,
        max_steps=MARKS[-1],
        optimizer="adamw" if spec.precision == "fp32" else "adamw_bf16_sr",
        learning_rate=LEARNING_RATE,
        lr_scheduler="constant",
        logging_steps=MARKS[0],
        save_strategy="no",
        output_dir=str(out),
    )
    first, memory = FirstRow(out / "metrics.jsonl"), Memory("cuda" if torch.cuda.is_available() else "cpu")
    turns.alone()
    first.start()
    Trainer(config, console=Console(quiet=True)).train()
    memory.look()
    turns.done()
    rows = {r["step"]: r for r in map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())}
    model = load_model(out)
    check_moved(
        dict(hf_views(model, {name: p.detach() for name, p in model.named_parameters()})), folder / "model.safetensors"
    )
    marks, at = {MARKS[0]: 0.0}, 0.0
    for before, step in pairwise(MARKS):
        at += (rows[step]["tokens"] - rows[before]["tokens"]) / rows[step]["tokens_per_second"]
        marks[step] = at
    logs = {name: {"first": rows[1][name], "last": rows[MARKS[-1]][name]} for name in ("loss", "grad_norm")}
    tokens = {step: rows[step]["tokens"] for step in MARKS}
    return row_of(marks, tokens, logs, first.at - started - turns.waited, memory) | {
        "chosen": {"optimizer": config.optimizer, "recompute": config.recompute}
    }
