"""The step benchmark: its gate stops whoever does not train, its files and lines say what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.peers.models import Eager
from benchmarks.step import run, summary
from benchmarks.step.arm import ARMS, Arm, Spec
from benchmarks.step.measure import measure
from benchmarks.step.ours import Ours
from benchmarks.step.reference import expected, make_checkpoint
from benchmarks.step.turns import Turns
from benchmarks.step.works import BATCHES, QWEN_05B, WORKS, batches
from chronicals import cli
from chronicals.commands import bench
from chronicals.errors import UserError

TINY = WORKS["tiny"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(TINY, folder, ["the quick brown fox jumps over the lazy dog"])
    return folder, expected(TINY, folder)


def row(kind: type[Arm], checkpoint: tuple[Path, dict[str, float]]) -> dict[str, Any]:
    folder, exact = checkpoint
    return measure(lambda: kind(Spec("tiny"), TINY, folder), TINY, exact, time.time())  # type: ignore[call-arg]


class DetachedLoss(Eager):
    """The loss is a number of its own: backward succeeds and reaches nothing."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).detach().requires_grad_()


class FrozenWeights(Eager):
    """Right losses and gradients, and an optimizer that never runs."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.optimizer.step = lambda: None  # type: ignore[method-assign, assignment]


class OneFrozenMatrix(Eager):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        frozen, group = self.model.model.layers[1].mlp.down_proj.weight, self.optimizer.param_groups[0]
        group["params"] = [p for p in group["params"] if p is not frozen]


class HalfTheDocuments(Eager):
    """Quicker, as it leaves half of the work out."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens[:1])


class Diverges(Eager):
    def step(self, index: int) -> None:
        super().step(index)
        if index == TINY.warmup + TINY.timed:
            self.last = (self.last[0] * float("nan"), self.last[1])


class OursDetached(Ours):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        loss_fn = self.run.loss_fn
        self.run.loss_fn = lambda *a: loss_fn(a[0].detach().requires_grad_(), *a[1:])


class OursWrongGradient(Ours):
    """One gradient is 1% off, which neither the loss nor the norm shows."""

    def check_gradients(self) -> dict[str, float]:
        self.run.loss.zero_()
        self.run.run_micro(self.batches[0])
        self.gradients.buffers["layers.1.mlp.down_proj.weight"] *= 1.01
        return self._compared(float(self.run.loss), self.gradients.buffers)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (DetachedLoss, "the gradient norm is 0: nothing is trained"),
        (FrozenWeights, "matrices did not move"),
        (OneFrozenMatrix, "1 matrices did not move, model.layers.1.mlp.down_proj.weight first"),
        (HalfTheDocuments, "transformers' in float32"),
        (Diverges, "the last step's loss is nan"),
        (OursDetached, "gradient"),
        (OursWrongGradient, "the gradient of layers.1.mlp.down_proj.weight is 1.0e-02 from float32"),
    ],
)
def test_a_sabotaged_arm_gets_a_reason_and_no_number(
    kind: type[Arm], reason: str, checkpoint: tuple[Path, dict[str, float]]
) -> None:
    found = row(kind, checkpoint)
    assert reason in found["error"]
    assert set(found) == {"error"}
    section = {"arms": {"eager": found}, "gpu": None, "ceilings": None}
    line = summary.told("eager", found, section)
    assert "RED, no number: " in line and "tok/s" not in line
    assert summary.best_peer("tiny", "ours", section) is None


@pytest.mark.parametrize("kind", [Eager, Ours])
def test_an_honest_arm_gets_its_numbers(kind: type[Arm], checkpoint: tuple[Path, dict[str, float]]) -> None:
    found = row(kind, checkpoint)
    assert "error" not in found, found
    _, exact = checkpoint
    assert found["loss"]["first"] == pytest.approx(exact["loss"], rel=1e-5)
    assert found["grad_norm"]["first"] == pytest.approx(exact["grad_norm"], rel=1e-4)
    assert found["loss"]["last"] < found["loss"]["first"]
    seconds, rate = found["seconds"], found["tokens_per_second"]
    assert seconds["least"] <= seconds["median"] <= seconds["most"]
    assert rate["median"] == pytest.approx(TINY.tokens / seconds["median"])
    assert rate["least"] == pytest.approx(TINY.tokens / seconds["most"])


def test_ours_equals_the_peer_after_the_same_steps(checkpoint: tuple[Path, dict[str, float]]) -> None:
    ours, eager = row(Ours, checkpoint), row(Eager, checkpoint)
    assert ours["loss"]["last"] == pytest.approx(eager["loss"]["last"], rel=1e-5)
    assert ours["grad_norm"]["last"] == pytest.approx(eager["grad_norm"]["last"], rel=1e-3)


def test_every_arm_starts_in_a_process_of_its_own_and_the_file_keeps_other_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    def spawned(command: list[str], **settings: Any) -> int:
        started.append(command)
        out = Path(command[command.index("--out") + 1])
        if "--prepare" in command:
            out.write_text(json.dumps({"expected": {"loss": 1.0, "grad_norm": 1.0}, "gpu": None, "ceilings": None}))
        elif command[command.index("--arm") + 1] == "eager":
            settings["stdout"].write("Segmentation fault\n")
            settings["stdout"].flush()
            return -11
        else:
            out.write_text(json.dumps(NUMBERS))
        return 0

    monkeypatch.setattr(run.children, "run", spawned)
    monkeypatch.setattr(
        run, "machine", lambda argv, commit: {"gpu": None, "versions": {}, "commit": "c", "command": ""}
    )
    out = tmp_path / "step.json"
    out.write_text(json.dumps({"works": {"full05": {"kept": True}}}))
    assert run.main(["--work", "tiny", "--arm", "ours", "--arm", "eager", "--out", str(out)]) == 1
    assert [c[c.index("--arm") + 1] for c in started if "--prepare" not in c] == ["ours", "ours", "eager"], (
        "ours starts warm too"
    )
    record = json.loads(out.read_text())["works"]
    assert record["full05"] == {"kept": True}
    arms = record["tiny"]["arms"]
    assert arms["eager"] == {"error": "its process ended with exit code -11: Segmentation fault"}
    assert arms["ours"]["tokens_per_second"]["median"] == 960.0
    assert "eager                  RED, no number" in capsys.readouterr().out


def test_whoever_is_timed_waits_for_those_who_start_up_and_they_for_it(tmp_path: Path) -> None:
    program = """
import sys, time
from pathlib import Path
from benchmarks.step.turns import Turns
turns = Turns(Path(sys.argv[1]))
getattr(turns, sys.argv[2])()
print("holds", flush=True)
time.sleep(0.6)
"""
    for theirs, mine, waits in (
        ("beside_others", "beside_others", False),
        ("beside_others", "alone", True),
        ("alone", "beside_others", True),
    ):
        command = [sys.executable, "-c", program, str(tmp_path / "turns"), theirs]
        with subprocess.Popen(command, cwd=run.ROOT, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None and other.stdout.readline() == "holds\n"
            turns = Turns(tmp_path / "turns")
            getattr(turns, mine)()
            assert (turns.waited > 0.3) == waits, (theirs, mine, turns.waited)
            turns.done()


def test_arms_at_once_share_a_lock_and_keep_their_order_behind_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    most, running, shared = 0, 0, set()

    def spawned(command: list[str], **settings: Any) -> int:
        nonlocal most, running
        running += 1
        most = max(most, running)
        shared.add(command[command.index("--turns") + 1])
        first = {"expected": None, "gpu": None, "ceilings": None} if "--prepare" in command else NUMBERS
        time.sleep(0.3 if "ours" in command else 0.1)
        Path(command[command.index("--out") + 1]).write_text(json.dumps(first))
        running -= 1
        return 0

    monkeypatch.setattr(run.children, "run", spawned)
    monkeypatch.setattr(run, "machine", lambda argv, commit: {"versions": {}, "commit": "c", "command": ""})
    out, arms = tmp_path / "step.json", ["liger", "ours", "eager", "unsloth"]
    asked = [part for name in arms for part in ("--arm", name)]
    assert run.main(["--work", "tiny", *asked, "--at-once", "2", "--warm", "eager", "--out", str(out)]) == 0
    assert most == 2 and len(shared) == 1
    assert list(json.loads(out.read_text())["works"]["tiny"]["arms"]) == ["ours", "liger", "eager", "unsloth"]


def test_without_a_gpu_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--out", str(tmp_path / "out.json")]) == 2
    assert capsys.readouterr().err.startswith("error: no GPU here, so nothing was measured; ")
    assert not (tmp_path / "out.json").exists()


def test_an_unknown_arm_names_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main(["--arm", "unslot"])
    assert stopped.value.code == 2
    assert "unsloth" in capsys.readouterr().err


def test_the_command_reaches_the_runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def spawned(command: list[str], *, cwd: Path) -> int:
        asked.append((command, cwd))
        return 1

    monkeypatch.setattr(bench, "_ends_with_us", spawned)
    monkeypatch.chdir(tmp_path)
    assert bench.bench_step(["full05"], ["ours", "liger"], Path("out.json"), profile=True) == 1
    ((command, cwd),) = asked
    assert command == [
        *(sys.executable, "-m", "benchmarks.step.run", "--work", "full05", "--arm", "ours", "--arm", "liger"),
        *("--profile", "--out", str(tmp_path / "out.json")),
    ]
    assert (cwd / "benchmarks" / "step" / "run.py").is_file()
    with pytest.raises(UserError, match="the benchmarks are in the repository"):
        bench.bench_step([], [], None, root=tmp_path)


def test_the_command_line_reaches_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(bench, "bench_step", lambda *a, **k: asked.append((a, k)) or 1)
    out = str(tmp_path / "out.json")
    assert cli.run(["bench", "step", "--work", "full05", "--arm", "ours", "--profile", "--out", out]) == 1
    assert asked == [((["full05"], ["ours"], Path(out)), {"data": None, "profile": True})]


NUMBERS: dict[str, Any] = {
    "tokens_per_second": {"median": 960.0, "least": 900.0, "most": 990.0},
    "seconds": {"median": 0.1, "least": 0.09, "most": 0.11},
    "flops_per_second": 4e14,
    "memory_gib": {"allocated": 15.0, "reserved": 15.5, "device": 16.5},
    "first_step_seconds": 9.0,
    "loss": {"first": 12.0, "last": 11.0},
    "grad_norm": {"first": 2.0, "last": 2.0},
    "gate": {},
    "chosen": {},
}


def section(rates: dict[str, float], *, matmul: float = 686e12) -> dict[str, Any]:
    arms = {
        name: NUMBERS | {"tokens_per_second": {"median": rate, "least": rate, "most": rate}}
        for name, rate in rates.items()
    }
    return {"gpu": "NVIDIA H200", "ceilings": {"matmul_flops_per_second": matmul}, "arms": arms}


PEERS = {"unsloth": 125e3, "liger": 108e3, "compile": 112e3, "eager": 85e3}


def test_ratios_are_to_the_best_peer_of_equal_precision() -> None:
    made = section({"ours": 162.5e3, "ours_fp32": 130e3, **PEERS, "liger_fp32": 100e3, "unsloth_masked": 9e9})
    assert summary.best_peer("full05", "ours", made) == "unsloth"
    assert summary.best_peer("full05", "ours_fp32", made) == "liger_fp32"
    lines = summary.verdicts("full05", made)
    assert "ours is 1.30x unsloth, the quickest peer" in lines
    assert "ours_fp32 is 1.30x liger_fp32, the quickest peer" in lines
    assert "met  ours 1.30x unsloth, target 1.2x" in lines
    assert "met  ours 15.0 GiB, target 16" in lines


def test_a_misconfigured_peer_gives_no_ratio() -> None:
    made = section({"ours": 162.5e3, **PEERS, "unsloth": 100e3})
    lines = summary.verdicts("full05", made)
    assert lines[0] == "!! unsloth reached 100,000 tokens/s, expected at least 112,590"
    assert not [line for line in lines if "x " in line.split("GiB")[0] and "ours" in line and "GiB" not in line]
    harmless = section({"ours": 162.5e3, **PEERS, "eager": 10e3})
    assert "ours is 1.30x unsloth, the quickest peer" in summary.verdicts("full05", harmless), "eager could not be it"
    slow = section({"ours": 162.5e3, **PEERS, "unsloth": 105e3}, matmul=600e12)
    assert "ours is 1.45x compile, the quickest peer" in summary.verdicts("full05", slow)


def test_a_target_that_is_missed_is_told() -> None:
    lines = summary.verdicts("full05", section({"ours": 130e3, **PEERS}))
    assert "MISS ours 1.04x unsloth, target 1.2x" in lines


def test_utilisation_counts_model_flops() -> None:
    work = WORKS["full05"]
    assert QWEN_05B.parameters == 494_032_768
    per_token = {name: flops / work.tokens / 1e9 for name, flops in work.flops().items()}
    assert per_token == pytest.approx({"matmul": 2.147, "head": 0.817, "attention": 0.308}, rel=2e-3)
    shares = summary.utilisation(NUMBERS, section({}))
    assert shares == pytest.approx({"datasheet": 4e14 / 989e12, "matmul": 4e14 / 686e12})


def test_batches_are_the_same_in_every_process_and_hold_many_repeats() -> None:
    first = batches(WORKS["full05s"])
    assert len(first) == BATCHES and first[0].shape == (4, 512)
    program = (
        "import torch; from benchmarks.step.works import *; print(torch.stack(batches(WORKS['full05s'])).sum().item())"
    )
    told = subprocess.run([sys.executable, "-c", program], cwd=run.ROOT, capture_output=True, text=True, check=True)
    assert int(told.stdout) == torch.stack(first).sum().item()
    assert len(first[0].unique()) < 0.85 * first[0].numel()
    assert not torch.equal(first[0], first[1])


def test_every_default_arm_exists() -> None:
    assert set(run.MEASURED) <= set(ARMS)
