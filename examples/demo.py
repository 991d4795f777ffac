"""`make demo`: fine-tune a small model on the standard library's docstrings and prove that it learnt.

Everything goes to outputs/demo, which is made anew each time. Exits 1 where a claim does not hold.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

from demo_claims import completions, questions, transformers_loss, unigram_entropy
from demo_data import write_chats
from demo_model import write_base_model

from chronicals import TrainConfig, Trainer
from chronicals.commands.report import write_report
from chronicals.data.prepare import prepare
from chronicals.data.tokenizer import load_tokenizer

WORK = Path("outputs/demo")


def main() -> int:
    start = time.perf_counter()
    shutil.rmtree(WORK, ignore_errors=True)  # a fresh run each time
    (WORK / "base").mkdir(parents=True)
    write_chats(WORK)
    write_base_model(WORK / "base", WORK / "train.jsonl")
    config = TrainConfig.load("recipes/demo.yaml")
    result, run = Trainer(config).train(), Path(config.output_dir)
    if result.exit_code:
        return result.exit_code
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = (row["eval_loss"] for row in rows if "eval_loss" in row)
    held_out = prepare(config, load_tokenizer(config)).eval
    unigram, independent = unigram_entropy(held_out), transformers_loss(run, held_out)
    prompts, truths = zip(*questions(WORK / "eval.jsonl"), strict=True)
    answers = (completions(WORK / "base", run, prompts), completions(run, run, prompts))
    for question, truth, untrained, trained in zip(prompts, truths, *answers, strict=True):
        print(f"\n{question}\n  before: {untrained[:60]!r}\n  after:  {trained!r}\n  truth:  {truth!r}")

    # transformers computes in float32, whatever we trained in
    tolerance = 1e-4 if json.loads((run / "config.json").read_text())["dtype"] == "float32" else 1e-2
    fall = 1 - after / before
    claims = {
        f"evaluation loss {before:.3f} -> {after:.3f}: down by {fall:.1%}, at least 40%": fall >= 0.4,
        f"below the unigram entropy of the supervised tokens, {unigram:.3f}": after < unigram,
        f"transformers loads the checkpoint and finds {independent:.3f} too": abs(independent - after) <= tolerance,
    }
    for claim, holds in claims.items():
        print(f"\n{'yes' if holds else 'NO '}  {claim}")
    print(f"\nmodel {run}\nreport {write_report(run)}\nin {time.perf_counter() - start:.0f} s")
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
