"""LoRA and QLoRA on GSM8K, and their merged models: does an adapter learn, and is what it learnt in the merged weights?

    python -m benchmarks.lora_training.gsm8k --data gsm8k/train.jsonl [--out benchmarks/results/lora_gsm8k.json]

A small model is pre-trained on other text (base.py). `chronicals train` adds an adapter and trains it on GSM8K's
answers, once with `adapter: lora` and once with `adapter: qlora`; `chronicals merge` puts each into the base model's
weights. Both commands are the command line's own, called in this process. Gates, exit code 1 where one is red:

- The held-out loss, as the run tells it, is lower after the last step than before the first.
- Base model and adapter, and the merged model, both loaded from their files in float32, have the same held-out loss.

What is the same? In float32 nothing differs but the rounding of merged weights to the base model's dtype, by a share u
of each at most (2^-8 in bfloat16). It moves a linear layer's output by less than that share, in a direction that knows
nothing of the targets, so that the loss of a token rises as often as it falls. The mean over tens of thousands of them
may move by u / 16 of itself, and by 1e-5 where that is less, what sums in another order cost.

A QLoRA is trained beside weights in 4 bits and merged into the 16-bit ones that these were made from: its loss beside
those is the one that merging keeps; that beside 4 bits is told too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from benchmarks.lora_training.base import Base, Scale, config, eval_losses, pretrain, write_questions
from benchmarks.precision.text import measured_where
from chronicals import cli
from chronicals.adapters.peft_files import load_adapter
from chronicals.config import TrainConfig
from chronicals.models.hf import load_config, load_model
from chronicals.train import setup
from chronicals.train.evaluate import evaluate
from chronicals.train.precision import resolve_device, resolve_ops

RESULTS = Path(__file__).resolve().parents[1] / "results" / "lora_gsm8k.json"
ADAPTERS = ("lora", "qlora")
LEARNING_RATE = 1e-3
LEAST_TOLERANCE = 1e-5  # a share of the loss

Results = dict[str, dict[str, Any]]


def command(log: Path, *words: str) -> None:
    """`chronicals WORDS`, in this process; what it prints goes to `log`. Raises RuntimeError where it fails."""
    with log.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        code = cli.run(words)
    if code:
        raise RuntimeError(f"chronicals {' '.join(words)} exits {code}: {log.read_text(encoding='utf-8')[-500:]}")


def float32_loss(run: TrainConfig, model: Path, adapter: Path | None = None) -> float:
    """The held-out loss of the model in a folder, with an adapter or without."""
    device = resolve_device(run.device)
    head_dim = load_config(model).head_dim
    ops, _ = resolve_ops(device, torch.float32, head_dim=head_dim, deterministic=run.deterministic)
    decoder = load_model(model, device=device, ops=ops)
    if adapter is not None:
        load_adapter(decoder, adapter)
    held_out = setup.load_data(run, progress=False).eval
    assert held_out is not None
    found = evaluate(decoder, held_out, ops.linear_cross_entropy)
    assert found is not None
    return found.loss


def tolerance(dtype: str) -> float:
    """A share of the loss, for weights that were rounded to `dtype`."""
    return max(torch.finfo(getattr(torch, dtype)).eps / 32, LEAST_TOLERANCE)


def demonstrate(adapter: str, base: Base, folder: Path, scale: Scale) -> dict[str, Any]:
    """Train, merge, and evaluate all of it."""
    start = time.perf_counter()
    out, merged = folder / adapter, folder / f"{adapter}-merged"
    run = config(
        folder,
        scale,
        "gsm8k",
        base_model=base.folder,
        adapter=adapter,
        learning_rate=LEARNING_RATE,
        warmup_ratio=0.05,
        micro_batch_size=scale.micro_batch_size,
        max_steps=scale.steps,
        eval_steps=scale.steps,
        logging_steps=scale.steps,
        output_dir=out,
    )
    job, log = folder / f"{adapter}.yaml", folder / f"{adapter}.log"
    job.write_text(run.to_yaml(), encoding="utf-8")
    command(log, "train", str(job))
    command(log, "merge", str(out), "--out", str(merged), "--device", scale.device)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = eval_losses(rows)
    return {
        "eval_loss_before": losses[0][1],
        "eval_loss": losses[-1][1],
        "eval_tokens": next(row["eval_tokens"] for row in rows if "eval_tokens" in row),
        "adapter_float32": float32_loss(run, base.folder, out),
        "merged_float32": float32_loss(run, merged),
        "dtype": json.loads((merged / "config.json").read_text(encoding="utf-8"))["dtype"],
        "seconds": round(time.perf_counter() - start, 1),
    }


def judge(results: Results) -> list[str]:
    """A line for each gate that is red."""
    wrong = []
    for name, found in results.items():
        if not found["eval_loss"] < found["eval_loss_before"]:  # NaN is wrong too
            wrong.append(f"{name}: held-out loss {found['eval_loss_before']:.4f}, trained {found['eval_loss']:.4f}")
        away = abs(found["merged_float32"] / found["adapter_float32"] - 1)
        if not away <= tolerance(found["dtype"]):
            wrong.append(
                f"{name}: held-out loss {found['adapter_float32']:.6f} with the adapter, {found['merged_float32']:.6f} "
                f"merged: {away:.1e} apart, tolerance {tolerance(found['dtype']):.1e} in {found['dtype']}"
            )
    return wrong


def told(name: str, found: Mapping[str, Any]) -> str:
    return (
        f"{name}: {found['eval_loss_before']:.4f} to {found['eval_loss']:.4f}; in float32 with the adapter "
        f"{found['adapter_float32']:.6f}, merged {found['merged_float32']:.6f} ({found['dtype']}); "
        f"{found['seconds']:.1f} s"
    )


def study(folder: Path, data: Path, scale: Scale) -> tuple[Base, Results]:
    """The base model and what became of each adapter."""
    base = pretrain(folder, scale)
    write_questions(folder, data, scale.rows)
    return base, {adapter: demonstrate(adapter, base, folder, scale) for adapter in ADAPTERS}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSONL with rows of question and answer")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="what to record where this is a copy without history")
    options = parser.parse_args(argv)
    start, scale = time.perf_counter(), Scale(device=options.device)
    with tempfile.TemporaryDirectory() as folder:
        base, results = study(Path(folder), options.data, scale)
    wrong = judge(results)
    asked = f"python -m benchmarks.lora_training.gsm8k --data {options.data.name}"
    report = {
        **measured_where(asked, options.device, options.commit),
        "seconds": round(time.perf_counter() - start, 1),
        "base": base.facts,
        "steps": scale.steps,
        "tokens_per_step": scale.sequence_len * scale.micro_batch_size,
        "learning_rate": LEARNING_RATE,
        "adapters": results,
        "wrong": wrong,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"base model: held-out loss {base.facts['eval_loss_before']:.3f} to {base.facts['eval_loss']:.3f}")
    print("\n".join(told(name, found) for name, found in results.items()))
    print("\n".join(f"RED  {line}" for line in wrong) or "green: both learnt, and merging kept it")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
