"""`chronicals bench kernels`: it reaches the runner, and the runner never tells a number on a red gate."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernels import run
from benchmarks.kernels.harness import Case, Timing, assert_no_worse, relative_error
from chronicals import cli
from chronicals.commands import bench
from chronicals.errors import UserError


def test_the_runner_gets_the_ops_and_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def spawned(command: list[str], *, cwd: Path) -> int:
        asked.append((command, cwd))
        return 1

    monkeypatch.setattr(bench, "_ends_with_us", spawned)
    monkeypatch.chdir(tmp_path)
    assert bench.bench_kernels(["attention"], Path("out.json")) == 1
    ((command, cwd),) = asked
    assert command == [
        *(sys.executable, "-m", "benchmarks.kernels.run", "--op", "attention"),
        *("--out", str(tmp_path / "out.json")),
    ]
    assert (cwd / "benchmarks" / "kernels" / "run.py").is_file()


def test_bench_step_hands_on_its_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def spawned(command: list[str], *, cwd: Path) -> int:
        asked.append(command[1:])
        return 0

    monkeypatch.setattr(bench, "_ends_with_us", spawned)
    monkeypatch.chdir(tmp_path)
    assert cli.run(["bench", "step", "--work", "gsm8k", "--data", "train.jsonl"]) == 0
    data = str(tmp_path / "train.jsonl")
    assert asked == [["-m", "benchmarks.step.run", "--work", "gsm8k", "--data", data]]


def test_the_list_of_benchmarks_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "--help"]) == 0
    listed = capsys.readouterr().out.split("Commands:")[1]
    assert "step     Gate, then time whole training steps." in listed
    assert "..." not in listed


def test_a_wheel_has_no_benchmarks(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        bench.bench_kernels([], None, root=tmp_path)
    assert str(caught.value) == (
        f"the benchmarks are in the repository, and there is none at {tmp_path}; "
        "clone it, pip install --editable . there, and run this again"
    )


def test_an_unknown_op_names_the_known() -> None:
    with pytest.raises(UserError) as caught:
        bench.bench_kernels(["atention"], None)
    assert str(caught.value).startswith("there is no kernel benchmark 'atention'; choose from adamw, attention, ")


def test_without_a_gpu_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--out", str(tmp_path / "out.json")]) == 2
    assert capsys.readouterr().err.startswith("error: no GPU here, so nothing was measured; ")
    assert not (tmp_path / "out.json").exists()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds by the arm's own account, and a machine that copies 1 GB/s and multiplies in 1 s."""
    monkeypatch.setattr(run, "time_arm", lambda arm, size, *, graph: Timing(arm(), arm() - 0.5, arm() + 0.5))
    monkeypatch.setattr(run, "time_copy", lambda size: Timing(size / 1e9, 0.0, 0.0))
    monkeypatch.setattr(run, "time_matmul", lambda m, n, k: Timing(1.0, 1.0, 1.0))
    monkeypatch.setattr(run, "extra_memory", lambda arm: 1000)


def case(**changes: Any) -> Case:
    settings: dict[str, Any] = {
        "op": "glu",
        "shape": "16 x 8",
        "direction": "forward",
        "bytes": 9 * 10**9,
        "gate": lambda: None,
        "ours": lambda: 10.0,
        "peers": {"eager": lambda: 40.0, "liger": lambda: 12.0},
    }
    return Case(**settings | changes)


@pytest.mark.usefixtures("clock")
def test_a_row_has_floor_ratios_and_limits() -> None:
    row = run.measure(case(claim=5.0), {})
    assert row["of_floor"] == pytest.approx(0.9)
    assert row["ratios"] == {"eager": 4.0, "liger": 1.2}
    assert row["ratio_at_floor"]["eager"] == pytest.approx(40 / 9)
    assert row["misses"] == []
    line = run.told(row)
    assert "floor  90.0% (target 90.0%)" in line
    assert "eager 4.00x (claim 5x, limit 4.44x)  liger 1.20x" in line


@pytest.mark.usefixtures("clock")
def test_misses_are_told() -> None:
    row = run.measure(case(target=0.95, at_least={"liger": 2.0, "absent": 9.0}, extra_bytes=999, at_most=9.5), {})
    assert row["misses"] == [
        "90.0% of the floor's speed, target 95.0%",
        "1.20x liger, target 2.00x",
        "10000000.0 us, at most 9500000.0",
        "1,000 extra bytes, limit 999",
    ]
    assert "MISSES" in run.told(row)


@pytest.mark.usefixtures("clock")
def test_the_floor_holds_the_matmuls() -> None:
    known: dict[tuple[int, int, int], float] = {}
    row = run.measure(case(matmuls=((1, 2, 3), (1, 2, 3))), known)
    assert row["floor_seconds"] == pytest.approx(11.0)
    assert known == {(1, 2, 3): 1.0}


def red() -> None:
    raise AssertionError("dx is 3.0e-01 from float64")


def crash() -> float:
    raise RuntimeError("an illegal memory access")


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gate": red}, "gate: dx is 3.0e-01 from float64"),
        ({"gate": crash}, "gate: RuntimeError: an illegal memory access"),
        ({"ours": crash}, "timing: RuntimeError: an illegal memory access"),
    ],
)
def test_no_number_on_a_red_gate(changes: dict[str, Any], reason: str) -> None:
    row = run.measure(case(**changes), {})
    assert row == {"op": "glu", "shape": "16 x 8", "direction": "forward", "bytes": 9 * 10**9, "error": reason}
    line = run.told(row)
    assert line.endswith(f"RED, no number: {reason}")
    assert " us " not in line


WHERE: dict[str, Any] = {"versions": {}, "commit": None}


def test_a_child_that_dies_is_red_and_the_others_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def spawned(command: list[str], *, cwd: Path) -> int:
        op, out = command[command.index("--child") + 1], Path(command[-1])
        if op == "dies":
            return -11
        out.write_text(json.dumps({"cases": [{"op": op}]}))
        return 0

    monkeypatch.setattr(run.children, "run", spawned)
    out = tmp_path / "results" / "out.json"
    assert run.run_all(["earlier"], out, WHERE | {"gpu": "F"}) == 0
    assert run.run_all(["dies", "lives"], out, WHERE | {"gpu": "G"}) == 1
    assert json.loads(out.read_text())["ops"] == {
        "earlier": WHERE | {"gpu": "F", "cases": [{"op": "earlier"}]},
        "dies": WHERE | {"gpu": "G", "cases": [{"op": "dies", "error": "its process ended with exit code -11"}]},
        "lives": WHERE | {"gpu": "G", "cases": [{"op": "lives"}]},
    }


def test_every_op_lists_its_cases_without_a_gpu() -> None:
    for op in run.ops():
        cases = run.cases_of(op)
        assert cases, op
        assert len({(one.op, one.shape, one.direction) for one in cases}) == len(cases), f"{op} names a case twice"


def test_the_gates_tools() -> None:
    exact = {"dx": torch.ones(4, dtype=torch.float64)}
    near, far = {"dx": torch.full((4,), 1.001)}, {"dx": torch.full((4,), 1.1)}
    assert_no_worse(near, far, exact)
    with pytest.raises(AssertionError, match=r"dx is 1\.0e-01 from float64, eager 1\.0e-03"):
        assert_no_worse(far, near, exact)
    with pytest.raises(AssertionError, match="dx is inf"):
        assert_no_worse({"dx": torch.full((4,), float("nan"))}, near, exact)
    assert relative_error(torch.ones(2), torch.ones(2)) == 0.0
