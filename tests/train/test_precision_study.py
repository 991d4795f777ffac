"""The benchmarks of precision: that their gates can fail, and that they run; their figures come from a GPU."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.precision import arms, curve, report, run
from benchmarks.precision.text import Shape, make_tokenizer, write_model, write_text
from chronicals.train import setup
from tests.train.helpers import WORDS

TINY = Shape(layers=1, hidden=32, intermediate=48, heads=2, kv_heads=1, vocab=300)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Rows of questions and answers."""
    rng, file = random.Random(0), tmp_path / "text.jsonl"
    rows = [{"q": " ".join(rng.choices(WORDS, k=9)), "a": " ".join(rng.choices(WORDS, k=9))} for _ in range(120)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def figures(train_loss: float, eval_loss: float) -> dict[str, Any]:
    return {"train_loss": train_loss, "eval_loss": eval_loss}


def good() -> run.Results:
    """Bands of 0.02 and 0.03; the formats inside, plain bf16 outside."""
    names, losses = [arm.name for arm in arms.MASTERS], [(2.00, 3.00), (2.02, 2.97), (2.01, 2.98)]
    masters = {name: figures(*pair) for name, pair in zip(names, losses, strict=True)}
    return masters | {
        arm.name: figures(2.5, 3.5) if arm.plain else figures(2.019, 2.9)
        for arm in arms.ARMS
        if arm not in arms.MASTERS
    }


def test_the_band_is_what_seeds_do() -> None:
    band, wrong = run.judge(good())
    assert band == pytest.approx({"train_loss": 0.02, "eval_loss": 0.03})
    assert wrong == []


@pytest.mark.parametrize(
    ("arm", "result", "says"),
    [
        (
            "fp16: true",
            figures(2.03, 3.0),
            "fp16: true: train_loss is +0.0300 from the master's, outside a band of 0.0200",
        ),
        (
            "adamw_8bit",
            figures(2.0, 3.04),
            "adamw_8bit: eval_loss is +0.0400 from the master's, outside a band of 0.0300",
        ),
        ("adamw_bf16_sr", figures(float("nan"), 3.0), "train_loss is +nan from the master's, outside"),
        ("plain bf16", figures(2.01, 3.5), "plain bf16: train_loss is +0.0100 from the master's, inside a band"),
        ("adamw_8bit", {"failed": "GuardError: step 3"}, "adamw_8bit: GuardError: step 3"),
        ("fp32 master, seed 2", {"failed": "no memory"}, "no noise band without all runs with float32 masters"),
    ],
)
def test_what_turns_the_study_red(arm: str, result: dict[str, Any], says: str) -> None:
    _, wrong = run.judge(good() | {arm: result})
    assert any(says in line for line in wrong), wrong


def test_a_curve_outside_the_spread_is_red_and_so_is_a_spread_that_shows_nothing() -> None:
    flat = [1.0] * 4
    curves = {name: [x + 0.005 * i for x in flat] for i, name in enumerate(curve.RUNS)}
    curves |= {"ours": [1.01] * 4, curve.WRONG: [1.05] * 4, curve.FLOAT32: flat}
    spread, _, wrong = curve.judge(curves)
    assert (spread, wrong) == (pytest.approx(0.005 * (len(curve.RUNS) - 1)), [])
    _, _, wrong = curve.judge(curves | {"ours": [1.01, 1.01, 1.01, 1.2]})
    assert len(wrong) == 1 and wrong[0].startswith("our curve is 0.09")
    _, _, wrong = curve.judge(curves | {"ours": [float("nan")] * 4, curve.WRONG: [1.02] * 4})
    assert [line.split()[0] for line in wrong] == ["our", "a"]


def test_the_study_runs_every_arm(tmp_path: Path, text: Path) -> None:
    """Three steps each on the CPU, plain bf16 included."""
    run.prepare(tmp_path, text, TINY)
    shared = arms.Study(tmp_path, 3, 1e-3, 64, 2, "cpu")
    results = run.run_all(arms.train, {arm.name: (arm, shared) for arm in arms.ARMS}, together=False)
    assert [name for name, result in results.items() if "failed" in result] == [], results
    before = {result["eval_loss_before"] for name, result in results.items() if name != "fp16: true"}
    assert len(before) == len(arms.MASTERS), "arms start from the first master's weights"
    assert all(result["eval_loss"] < result["eval_loss_before"] for result in results.values())
    assert results["plain bf16"]["unmoved_tensors"] != results["fp32 master, seed 1"]["unmoved_tensors"] == "0 of 14"
    band, _ = run.judge(results)
    assert len(run.table(results, band).splitlines()) == 2 + len(arms.ARMS)


def test_in_float32_our_curve_is_that_of_transformers(tmp_path: Path, text: Path) -> None:
    """Weights, batches, clipping, decay and schedule are the same, so that only kernels are left to differ."""
    write_text(tmp_path, text)
    write_model(tmp_path / "model", TINY, curve.SEED, make_tokenizer(tmp_path / "train.jsonl", TINY.vocab))
    config = curve.config(tmp_path, 8, bf16=False, device="cpu")
    ours = curve.ours(config)
    loader = setup.load_data(config, progress=False).train
    windows = [batch for step in range(8) for batch in loader.window(step)]
    for how in (curve.Theirs(torch.float32), curve.Theirs(torch.float32, reverse=True)):
        assert curve.theirs(config, windows, how) == pytest.approx(ours, rel=2e-6)
    assert curve.theirs(config, windows, curve.Theirs(torch.float32, rate=curve.OFF)) != pytest.approx(ours, rel=2e-6)


def test_the_curves_of_every_arm(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps in bfloat16 on the CPU; what is judged is judged on a GPU. Compiling takes a minute: left out."""
    monkeypatch.setattr(curve, "SHAPE", TINY)
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    curves = curve.study(tmp_path, text, 3, "cpu")
    assert list(curves) == ["ours", curve.WRONG, curve.FLOAT32, *curve.RUNS]
    for losses in curves.values():
        assert losses == pytest.approx(curves[curve.FLOAT32], rel=2e-2)
    uncompiled = curves.pop("transformers, compiled")
    assert uncompiled == pytest.approx(curves["transformers, sdpa"], rel=1e-5), "rows of padding change nothing"
    assert len({tuple(losses) for losses in curves.values()}) == len(curves), "no two arms are the same run"


def test_the_page_is_what_the_results_say() -> None:
    """After a new measurement: `python -m benchmarks.precision.report --write-docs`."""
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.filled(page) == page


def test_the_page_tells_the_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the commands to the page, with figures that were made up: exit codes, files, tables."""
    told = {"unmoved_tensors": "0 of 14", "step_ms": 5.0, "peak_memory_gib": 0.5}
    results = {name: row | told for name, row in good().items()} | {"adamw_8bit": {"failed": "GuardError: step 3"}}
    flat = [1.0] * 200
    curves = {name: [x + 0.005 * i for x in flat] for i, name in enumerate(curve.RUNS)}
    curves |= {"ours": [1.01] * 200, curve.WRONG: [1.05] * 200, curve.FLOAT32: flat}
    monkeypatch.setattr(run, "prepare", lambda *arguments: None)
    monkeypatch.setattr(run, "run_all", lambda *arguments, **options: results)
    monkeypatch.setattr(curve, "study", lambda *arguments: curves)
    for module in (run, curve):
        monkeypatch.setattr(module, "RESULTS", tmp_path / f"{module.__name__}.json")
    common = ["--data", str(text), "--device", "cpu", "--commit", "0123456789"]
    assert run.main([*common, "--out", str(run.RESULTS)]) == 1
    assert "RED  adamw_8bit: GuardError: step 3" in capsys.readouterr().out
    assert curve.main([*common, "--out", str(curve.RESULTS)]) == 0
    assert "green: our curve is within it" in capsys.readouterr().out
    page = report.filled(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert "| plain bf16 | 2.5000 | +0.5000 | 3.5000 | +0.5000 | 0 of 14 |" in page
    assert "| adamw_8bit | failed |" in page and "| noise band |  | 0.0200 |  | 0.0300 |  |" in page
    assert "1,000 steps of 4,096 tokens" in page and "Our loss curve of 200 steps" in page
    assert f"CPU, torch {torch.__version__}" in page and "commit 0123456, `python -m benchmarks.precision.run" in page
