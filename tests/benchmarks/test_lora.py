"""The LoRA kernels' figures: a run on a CPU from end to end, its gate, its means and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import readme
from benchmarks.lora import run
from benchmarks.lora.arms import Exact, Ours, Peft
from benchmarks.lora.models import MODELS, TINY
from benchmarks.step.works import WORKS
from chronicals import cli
from chronicals.commands import bench
from tests.benchmarks.test_readme import WHERE

RANK = 4


@pytest.fixture(scope="module")
def exact() -> tuple[float, dict[str, torch.Tensor]]:
    return Exact(TINY, RANK).values()


@pytest.mark.parametrize("kind", [Peft, Ours])
def test_both_arms_compute_what_float32_does(kind: Any, exact: tuple[float, dict[str, torch.Tensor]]) -> None:
    arm = kind(TINY, RANK)
    arm.load(TINY.gate(RANK))
    for _ in range(2):  # a second trial finds what the first left
        arm.reset()
        arm.forward(), arm.backward()
    assert run.check(arm.values(), exact, 1e-4)["worst_gradient"] < 1e-4
    name = next(name for name in exact[1] if "lora_A" in name)
    loss, grads = arm.values()
    with pytest.raises(AssertionError, match=r"lora_A.weight is 1\.0e-02 from float32"):
        run.check((loss, grads | {name: grads[name] * 1.01}), exact, 1e-4)
    with pytest.raises(AssertionError, match="trained there or here alone"):
        run.check((loss, {n: g for n, g in grads.items() if n != name}), exact, 1e-4)


def test_a_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lora.json"
    out.write_text(json.dumps({"models": {"kept": {"error": "earlier"}}}), encoding="utf-8")
    assert run.main(["--model", "tiny", "--trials", "2", "--out", str(out)]) == 0
    models = json.loads(out.read_text())["models"]
    assert list(models) == ["kept", "tiny"]
    found = models["tiny"]
    assert found["settings"].keys() == {"rank 4, 1 x 32", "rank 8, 2 x 16"}
    assert found["gate"].keys() == {"peft", "ours"} and found["gate"]["ours"].keys() == {"4", "8"}
    setting = found["settings"]["rank 8, 2 x 16"]
    ratio = [setting[arm]["backward"]["seconds"]["median"] for arm in ("peft", "ours")]
    assert found["means"]["ours"]["settings"] == 2
    assert found["means"]["ours"]["backward"]["speed"]["least"] <= ratio[0] / ratio[1]
    assert "backward" in capsys.readouterr().out


def test_a_side_that_fails_leaves_no_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "spawn", lambda side, *a: {"error": f"{side}: wrong"})
    found = run.measure("tiny", tmp_path, 1)
    assert found == {"title": TINY.title, "error": "peft: wrong"}
    assert "RED, no number: peft: wrong" in run.told(TINY, found)[0]


def passes(seconds: float, peak: int | None) -> dict[str, Any]:
    each = {"seconds": {"median": seconds, "least": seconds, "most": seconds}, "peak_bytes": peak}
    return {"forward": each, "backward": each}


SETTINGS: dict[str, Any] = {
    "a": {"peft": passes(2.0, 100), "ours": passes(1.0, 50), "ours_graphs": passes(0.5, 60)},
    "b": {"peft": passes(1.0, 100), "ours": passes(1.0, 70), "ours_graphs": {"error": "out of memory"}},
    "c": {"peft": {"error": "out of memory"}, "ours": passes(1.0, 70)},
}


def test_means_are_of_settings_that_both_ran() -> None:
    found = run.means(SETTINGS)
    assert found["ours"]["settings"] == 2 and found["ours_graphs"]["settings"] == 1
    assert found["ours"]["forward"]["speed"] == {"mean": 1.5, "least": 1.0, "most": 2.0}
    assert found["ours"]["forward"]["memory"]["mean"] == pytest.approx(0.4)
    model = MODELS["smollm2_135m"]
    lines = run.told(model, {"settings": SETTINGS, "means": found})
    assert len(lines) == 8 + 2
    assert lines[0].startswith(
        "met  SmolLM2-135M     ours         forward   speed     1.50x (1.00x to 2.00x, 2 settings)"
    )
    assert [line for line in lines if "c: peft: out of memory" in line]


def test_the_table_has_each_figure_beside_its_claim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.lora_kernels() == ""
    row = WHERE | {"gpu": "NVIDIA H200", "title": "Llama-3.1-8B", "settings": SETTINGS, "means": run.means(SETTINGS)}
    (tmp_path / "lora_kernels.json").write_text(json.dumps({"models": {"llama3_8b": row}}), encoding="utf-8")
    text = readme.lora_kernels()
    assert "| Llama-3.1-8B, kernel by kernel | 2 | 1.50x (1.00 to 2.00) [1.48x] | 40.0% [25.7%] |" in text
    assert "NVIDIA H200, torch 2.11.0" in text
    assert text in readme.generated()[readme.PAGE]


def test_the_models_are_those_of_the_claims() -> None:
    parameters = {name: model.shape.parameters for name, model in MODELS.items()}
    assert parameters == {"smollm2_135m": 134_515_008, "smollm2_1.7b": 1_711_376_384, "llama3_8b": 8_030_261_248}
    assert MODELS["llama3_8b"].shape == WORKS["lora8b"].shape
    assert sum(len(model.claims[name]) for model in MODELS.values() for name in run.DIRECTIONS) == 12
    assert all(len(list(model.works())) == 8 for model in MODELS.values())


def test_the_command_line_reaches_the_runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(bench, "_run", lambda *a: asked.append(a) or 1)
    assert cli.run(["bench", "lora", "--model", "llama3_8b", "--out", str(tmp_path / "out.json")]) == 1
    ((module, repeated, flags, out, _),) = asked
    assert (module, repeated, flags, out) == (
        *("benchmarks.lora.run", {"--model": ["llama3_8b"]}, []),
        tmp_path / "out.json",
    )


def test_without_a_gpu_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--out", str(tmp_path / "out.json")]) == 2
    assert capsys.readouterr().err.startswith("error: no GPU here")
