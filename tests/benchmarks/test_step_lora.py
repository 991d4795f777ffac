"""The step benchmark where an adapter is trained: one adapter for all arms, gates that see who does not train it."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import readme
from benchmarks.peers.adapters import PEERS_WITH_ADAPTER, Peft
from benchmarks.step import run, summary
from benchmarks.step.adapters import (
    PLAIN,
    VARIANTS,
    WEIGHTS_FILE,
    AdapterReference,
    adapter_folder,
    expected,
    expected_where_possible,
    gate_file,
    load_gate,
    variant,
)
from benchmarks.step.arm import LORA_ARMS, Arm, Spec, build
from benchmarks.step.measure import measure
from benchmarks.step.ours import OursWithAdapter, judged
from benchmarks.step.reference import make_checkpoint
from benchmarks.step.works import LLAMA_8B, WORKS, Work, batches
from tests.benchmarks.test_readme import WHERE
from tests.benchmarks.test_step import NUMBERS, section

TINY, LLAMA = WORKS["tiny_lora"], WORKS["tiny_llama"]
Made = tuple[Path, dict[str, float]]


def made(work: Work, folder: Path) -> Made:
    make_checkpoint(work, folder, ["the quick brown fox jumps over the lazy dog"])
    return folder, expected(work, folder, PLAIN)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(TINY, tmp_path_factory.mktemp("checkpoint"))


def row(kind: type[Arm], checkpoint: Made, work: Work = TINY) -> dict[str, Any]:
    folder, exact = checkpoint
    return measure(lambda: kind(Spec("ours"), work, folder), work, exact, time.time())  # type: ignore[call-arg]


class DetachedLoss(Peft):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).detach().requires_grad_()


class FrozenAdapters(Peft):
    """Right losses and gradients, and an optimizer that never runs."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.optimizer.step = lambda: None  # type: ignore[method-assign, assignment]


class OneFrozenMatrix(Peft):
    def adapted(self, model: Any) -> Any:
        model = super().adapted(model)
        model.base_model.model.model.layers[1].mlp.down_proj.lora_B.requires_grad_(False)
        return model


class TrainsTheBase(Peft):
    def adapted(self, model: Any) -> Any:
        model = super().adapted(model)
        model.base_model.model.model.norm.weight.requires_grad_(True)
        return model


class WithoutAdapter(Peft):
    """Quicker, as it leaves the adapters' part of the output out."""

    def prepared(self) -> Any:
        for module in self.model.modules():
            if hasattr(module, "lora_A"):
                module.scaling = {"default": 1e-3}
        return self.model


class OursFrozenAdapters(OursWithAdapter):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.run.optimizer.step = lambda *a, **k: None  # type: ignore[method-assign]


class OursStale(OursWithAdapter):
    """What is computed with is a copy that nobody renews."""

    def check_gradients(self) -> dict[str, float]:
        self.weights = lambda: {n: t.clone() for n, t in OursWithAdapter.weights(self).items()}  # type: ignore[method-assign]
        return super().check_gradients()


class OursWrongGradient(OursWithAdapter):
    """One gradient is 1% off, which neither the loss nor the norm shows."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        finish, views = self.gradients.finish, self.gradients.views

        def wrong(reduce: Any) -> None:
            finish(reduce)
            views["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"] *= 1.01

        self.gradients.finish = wrong  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (DetachedLoss, "the gradient norm is 0: nothing is trained"),
        (FrozenAdapters, "matrices did not move"),
        (
            OneFrozenMatrix,
            "trained there or here alone: ['base_model.model.model.layers.1.mlp.down_proj.lora_B.weight']",
        ),
        (TrainsTheBase, "trained there or here alone: ['base_model.model.model.norm.weight']"),
        (WithoutAdapter, "transformers' in float32"),
        (OursFrozenAdapters, "28 matrices did not move"),
        (OursStale, "from float32"),
        (OursWrongGradient, "down_proj.lora_A.weight is 1.0e-02 from float32"),
    ],
)
def test_a_sabotaged_arm_gets_a_reason_and_no_number(kind: type[Arm], reason: str, checkpoint: Made) -> None:
    found = row(kind, checkpoint)
    assert reason in found["error"]
    assert set(found) == {"error"}


@pytest.mark.parametrize("work", [TINY, LLAMA], ids=lambda work: work.name)
def test_honest_arms_get_their_numbers_and_agree(work: Work, tmp_path: Path) -> None:
    there = made(work, tmp_path)
    ours, eager = row(OursWithAdapter, there, work), row(Peft, there, work)
    for found in (ours, eager):
        assert "error" not in found, found
        assert found["loss"]["last"] < found["loss"]["first"]
        assert found["gate"]["loss"] == pytest.approx(0, abs=1e-5)
    assert ours["gate"]["worst_gradient"] < 1e-5
    assert ours["loss"]["last"] == pytest.approx(eager["loss"]["last"], rel=1e-5)
    least = work.least_memory
    assert (ours["chosen"]["recompute"], eager["chosen"]["recompute"]) == (
        ("mlp, 1 of 2 layers offloaded", "every layer") if least else ("light", "none")
    )


@pytest.mark.parametrize("name", [name for name, spec in LORA_ARMS.items() if variant(spec) != PLAIN])
def test_each_variant_passes_its_gate(name: str, tmp_path: Path) -> None:
    spec, work = LORA_ARMS[name], replace(TINY, shape=replace(TINY.shape, intermediate=128))  # whole blocks of NF4
    make_checkpoint(work, tmp_path, ["the quick brown fox jumps over the lazy dog"])
    exact = expected(work, tmp_path, variant(spec))
    found = measure(lambda: OursWithAdapter(spec, work, tmp_path), work, exact, time.time())
    assert "error" not in found, found
    if "dropout" not in name:
        assert found["gate"]["loss"] == pytest.approx(0, abs=1e-5) and found["gate"]["worst_gradient"] < 1e-5


def test_a_peer_that_does_not_checkpoint_where_all_do_is_red(tmp_path: Path) -> None:
    class Keeps(Peft):
        def adapted(self, model: Any) -> Any:
            model.gradient_checkpointing_disable()
            return super().adapted(model)

    assert "gradient checkpointing is off" in row(Keeps, made(LLAMA, tmp_path), LLAMA)["error"]


def test_the_gate_holds_another_state_than_arms_start_from(checkpoint: Made) -> None:
    folder, exact = checkpoint
    place = adapter_folder(TINY, folder, PLAIN)
    start, (loss, values, grads, theirs) = load_file(place / WEIGHTS_FILE), load_gate(gate_file(TINY, place))
    assert start.keys() == values.keys() == grads.keys()
    assert not [name for name in start if torch.equal(start[name], values[name])]
    assert loss != exact["loss"]
    assert all(g.norm() > 0 for g in grads.values()), "A has a gradient too, as B is not zero"
    assert expected(TINY, folder, PLAIN) == exact, "read, not computed again"
    assert theirs == {}, "arms compute in float32 here"


def test_a_gradient_may_be_half_again_as_far_from_float32_as_transformers_is() -> None:
    exact = {"q": torch.ones(100), "v": torch.ones(100)}
    grads = {"q": torch.full((100,), 1.14), "v": torch.full((100,), 1.04)}
    with pytest.raises(AssertionError, match=r"the gradient of q is 1\.4e-01 from float32, at most 5\.0e-02"):
        judged(2.0, grads, 2.0, exact, 0.05)
    seen = judged(2.0, grads, 2.0, exact, 0.05, {"q": 0.1, "v": 0.01})
    assert seen == pytest.approx(
        {"worst_gradient": 0.14, "loss_after_warmup": 0, "worst_gradient_of_transformers": 0.1}
    )
    with pytest.raises(AssertionError, match=r"the gradient of q is 1\.4e-01"):
        judged(2.0, grads, 2.0, exact, 0.05, {"q": 0.09, "v": 0.2})
    grads["v"] += 0.02
    with pytest.raises(AssertionError, match=r"the gradient of v is 6\.0e-02 from float32, at most 5\.0e-02"):
        judged(2.0, grads, 2.0, exact, 0.05, {"q": 0.1, "v": 0.01})
    grads["v"][0] = float("nan")
    with pytest.raises(AssertionError, match="the gradient of v is nan"):
        judged(2.0, grads, 2.0, exact, 0.05, {"q": 0.1, "v": 0.01})


def test_transformers_own_rounding_is_measured(checkpoint: Made) -> None:
    reference = AdapterReference(TINY, checkpoint[0], PLAIN)
    reference.draw(1)
    tokens = batches(TINY)[0]
    exact = reference.run(tokens)[1]
    errors = reference.errors_in(torch.bfloat16, tokens, {name: grad.clone() for name, grad in exact.items()})
    assert errors.keys() == exact.keys()
    assert all(1e-3 < error < 0.1 for error in errors.values())


def test_each_variant_has_a_reference(checkpoint: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, plain = checkpoint
    assert {variant(spec) for spec in LORA_ARMS.values()} == set(VARIANTS)
    assert expected(TINY, folder, "dropout") == plain
    assert expected(TINY, folder, "bias")["grad_norm"] != plain["grad_norm"]
    assert any("bias" in n for n in load_file(adapter_folder(TINY, folder, "bias") / WEIGHTS_FILE))
    expected(TINY, folder, "dora")
    assert any("magnitude" in n for n in load_file(adapter_folder(TINY, folder, "dora") / WEIGHTS_FILE))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    assert "no reference for nf4" in expected_where_possible(TINY, folder, "nf4")["error"]


def test_the_runner_measures_adapters_and_keeps_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, kept = tmp_path / "step.json", tmp_path / "kept"
    arms = ["--arm", "ours", "--arm", "eager"]
    assert run.main(["--work", "tiny_lora", *arms, "--out", str(out), "--checkpoints", str(kept)]) == 0
    found = json.loads(out.read_text())["works"]["tiny_lora"]
    assert found["title"].endswith("bf16 adapters with bf16 gradients and moments")
    assert found["lora"] == {"rank": 4, "alpha": 8.0}
    assert list(found["arms"]) == ["ours", "eager"] and summary.green(found).keys() == {"ours", "eager"}
    assert "first_step_seconds_warm" not in found["arms"]["ours"]
    (folder,) = kept.iterdir()
    assert (folder / "made").is_file() and (folder / "lora_r4" / "adapter_config.json").is_file()
    assert "0 red" in capsys.readouterr().out


def test_every_family_of_arms_is_there() -> None:
    assert {spec.family for spec in LORA_ARMS.values()} == {"ours", *PEERS_WITH_ADAPTER}
    for work, arms in run.LORA_MEASURED.items():
        assert set(arms) <= set(LORA_ARMS) and WORKS[work].lora
    with pytest.raises(KeyError):
        build(Spec("nobody"), TINY, Path())


def test_flops_count_what_is_frozen_and_what_is_trained() -> None:
    for name, giga in (("lora05", 2.39), ("lora8b", 32.4)):
        work = WORKS[name]
        assert sum(work.flops().values()) / work.tokens / 1e9 == pytest.approx(giga, rel=5e-3)
    assert LLAMA_8B.parameters == 8_030_261_248
    assert WORKS["lora8b"].lora is not None and 32 * WORKS["lora8b"].lora.layer_weights(LLAMA_8B) == 83_886_080


def with_memory(made: dict[str, Any], gib: dict[str, float]) -> dict[str, Any]:
    for name, used in gib.items():
        made["arms"][name] = made["arms"][name] | {"memory_gib": {"allocated": used}}
    return made


PEERS = {"unsloth": 125e3, "liger": 104e3, "compile": 112e3, "eager": 82e3}


def test_targets_are_met_by_the_quickest_arm_that_fits() -> None:
    made = section({"ours": 200e3, "ours_mlp2": 190e3, "ours_mlp10": 162.5e3, "ours_dora": 199e3, **PEERS})
    made = with_memory(made, {"ours": 12.9, "ours_mlp2": 12.3, "ours_mlp10": 10.0, "ours_dora": 9.0})
    lines = summary.verdicts("lora05", made)
    assert "met  ours_mlp2 1.52x unsloth at 12.3 GiB, target 1.45x within 12.5" in lines
    assert "MISS ours_mlp10 1.30x unsloth at 10.0 GiB, target 1.35x within 10" in lines
    assert "ours is 1.60x unsloth, the quickest peer" in lines
    assert not [line for line in lines if "ours_dora is" in line], "no peer trains that"
    assert "MISS no arm of ours within 10 GiB" in summary.verdicts("lora05", with_memory(made, {"ours_mlp10": 11.0}))


def test_what_more_costs_is_beside_plain_lora() -> None:
    made = section({"ours": 100e3, "ours_dropout": 96e3, "ours_bias": 90e3, "ours_dora_dropout": 50e3})
    lines = summary.verdicts("lora05", made)
    assert "met  ours_dropout takes 4.2% longer than ours, at most 5%" in lines
    assert "MISS ours_bias takes 11.1% longer than ours, at most 5%" in lines
    assert "     ours_dora_dropout takes 100.0% longer than ours" in lines


def test_the_pages_have_adapters_by_themselves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full = section({"ours": 150e3, "unsloth": 127e3}) | WHERE | {"title": "full"}
    lora = section({"ours_mlp10": 162.5e3, "ours_dora": 150e3, **PEERS}) | WHERE
    lora |= {"title": "with an adapter", "lora": {"rank": 32, "alpha": 32.0}}
    (tmp_path / "step.json").write_text(json.dumps({"works": {"full05": full, "lora05": lora}}), encoding="utf-8")
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    text = readme.steps(short=True, lora=True)
    assert "**with an adapter**" in text and "**full**" not in text
    assert "| **Chronicals**, the MLP of 10 layers recomputed | 162,500 (162,500 to 162,500) | 1.30x |" in text
    assert "| **Chronicals**, DoRA | 150,000 (150,000 to 150,000) |  |" in text
    assert "| Liger + PEFT |" in text and "| transformers + PEFT |" in text
    assert "**with an adapter**" not in readme.steps(short=True)
    pages = readme.generated()
    assert {file.name for file in pages} == {"README.md", "benchmarks.md", "step.svg", "lora.svg"}
    assert NUMBERS["memory_gib"]["allocated"] == 15.0 and "plots/lora.svg" in pages[readme.README]
