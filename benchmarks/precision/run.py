"""Does a format of weights and optimizer states train what float32 masters train? A small model from random weights on
real text, one run of the product's own trainer for each format; on a GPU all at once, each in a process of its own.

    python -m benchmarks.precision.run --data FILE.jsonl [--out benchmarks/results/precision.json] [--steps 1000]

**The noise band** of a figure is the largest distance between any two of the three runs with float32 masters, which
differ in the seed of their weights and of the order of their data. An arm starts from the same weights as the first of
them and sees the same batches. Gate: both figures of each arm that the product offers, the mean loss of the last 50
steps and the loss on held-out text, are no further above that run's than the band; plain bf16 (rounded to nearest, no
master) is further above it in both. Exit code 1 where the gate is red.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import children
from benchmarks.at_once import Results, run_all
from benchmarks.precision.arms import ARMS, LAST, MASTERS, Study, train
from benchmarks.precision.text import Shape, make_tokenizer, measured_where, write_model, write_text

RESULTS = Path(__file__).resolve().parents[1] / "results" / "precision.json"
FIGURES = ("train_loss", "eval_loss")


def prepare(folder: Path, data: Path, shape: Shape, rows: int | None = None) -> None:
    """Text, tokenizer and a model of each seed."""
    write_text(folder, data, rows)
    tokenizer = make_tokenizer(folder / "train.jsonl", shape.vocab)
    for seed in sorted({arm.seed for arm in ARMS}):
        write_model(folder / f"model-{seed}", shape, seed, tokenizer)


def judge(results: Results) -> tuple[dict[str, float], list[str]]:
    """The band of each figure, and a line for each thing that is not as it should be."""
    wrong = [f"{name}: {result['failed']}" for name, result in results.items() if "failed" in result]
    if any("failed" in results[arm.name] for arm in MASTERS):
        return {}, [*wrong, "no noise band without all runs with float32 masters"]
    band = {
        figure: max(
            abs(results[a.name][figure] - results[b.name][figure]) for a, b in itertools.combinations(MASTERS, 2)
        )
        for figure in FIGURES
    }
    for arm in ARMS:
        if arm in MASTERS or "failed" in results[arm.name]:
            continue
        for figure in FIGURES:
            above = results[arm.name][figure] - results[MASTERS[0].name][figure]
            inside = above <= band[figure]  # NaN is outside
            if inside == arm.plain:
                where = "inside" if inside else "outside"
                wrong.append(
                    f"{arm.name}: {figure} is {above:+.4f} from the master's, {where} a band of {band[figure]:.4f}"
                )
    return band, wrong


def table(results: Results, band: dict[str, float]) -> str:
    """One line an arm; distances are to the first run with float32 masters."""
    lines = [f"{'':22} {'train loss':>10} {'':>8} {'eval loss':>10} {'':>8} {'unmoved':>10} {'ms/step':>8} {'GiB':>6}"]
    first = results[MASTERS[0].name]
    for name, result in results.items():
        if "failed" in result:
            lines.append(f"{name:22} failed: {result['failed'][:80]}")
            continue
        cells = [f"{result[f]:10.4f} {result[f] - first.get(f, float('nan')):+8.4f}" for f in FIGURES]
        scale = f"  scale {result['loss_scale']:g}, {result['skipped_steps']} skipped" if "loss_scale" in result else ""
        rest = f"{result['unmoved_tensors']:>10} {result['step_ms']:8.1f} {result['peak_memory_gib']:6.2f}"
        lines.append(f"{name:22} {' '.join(cells)} {rest}{scale}")
    if band:
        lines.append(f"{'noise band':22} {'':10} {band['train_loss']:8.4f} {'':10} {band['eval_loss']:8.4f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSONL; the strings of a row are one document")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="what to record where this is a copy without history")
    options = parser.parse_args(argv)
    command = f"python -m benchmarks.precision.run --data {options.data.name} --steps {options.steps}"
    start, shape = time.perf_counter(), Shape()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.data, shape)
        shared = Study(folder, options.steps, options.learning_rate, 512, 8, options.device)
        arms = {arm.name: (arm, shared) for arm in ARMS}
        results = run_all(train, arms, together=options.device == "cuda")
    band, wrong = judge(results)
    report = {
        **measured_where(command, options.device, options.commit),
        "seconds": round(time.perf_counter() - start, 1),
        "shape": vars(shape),
        "steps": options.steps,
        "tokens_per_step": shared.sequence_len * shared.micro_batch_size,
        "learning_rate": options.learning_rate,
        "train_loss_is_the_mean_of_the_last": LAST,
        "noise_band": band,
        "arms": results,
        "wrong": wrong,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(results, band))
    print("\n".join(f"RED  {line}" for line in wrong) or "green: each format within the band, plain bf16 outside")
    return bool(wrong)


if __name__ == "__main__":
    children.end_with_this_process()
    sys.exit(main())
