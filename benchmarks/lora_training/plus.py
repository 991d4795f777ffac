"""Does LoRA+ reach plain LoRA's loss in fewer steps? Both at their best learning rate, on a pre-trained model.

    python -m benchmarks.lora_training.plus --data gsm8k/train.jsonl [--out benchmarks/results/lora_plus.json]

A small model, pre-trained on other text (base.py), learns GSM8K's answers by a LoRA of rank 16 on all linear layers,
by the product's own trainer: at seven learning rates without and seven with `loraplus_lr_ratio: 16`, a factor of two
apart, two seeds each (of A and of the order of the data, the same for both methods), on a GPU all at once. The rate
is constant behind a short warm-up, so that the loss at a step does not depend on how many are to come.

**A method's best rate** has the least held-out loss at the last step, in the mean over the seeds. At these rates: the
first evaluated step at which one method has the other's last loss, of the same seed, or none.

The exit code is 1 where the comparison is no good, not where LoRA+ is: a run that failed for another reason than that
its rate was too high, a best rate at the end of its sweep (a better one may lie outside), a best run that learnt
nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import children
from benchmarks.at_once import Results, run_all
from benchmarks.lora_training.base import Base, Scale, config, eval_losses, pretrain, train, write_questions
from benchmarks.precision.text import measured_where
from chronicals.errors import GuardError
from chronicals.train import setup

RESULTS = Path(__file__).resolve().parents[1] / "results" / "lora_plus.json"
RANK, WARMUP, RATIO = 16, 20, 16.0
SEEDS = (1, 2)
EVALUATIONS = 40  # of a run, beside that before it

Curve = list[tuple[int, float]]  # (step, held-out loss)


@dataclass(frozen=True)
class Method:
    name: str
    ratio: float  # loraplus_lr_ratio
    rates: tuple[float, ...]  # of A; of B they are `ratio` times that


LORA = Method("LoRA", 1.0, tuple(2.5e-4 * 2**k for k in range(7)))
PLUS = Method("LoRA+", RATIO, tuple(3.125e-5 * 2**k for k in range(7)))
METHODS = (LORA, PLUS)


def arm(method: Method, rate: float) -> str:
    return f"{method.name} at {rate:g}"


def sweep(method: Method, rate: float, folder: Path, scale: Scale) -> dict[str, Any]:
    """One rate's runs: the curve of each seed, or what stopped them. Raises what is no fault of the rate."""
    curves: dict[str, Curve] = {}
    start = time.perf_counter()
    for seed in SEEDS:
        run = config(
            folder,
            scale,
            "gsm8k",
            base_model=folder / "base",
            adapter="lora",
            lora_r=RANK,
            loraplus_lr_ratio=method.ratio,
            learning_rate=rate,
            lr_scheduler="constant",
            warmup_steps=min(WARMUP, scale.steps // 2),
            micro_batch_size=scale.micro_batch_size,
            eval_batch_size=4 * scale.micro_batch_size,
            max_steps=scale.steps,
            eval_steps=max(1, scale.steps // EVALUATIONS),
            logging_steps=scale.steps,
            seed=seed,
            output_dir=folder / f"{method.name}-{rate:g}-{seed}",
        )
        try:
            curves[str(seed)] = eval_losses(train(run))
        except GuardError as error:  # it diverged
            return {"stopped": str(error)}
    return {"curves": curves, "seconds": round(time.perf_counter() - start, 1)}


def last_loss(result: dict[str, Any]) -> float:
    """At the last step, the mean over the seeds; without end where the rate was too high."""
    if "curves" not in result:
        return float("inf")
    return statistics.fmean(curve[-1][1] for curve in result["curves"].values())


def first_at(curve: Curve, loss: float) -> int | None:
    """The first evaluated step at which `loss` is reached."""
    return next((step for step, found in curve if found <= loss), None)


def judge(results: Results) -> tuple[dict[str, Any], list[str]]:
    """Each method's best rate and how soon it has the other's last loss; a line for each thing that is not as it should
    be."""
    wrong = [f"{name}: {result['failed']}" for name, result in results.items() if "failed" in result]
    found: dict[str, Any] = {}
    for method in METHODS:
        losses = {rate: last_loss(results[arm(method, rate)]) for rate in method.rates}
        best = min(losses, key=losses.__getitem__)
        if losses[best] == float("inf"):
            return {}, [*wrong, f"{method.name}: no rate was trained to the end"]
        if best in (method.rates[0], method.rates[-1]):
            wrong.append(f"{method.name}: its best rate {best:g} is an end of the sweep, a better one may lie beyond")
        curves = results[arm(method, best)]["curves"]
        if not all(curve[-1][1] < curve[0][1] for curve in curves.values()):
            wrong.append(f"{method.name}: its best run learnt nothing")
        found[method.name] = {"rate": best, "last_loss": losses[best], "curves": curves}
    for one, other in (METHODS, METHODS[::-1]):
        theirs = found[other.name]["curves"]
        found[one.name]["steps_to_the_others_last_loss"] = {
            seed: first_at(curve, theirs[seed][-1][1]) for seed, curve in found[one.name]["curves"].items()
        }
    return found, wrong


def table(results: Results) -> str:
    """The last loss of every rate."""
    lines = []
    for method in METHODS:
        for rate in method.rates:
            result = results[arm(method, rate)]
            ends = " ".join(f"{curve[-1][1]:8.4f}" for curve in result.get("curves", {}).values())
            why = result.get("failed") or result.get("stopped") or f"{ends}  {result['seconds']:6.1f} s"
            lines.append(f"{method.name:6} A {rate:8.2g}  B {method.ratio * rate:8.2g}  {why[:90]}")
    return "\n".join(lines)


def study(folder: Path, data: Path, scale: Scale) -> tuple[Base, Results]:
    """The base model and every arm."""
    base = pretrain(folder, scale)
    write_questions(folder, data, scale.rows)
    arms = {arm(method, rate): (method, rate, folder, scale) for method in METHODS for rate in method.rates}
    if scale.device == "cuda":  # prepared once, before the arms want it at once
        setup.load_data(config(folder, scale, "gsm8k", base_model=base.folder), progress=False)
    return base, run_all(sweep, arms, together=scale.device == "cuda")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSONL with rows of question and answer")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=Scale.steps)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="what to record where this is a copy without history")
    options = parser.parse_args(argv)
    command = f"python -m benchmarks.lora_training.plus --data {options.data.name} --steps {options.steps}"
    start, scale = time.perf_counter(), Scale(steps=options.steps, device=options.device)
    with tempfile.TemporaryDirectory() as folder:
        base, results = study(Path(folder), options.data, scale)
    best, wrong = judge(results)
    report = {
        **measured_where(command, options.device, options.commit),
        "seconds": round(time.perf_counter() - start, 1),
        "base": base.facts,
        "rank": RANK,
        "ratio": RATIO,
        "steps": scale.steps,
        "tokens_per_step": scale.sequence_len * scale.micro_batch_size,
        "best": best,
        "arms": results,
        "wrong": wrong,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"base model: held-out loss {base.facts['eval_loss_before']:.3f} to {base.facts['eval_loss']:.3f}")
    print(table(results))
    for name, found in best.items():
        steps = found["steps_to_the_others_last_loss"].values()
        print(f"{name} at {found['rate']:g}: {found['last_loss']:.4f}; has the other's last loss at {list(steps)}")
    print("\n".join(f"RED  {line}" for line in wrong) or "green: both best rates lie inside their sweeps")
    return bool(wrong)


if __name__ == "__main__":
    children.end_with_this_process()
    sys.exit(main())
