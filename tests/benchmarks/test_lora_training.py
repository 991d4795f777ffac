"""The studies of adapters: that their gates can fail, and that they run; their figures come from a GPU."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.lora_training import base, gsm8k, plus, report
from benchmarks.precision.text import Shape
from chronicals.errors import GuardError
from tests.train.helpers import WORDS

TINY = base.Scale(
    shape=Shape(layers=1, hidden=64, intermediate=64, heads=2, kv_heads=1, vocab=320),
    files=3,
    sequence_len=64,
    pretraining_steps=8,
    pretraining_micro_batch_size=2,
    steps=6,
    micro_batch_size=2,
)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Rows as GSM8K has them."""
    rng, file = random.Random(0), tmp_path / "questions.jsonl"
    rows = [{key: " ".join(rng.choices(WORDS, k=6)) for key in ("question", "answer")} for _ in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def curves(*lasts: float) -> dict[str, Any]:
    """Of each seed: from 3.0 in equal steps to these losses, over 40 steps."""
    found = {
        str(seed): [(step, 3.0 + (last - 3.0) * step / 40) for step in (0, 10, 20, 30, 40)]
        for seed, last in zip(plus.SEEDS, lasts, strict=True)
    }
    return {"curves": found, "seconds": 1.0}


def good() -> plus.Results:
    """LoRA best at its third rate, LoRA+ at its fourth, and a rate of each that is too high."""
    results = {}
    for method, best, loss in ((plus.LORA, 2, 2.0), (plus.PLUS, 3, 1.5)):
        for i, rate in enumerate(method.rates):
            end = loss + 0.1 * abs(i - best)
            results[plus.arm(method, rate)] = curves(end, end + 0.01)
        results[plus.arm(method, method.rates[-1])] = {"stopped": "step 3: the loss is nan"}
    return results


def test_the_best_rates_and_the_steps_to_the_others_loss() -> None:
    best, wrong = plus.judge(good())
    assert wrong == []
    assert (best["LoRA"]["rate"], best["LoRA+"]["rate"]) == (plus.LORA.rates[2], plus.PLUS.rates[3])
    assert best["LoRA+"]["steps_to_the_others_last_loss"] == {"1": 30, "2": 30}  # 27, at the next evaluation
    assert best["LoRA"]["steps_to_the_others_last_loss"] == {"1": None, "2": None}
    assert best["LoRA"]["last_loss"] == pytest.approx(2.005)


@pytest.mark.parametrize(
    ("method", "at", "result", "says"),
    [
        (plus.LORA, 3, {"failed": "OSError: no space"}, "LoRA at 0.002: OSError: no space"),
        (plus.LORA, 0, curves(1.0, 1.0), "LoRA: its best rate 0.00025 is an end of the sweep"),
        (plus.PLUS, 6, curves(1.0, 1.0), "LoRA+: its best rate 0.002 is an end of the sweep"),
        (plus.PLUS, 2, curves(3.1, -1.0), "LoRA+: its best run learnt nothing"),
    ],
)
def test_what_is_no_fair_comparison(method: plus.Method, at: int, result: dict[str, Any], says: str) -> None:
    _, wrong = plus.judge(good() | {plus.arm(method, method.rates[at]): result})
    assert any(says in line for line in wrong), wrong


def test_no_rate_that_can_be_trained_with() -> None:
    stopped = {plus.arm(plus.PLUS, rate): {"stopped": "nan"} for rate in plus.PLUS.rates}
    assert plus.judge(good() | stopped) == ({}, ["LoRA+: no rate was trained to the end"])


def found(**values: float | str) -> dict[str, Any]:
    return {
        "eval_loss_before": 3.0,
        "eval_loss": 2.0,
        "eval_tokens": 12345,
        "adapter_float32": 2.0,
        "merged_float32": 2.0002,
        "dtype": "bfloat16",
        "seconds": 9.0,
    } | values


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, None),
        ({"eval_loss": 3.0}, "lora: held-out loss 3.0000, trained 3.0000"),
        ({"eval_loss": float("nan")}, "lora: held-out loss 3.0000, trained nan"),
        ({"merged_float32": 2.001}, "lora: held-out loss 2.000000 with the adapter, 2.001000 merged: 5.0e-04 apart"),
        ({"dtype": "float32"}, "1.0e-04 apart, tolerance 1.0e-05 in float32"),
        ({"merged_float32": float("nan")}, "nan merged"),
    ],
    ids=str,
)
def test_what_turns_the_demonstration_red(values: dict[str, Any], says: str | None) -> None:
    wrong = gsm8k.judge({"lora": found(**values)})
    assert (wrong == []) if says is None else (len(wrong) == 1 and says in wrong[0])


def test_adapters_learn_and_merging_keeps_it(tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way in small, by the commands: pre-trained, trained in 16 and in 4 bits, merged, evaluated."""
    monkeypatch.setattr(gsm8k, "LEARNING_RATE", 1e-2)
    made, results = gsm8k.study(tmp_path, questions, TINY)
    assert made.facts["eval_loss"] < made.facts["eval_loss_before"]
    assert gsm8k.judge(results) == [] and list(results) == ["lora", "qlora"]
    for name, told in results.items():
        assert told["eval_loss_before"] - told["eval_loss"] > 0.05, "a base model of no loss would be merged right"
        told["merged_float32"] = gsm8k.float32_loss(
            base.config(tmp_path, TINY, "gsm8k", base_model=made.folder), made.folder
        )
        assert "apart" in gsm8k.judge({name: told})[0], "the base model without what was learnt"
    assert results["lora"]["eval_loss"] == pytest.approx(results["lora"]["adapter_float32"], rel=1e-5)
    assert results["qlora"]["eval_loss_before"] != pytest.approx(results["lora"]["eval_loss_before"], rel=1e-5)
    with pytest.raises(RuntimeError, match=r"exits 2: .*is not empty"):
        gsm8k.command(tmp_path / "log", "merge", str(tmp_path / "lora"), "--out", str(tmp_path / "lora-merged"))


def test_every_rate_is_run_from_the_same_start(
    tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rates a method on the CPU; one that diverges is told as such."""
    train = plus.train

    def trained(run: Any) -> list[dict[str, Any]]:
        if run.learning_rate == 0.5:
            raise GuardError("step 2: the loss is nan")
        return train(run)

    monkeypatch.setattr(plus, "train", trained)
    monkeypatch.setattr(plus, "LORA", plus.Method("LoRA", 1.0, (1e-2, 0.5)))
    monkeypatch.setattr(plus, "PLUS", plus.Method("LoRA+", 16.0, (1e-2,)))
    monkeypatch.setattr(plus, "METHODS", (plus.LORA, plus.PLUS))
    _, results = plus.study(tmp_path, questions, TINY)
    assert list(results) == ["LoRA at 0.01", "LoRA at 0.5", "LoRA+ at 0.01"]
    assert results["LoRA at 0.5"] == {"stopped": "step 2: the loss is nan"}
    pair = [results[name]["curves"] for name in ("LoRA at 0.01", "LoRA+ at 0.01")]
    for curve in (curve for run in pair for curve in run.values()):
        assert [step for step, _ in curve] == list(range(TINY.steps + 1)) and curve[-1][1] < curve[0][1]
    assert len({curve[0][1] for run in pair for curve in run.values()}) == 1, "from the base model's loss"
    assert len({curve[-1][1] for run in pair for curve in run.values()}) == 4, "no two runs are the same"
    assert len(plus.table(results).splitlines()) == 3


def test_the_page_is_what_the_results_say() -> None:
    """After a new measurement: `python -m benchmarks.lora_training.report --write-docs`."""
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.filled(page) == page


def test_the_page_tells_the_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the commands to the page, with figures that were made up: exit codes, files, tables."""
    facts = {
        "text": "sources",
        "shape": vars(Shape()),
        "steps": 1500,
        "tokens": 12_345_678,
        "eval_loss_before": 9.1,
        "eval_loss": 2.5,
    }
    made = base.Base(tmp_path, facts)
    wrong = found(merged_float32=2.1)
    monkeypatch.setattr(plus, "study", lambda *arguments: (made, good()))
    monkeypatch.setattr(gsm8k, "study", lambda *arguments: (made, {"lora": found(), "qlora": wrong}))
    for module in (plus, gsm8k):
        monkeypatch.setattr(module, "RESULTS", tmp_path / f"{module.__name__}.json")
    common = ["--data", str(questions), "--device", "cpu", "--commit", "0123456789"]
    assert plus.main([*common, "--out", str(plus.RESULTS), "--steps", "40"]) == 0
    assert "LoRA+ at 0.00025: 1.5050; has the other's last loss at [30, 30]" in capsys.readouterr().out
    assert gsm8k.main([*common, "--out", str(gsm8k.RESULTS)]) == 1
    assert "RED  qlora: held-out loss 2.000000 with the adapter, 2.100000 merged" in capsys.readouterr().out
    old = "\n".join(f"{report.BEGIN.format(name)}\nold\n{report.END.format(name)}" for name in report.PARTS)
    page = report.filled(f"before\n{old}\nafter\n")
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert "| LoRA | 0.001 | 0.001 | 2.0000, 2.0100 | not within them, not within them |" in page
    assert "| LoRA+ | 0.00025 | 0.004 | 1.5000, 1.5100 | 30 (1.33x), 30 (1.33x) |" in page
    assert "0.016: diverged" in page and "12.3 million tokens; held-out loss 9.100 to 2.500" in page
    assert "| `adapter: lora` | 3.0000 | 2.0000 | 2.00000 | 2.00020 | 1.0e-04 | 2.4e-04 |" in page
    assert "Red: qlora: held-out loss" in page and "12,345 held-out tokens" in page
    assert f"CPU, torch {torch.__version__}" in page and "`python -m benchmarks.lora_training.plus" in page
