"""Is our loss curve that of transformers with torch's AdamW? The same weights, batches and recipe for 200 steps.

    python -m benchmarks.precision.curve --data FILE.jsonl [--out benchmarks/results/curve.json]

Every arm computes in bfloat16 with float32 masters and moments: ours by the product's trainer, transformers by a model
of bfloat16 weights whose gradients go to masters that `torch.optim.AdamW` updates, each document a padded row of its
own. The distance of two curves is the root of the mean of their squared differences over the steps.

No two kernels round alike, and a curve answers to its roundings. **The spread** is therefore measured, as the largest
distance between any two runs of transformers in bfloat16 on the same batches, by whatever kernels: its own with two
attentions, with the documents of a batch in two orders, and with longer padding, for which libraries take other
kernels; compiled, where fused ops keep float32 between them as ours do; and Liger's, where they are installed. The
first four round at the same places, each op to bfloat16, and differ in the order of sums alone: their spread is told
beside, for it is the narrower one, and no gate.

Gate: our mean distance to all of these runs is within the spread, and that of a run whose learning rate is 5% too high
is not, or the spread would show nothing. Everyone's distance to transformers in float32 is told beside. Exit code 1
where the gate is red.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.harness import installed
from benchmarks.precision.text import Shape, make_tokenizer, measured_where, write_model, write_text
from chronicals.config import TrainConfig
from chronicals.data.batch import PackedBatch
from chronicals.optim.groups import decay_names
from chronicals.optim.schedules import Schedule, lr_at
from chronicals.train import setup
from chronicals.train.trainer import Trainer

RESULTS = Path(__file__).resolve().parents[1] / "results" / "curve.json"
SHAPE = Shape(layers=4, hidden=256, intermediate=704, heads=4, kv_heads=2, vocab=4096)
RECIPE = {"learning_rate": 3e-4, "lr_scheduler": "cosine", "warmup_steps": 20, "weight_decay": 0.1}
SEED = 1
OFF = 1.05  # what the run that must fail has its learning rate multiplied by


@dataclass(frozen=True)
class Theirs:
    """One run of transformers."""

    dtype: torch.dtype = torch.bfloat16
    attention: str = "sdpa"
    reverse: bool = False  # the documents of a batch, last first
    rate: float = 1.0  # times the learning rate
    longest: int = 0  # what documents are padded to, at least
    rows: int = 0  # of a batch, at least: padding makes up for documents
    compiled: bool = False  # by torch.compile, every batch padded to one shape
    liger: bool = False


EAGER = {
    "transformers, sdpa": Theirs(),
    "transformers, eager": Theirs(attention="eager"),
    "transformers, sdpa, reversed": Theirs(reverse=True),
    "transformers, sdpa, padded": Theirs(longest=576),
}
OTHERS = {"transformers, compiled": Theirs(compiled=True)}
if installed("liger_kernel"):
    OTHERS["transformers, Liger kernels"] = Theirs(liger=True)  # last: they stay in transformers until the process ends
RUNS = EAGER | OTHERS
FLOAT32 = "transformers, float32"
WRONG = "transformers, learning rate 5% off"


def config(folder: Path, steps: int, *, bf16: bool, device: str) -> TrainConfig:
    """The recipe, for the text and the model in `folder`."""
    return TrainConfig(
        base_model=folder / "model",
        datasets=[{"path": folder / "train.jsonl", "type": "completion"}],
        dataset_prepared_path=folder / "prepared",
        dataset_processes=1,
        sequence_len=512,
        micro_batch_size=4,
        max_steps=steps,
        bf16=bf16,
        device=device,
        seed=SEED,
        save_strategy="no",
        output_dir=folder / "ours",
        **RECIPE,
    )


def ours(run: TrainConfig) -> list[float]:
    """The trainer's loss at each step."""
    result = Trainer(run, console=Console(file=io.StringIO())).train()
    assert result.status == "finished", result.summary
    rows = (Path(run.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


def theirs(run: TrainConfig, windows: Sequence[PackedBatch], how: Theirs) -> list[float]:
    """The loss at each step of `torch.optim.AdamW` on float32 masters of a model of transformers."""
    device = torch.device(run.device)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        run.base_model, dtype=how.dtype, attn_implementation=how.attention
    ).to(device)
    named = dict(model.named_parameters())
    if how.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2(cross_entropy=False, fused_linear_cross_entropy=False, model=model)
    if how.compiled:
        documents = [rows_of(batch) for batch in windows]
        longest = max(len(tokens) for rows in documents for tokens, _ in rows)
        how = replace(how, rows=max(map(len, documents)), longest=longest)
        model = torch.compile(model, dynamic=False)
    masters = {name: p.detach().clone().float().requires_grad_() for name, p in named.items()}
    decayed = decay_names(masters)
    groups = [
        {
            "params": [p for n, p in masters.items() if (n in decayed) == decays],
            "weight_decay": decays * run.weight_decay,
        }
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(run.adam_beta1, run.adam_beta2), eps=run.adam_epsilon, fused=True)
    schedule = Schedule(run.lr_scheduler, run.learning_rate, warmup_steps=run.warmup_steps or 0)
    losses = []
    for step, batch in enumerate(windows):
        loss = loss_of(model, batch, device, how)
        loss.backward()
        for name, parameter in named.items():
            masters[name].grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters.values(), run.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = how.rate * lr_at(schedule, step, len(windows))
        optimizer.step()
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(masters[name])
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def loss_of(model: torch.nn.Module, batch: PackedBatch, device: torch.device, how: Theirs) -> Tensor:
    """() float32: the batch's mean loss, each document in a row of its own, padded on the right."""
    documents = rows_of(batch)
    if how.reverse:
        documents = documents[::-1]
    longest = max(how.longest, *(len(tokens) for tokens, _ in documents))
    ids = torch.zeros(max(how.rows, len(documents)), longest, dtype=torch.int64)
    targets = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    mask[len(documents) :] = 1  # attention without anything to look at would be NaN
    for i, (tokens, labels) in enumerate(documents):
        ids[i, : len(tokens)], targets[i, : len(tokens)], mask[i, : len(tokens)] = tokens, labels, 1
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    total = F.cross_entropy(logits.float().flatten(0, 1), targets.to(device).flatten(), reduction="sum")
    return total * batch.grad_scale.to(device)[0]


def rows_of(batch: PackedBatch) -> list[tuple[Tensor, Tensor]]:
    """Tokens and next tokens (-100: none asked) of each document; those of padding, which have none, are left out."""
    labels = torch.full((len(batch.tokens) + 1,), -100, dtype=torch.int64)
    labels[batch.target_rows.long()] = batch.targets  # padding entries fall on the row beyond the last
    bounds = itertools.pairwise(batch.cu_seqlens.tolist())
    found = [(batch.tokens[a:b], labels[a:b]) for a, b in bounds]
    return [(tokens, wanted) for tokens, wanted in found if (wanted != -100).any()]


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    return statistics.fmean((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5


def spread_of(curves: dict[str, list[float]], runs: Iterable[str]) -> float:
    """The largest distance between two of `runs`."""
    return max(distance(curves[a], curves[b]) for a, b in itertools.combinations(runs, 2))


def judge(curves: dict[str, list[float]]) -> tuple[float, dict[str, float], list[str]]:
    """The spread, the mean distance of the other curves to the runs it is made of, and what is not as it should be."""
    spread = spread_of(curves, RUNS)
    away = {
        name: statistics.fmean(distance(curve, curves[run]) for run in RUNS)
        for name, curve in curves.items()
        if name not in RUNS
    }
    wrong = []
    if not away["ours"] <= spread:  # NaN is wrong too
        wrong.append(f"our curve is {away['ours']:.5f} from transformers', whose own spread is {spread:.5f}")
    if not away[WRONG] > spread:
        wrong.append(f"a learning rate 5% off is only {away[WRONG]:.5f} away: a spread of {spread:.5f} shows nothing")
    return spread, away, wrong


def study(folder: Path, data: Path, steps: int, device: str) -> dict[str, list[float]]:
    """Every arm's curve."""
    write_text(folder, data)
    write_model(folder / "model", SHAPE, SEED, make_tokenizer(folder / "train.jsonl", SHAPE.vocab))
    run = config(folder, steps, bf16=True, device=device)
    curves = {"ours": ours(run)}
    loader = setup.load_data(run, progress=False).train
    windows = [batch for step in range(steps) for batch in loader.window(step)]
    assert len(windows) == steps, "one micro-batch a step"
    runs = {WRONG: Theirs(rate=OFF), FLOAT32: Theirs(torch.float32)} | RUNS
    return curves | {name: theirs(run, windows, how) for name, how in runs.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSONL; the strings of a row are one document")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="what to record where this is a copy without history")
    options = parser.parse_args(argv)
    command = f"python -m benchmarks.precision.curve --data {options.data.name} --steps {options.steps}"
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        curves = study(Path(folder), options.data, options.steps, options.device)
    spread, away, wrong = judge(curves)
    report: dict[str, Any] = {
        **measured_where(command, options.device, options.commit),
        "seconds": round(time.perf_counter() - start, 1),
        "shape": vars(SHAPE),
        "recipe": RECIPE,
        "spread": spread,
        "spread_of_runs": list(RUNS),
        "spread_of_eager_runs": spread_of(curves, EAGER),
        "mean_distance_of_ours_to_eager_runs": statistics.fmean(distance(curves["ours"], curves[run]) for run in EAGER),
        "distance_to_float32": {name: distance(curve, curves[FLOAT32]) for name, curve in curves.items()},
        "mean_distance_to_the_runs_of_the_spread": away,
        "wrong": wrong,
        "curves": curves,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{'':36} {'first':>8} {'last':>8} {'distance':>9} {'to float32':>11}")
    for name, curve in curves.items():
        cell = f"{away[name]:9.5f}" if name in away else f"{'':9}"
        print(f"{name:36} {curve[0]:8.4f} {curve[-1]:8.4f} {cell} {distance(curve, curves[FLOAT32]):11.5f}")
    eager = report["spread_of_eager_runs"], report["mean_distance_of_ours_to_eager_runs"]
    print(f"spread of transformers' {len(RUNS)} runs in bfloat16: {spread:.5f}")
    print(f"that of its {len(EAGER)} eager runs alone: {eager[0]:.5f}, from which ours is {eager[1]:.5f} away")
    print("\n".join(f"RED  {line}" for line in wrong) or "green: our curve is within it, a rate 5% off is not")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
