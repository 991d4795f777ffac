"""The LoRA kernels' figures: a run on a CPU from end to end, its gate, its means and its table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import readme
from benchmarks.lora import measure, run
from benchmarks.lora.arms import SCALE, Exact, Ours, Peft
from benchmarks.lora.models import MODELS, TINY
from benchmarks.step.works import WORKS, Work
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
    loss, grads = arm.values()
    near = dict.fromkeys(grads, 1e-6)
    assert measure.check((loss, grads), exact, 1e-4, near)["worst_gradient"] < 1e-4
    name = next(name for name in exact[1] if "lora_A" in name)
    with pytest.raises(AssertionError, match=r"lora_A.weight is 1\.0e-02 from float32, at most 1\.0e-04"):
        measure.check((loss, grads | {name: grads[name] * 1.01}), exact, 1e-4, near)
    with pytest.raises(AssertionError, match="trained there or here alone"):
        measure.check((loss, {n: g for n, g in grads.items() if n != name}), exact, 1e-4, near)


VALUES = (2.0, {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, 1.0])})


def off(name: str, by: float, loss: float = 2.0) -> tuple[float, dict[str, torch.Tensor]]:
    return loss, VALUES[1] | {name: VALUES[1][name] * (1 + by)}


def test_ours_may_be_as_far_from_float32_as_the_peer_and_half_as_far_again() -> None:
    peer = {"a": 0.1, "b": 0.001}
    seen = measure.check(off("a", 0.14), VALUES, 0.02, peer)
    assert seen["of"] == "a" and seen["worst_gradient"] == pytest.approx(0.14)
    assert (seen["limit"], seen["peers"]) == (pytest.approx(0.15), 0.1)
    with pytest.raises(AssertionError, match=r"of a is 1\.6e-01 from float32, at most 1\.5e-01: the peer's"):
        measure.check(off("a", 0.16), VALUES, 0.02, peer)
    with pytest.raises(AssertionError, match=r"of b is 3\.0e-02 from float32, at most 2\.0e-02"):
        measure.check(off("b", 0.03), VALUES, 0.02, peer)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (off("b", float("nan")), "gradient of b has norm nan"),
        (off("b", -1.0), "gradient of b has norm 0"),
        (off("b", -2.0), "gradient of b has a cosine of -1.00"),
        (off("b", 0.0, loss=2.1), "the loss is 2.1"),
        (off("b", 0.0, loss=float("nan")), "the loss is nan"),
    ],
)
def test_a_peer_that_computes_something_else_is_red(found: Any, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        measure.check_peer(found, VALUES, 0.02)
    assert measure.check_peer(off("b", 0.3), VALUES, 0.02)[1]["b"] == pytest.approx(0.3)


def test_the_peers_gradients_are_unscaled_in_float32() -> None:
    arm = Peft.__new__(Peft)
    arm.model, arm.loss = torch.nn.Linear(2, 1, bias=False, dtype=torch.float16), torch.tensor(SCALE)
    arm.model.weight.grad = torch.tensor([[1e-3, 3e-4]], dtype=torch.float16)
    loss, grads = arm.values()
    assert loss == 1.0
    torch.testing.assert_close(grads["weight"], arm.model.weight.grad.float() / SCALE, rtol=1e-6, atol=0)


def test_few_trials_where_a_pass_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def seconds(each: float, device: str, trials: int) -> dict[str, list[float]]:
        asked.append(trials)
        return {"forward": [each] * trials, "backward": [each] * trials}

    monkeypatch.setattr(measure, "seconds", seconds)
    for each, trials in ((0.01, 30), (0.1, 10), (1.0, measure.FEWEST)):
        assert measure.timed(each, "cpu", 30)["trials"] == trials
    assert asked == [measure.WARMUP, 30, measure.WARMUP, 10, measure.WARMUP, measure.FEWEST]


def test_a_setting_without_memory_is_told_and_what_it_kept_is_freed() -> None:
    class Short:
        kept = True

        def forward(self) -> None:
            raise torch.OutOfMemoryError

        def reset(self) -> None:
            self.kept = False

    arm = Short()
    assert measure.in_setting(lambda: arm, "cpu", 2) == {"error": "out of memory"}
    assert not arm.kept


def test_a_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lora.json"
    out.write_text(json.dumps({"models": {"kept": {"error": "earlier"}}}), encoding="utf-8")
    assert run.main(["--model", "tiny", "--trials", "2", "--out", str(out)]) == 0
    models = json.loads(out.read_text())["models"]
    assert list(models) == ["kept", "tiny"]
    found = models["tiny"]
    assert found["settings"].keys() == {"rank 4, 1 x 32", "rank 8, 2 x 16"}
    assert found["gate"].keys() == {"peft", "ours"} and found["gate"]["ours"].keys() == {"4", "8"}
    assert found["gate"]["ours"]["4"]["limit"] == pytest.approx(1e-4) and found["gate"]["ours"]["4"]["peers"] < 1e-5
    setting = found["settings"]["rank 8, 2 x 16"]
    ratio = [setting[arm]["backward"]["seconds"]["median"] for arm in ("peft", "ours")]
    assert found["means"]["ours"]["settings"] == 2
    assert found["means"]["ours"]["backward"]["speed"]["least"] <= ratio[0] / ratio[1]
    said = capsys.readouterr().out
    assert "rank 8" in said and "ours: worst gradient" in said and "backward" in said


def test_each_row_is_kept_as_soon_as_it_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    turns: list[tuple[str, str]] = []

    class Child:
        def __init__(self, side: str, name: str, folder: Path, trials: int) -> None:
            self.side, self.name = side, name

        def turn(self, limit: float = 0) -> dict[str, Any]:
            turns.append((self.name, self.side))
            return {"error": "wrong"}

        def close(self) -> None:
            turns.append((self.name, "closed"))

    monkeypatch.setattr(run, "Child", Child)
    run.run(["smollm2_135m", "tiny"], tmp_path, 1, lambda name, row: turns.append((name, row["error"])))
    first, last = "smollm2_135m", "tiny"
    assert turns[:5] == [(first, "compile"), (first, "peft"), (first, "wrong"), (last, "peft"), (last, "wrong")]
    assert turns[5:] == [*[(last, "closed")] * 2, *[(first, "closed")] * 3]


def test_a_side_that_fails_leaves_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run.measure("tiny", lambda side: {"error": f"{side}: wrong"}, 1)
    assert found == {"title": TINY.title, "error": "peft: wrong"}
    assert "RED, no number: peft: wrong" in run.told(TINY, found)[0]
    monkeypatch.setattr(run.sys, "executable", "false")  # ends at once, and never takes its turn
    assert "error" in run.Child("peft", "tiny", tmp_path, 1).turn()


def test_what_is_compiled_is_two_layers_of_each_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[int, str]] = []

    class Counted(Ours):
        def forward(self) -> None:
            super().forward()
            passes.append((len(self.model.layers), self.name))

        def load(self, work: Work) -> None:
            super().load(work)
            self.name = work.name

    monkeypatch.setattr("benchmarks.lora.arms.Ours", Counted)
    measure.compiled(replace(TINY, shape=replace(TINY.shape, layers=3)))
    assert passes == [(2, "rank 4, 1 x 32"), (2, "rank 8, 2 x 16")]


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
    lines = run.told(model, {"gate": {}, "settings": SETTINGS, "means": found})
    assert len(lines) == 8 + 2
    assert lines[0].startswith(
        "met  SmolLM2-135M     ours         forward   speed     1.50x (1.00x to 2.00x, 2 settings)"
    )
    assert [line for line in lines if "c: peft: out of memory" in line]


def test_the_table_has_each_figure_beside_its_claim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.lora_kernels() == ""
    row = WHERE | {"gpu": "NVIDIA H200", "title": "Llama-3.1-8B", "recompute": "mlp"}
    row |= {"settings": SETTINGS, "means": run.means(SETTINGS)}
    (tmp_path / "lora_kernels.json").write_text(json.dumps({"models": {"llama3_8b": row}}), encoding="utf-8")
    text = readme.lora_kernels()
    assert "| Llama-3.1-8B, kernel by kernel, `mlp` | 2 | 1.50x (1.00 to 2.00) [1.48x] | 40.0% [25.7%] |" in text
    assert "NVIDIA H200, torch 2.11.0" in text
    assert text in readme.generated()[readme.PAGE]


def test_the_models_are_those_of_the_claims() -> None:
    parameters = {name: model.shape.parameters for name, model in MODELS.items()}
    assert parameters == {"smollm2_135m": 134_515_008, "smollm2_1.7b": 1_711_376_384, "llama3_8b": 8_030_261_248}
    assert MODELS["llama3_8b"].shape == WORKS["lora8b"].shape
    assert sum(len(model.claims[name]) for model in MODELS.values() for name in run.DIRECTIONS) == 12
    assert all(len(list(model.works(rank))) == 4 for model in MODELS.values() for rank in (8, 32))
    assert list(MODELS) == sorted(MODELS, key=lambda name: parameters[name]), "the smallest first"


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
